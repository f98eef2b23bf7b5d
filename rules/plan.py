"""What planned jobs will cost: processor hours and disk, from the configuration and report/costs.yaml.

Standard library only, like all that Snakemake imports before jobs start.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rules.configuration import entry_name, resolve
from wmdd_core.layouts import class_count
from wmdd_core.sharding import shard_members
from wmdd_core.terms import SMALL_IMAGE

BACKWARD = 3
"""A training step costs three passes forward: one forward, two backward, to the inputs and the weights."""

SINGLE_BATCH = 100
"""Images in a forward pass where no setting says how many (64 on a CPU and where real ones are embedded)."""

DECODERS = 8
"""Processes that decode beside a network that reads its images from files."""


@dataclass(frozen=True)
class Cost:
    """What one job costs: operations, in `steps` steps, on a GPU; or seconds on a core; and bytes kept.

    With operations the seconds are those of decoding beside them, in `DECODERS` processes.
    """

    operations: float = 0.0
    steps: float = 0.0
    core_seconds: float = 0.0
    bytes: float = 0.0


class Unmeasured(Exception):
    """Not known: report/costs.yaml lacks this network or the size of this data, or a figure measures it."""


def counts_of(description: Path) -> tuple[int, int]:
    """Training and test images of a dataset that has been described."""
    found = json.loads(description.read_text(encoding="utf-8"))
    return sum(found["train"]["per_class"]), sum(found["test"]["per_class"])


class Planner:
    """Estimates the cost of jobs, known by their rule and wildcards."""

    def __init__(self, config: Mapping, costs: Mapping) -> None:
        self.config, self.costs = config, costs
        self.counted: dict[str, tuple[int, int] | None] = {}

    def entry(self, block: str, name: str, dataset: str) -> dict:
        return resolve(self.config[block][entry_name(name)], dataset, f"{block}.{name}")

    def dataset(self, name: str) -> dict:
        return self.entry("datasets", name, name)

    def images(self, dataset: str) -> tuple[int, int]:
        """Training and test images: those that were found where the dataset has been described, else the
        source's; raises `Unmeasured` where the data must be read to know."""
        if dataset not in self.counted:
            described = Path(self.config["results"]) / dataset / "description.json"
            self.counted[dataset] = counts_of(described) if described.exists() else None
        found = self.counted[dataset] or self.costs["images"].get(self.dataset(dataset)["source"])
        if not found:
            raise Unmeasured
        return tuple(found)

    def classes(self, dataset: str) -> int:
        return class_count(self.dataset(dataset))

    def pixels(self, dataset: str) -> int:
        """Values of an image, three channels."""
        return 3 * self.dataset(dataset)["resolution"] ** 2

    def forward(self, network: Mapping, dataset: str) -> float:
        """Operations of one image through a network."""
        side = self.dataset(dataset)["resolution"]
        if network["architecture"] == "convnet":
            width, depth = network.get("width", 128), network.get("depth", 3)
            inputs = [3, *[width] * (depth - 1)]
            return sum(2 * 9 * c * width * (side >> block) ** 2 for block, c in enumerate(inputs))
        counted = self.measured(network)["small" if side <= SMALL_IMAGE else "large"]
        return counted["gflop"] * 1e9 * (side / counted["side"]) ** 2

    def measured(self, network: Mapping) -> Mapping:
        """What report/costs.yaml says of a network; raises `Unmeasured` where it says nothing."""
        if network["architecture"] not in self.costs["networks"]:
            raise Unmeasured
        return self.costs["networks"][network["architecture"]]

    def dimension(self, network: Mapping, dataset: str) -> int:
        """Length of a feature vector."""
        if network["architecture"] == "convnet":
            side = self.dataset(dataset)["resolution"] >> network.get("depth", 3)
            return network.get("width", 128) * side**2
        return self.measured(network)["features"]

    def teacher(self, w: Mapping) -> dict:
        """The teacher of a job: by its wildcard, or the dataset's own."""
        name = w.get("teacher") or self.dataset(w["dataset"])["teacher"]
        return self.entry("teachers", name, w["dataset"])

    def cost(self, rule: str, w: Mapping[str, str]) -> Cost | None:
        """The cost of a job, its start apart; None where the size of the dataset or network is not known."""
        try:
            return getattr(self, rule, lambda w: Cost())(w)
        except Unmeasured:
            return None

    def _not_planned(self, w: Mapping) -> Cost:
        raise Unmeasured

    # These measure something for a figure.
    embed_tsne = measure_distances = measure_efficiency = trace_barycenters = _not_planned

    # ---- rules, each as it works -------------------------------------------------------------

    def describe_dataset(self, w: Mapping) -> Cost:
        return Cost(core_seconds=self.costs["core"]["image_seconds"] * sum(self.images(w["dataset"])))

    def decode_images(self, w: Mapping) -> Cost:
        count = self.images(w["dataset"])[w["split"] == "test"]
        seconds = self.costs["core"]["image_seconds"] * count
        return Cost(core_seconds=seconds, bytes=count * self.pixels(w["dataset"]))

    def _decoding(self, dataset: str, passes: int) -> float:
        """Seconds on a core for so many passes over the training images; none where they are kept decoded."""
        kept = self.dataset(dataset).get("store_train")
        return 0.0 if kept else passes * self.images(dataset)[0] * self.costs["core"]["image_seconds"]

    def _training_on_real(self, settings: Mapping, network: Mapping, dataset: str) -> Cost:
        cost = self._training(settings, network, self.images(dataset)[0], dataset)
        return replace(cost, core_seconds=self._decoding(dataset, settings["epochs"]))

    def _training(self, settings: Mapping, network: Mapping, count: int, dataset: str) -> Cost:
        operations = BACKWARD * settings["epochs"] * count * self.forward(network, dataset)
        return Cost(operations, settings["epochs"] * math.ceil(count / settings["batch_size"]))

    def pretrain_teacher(self, w: Mapping) -> Cost:
        teacher = self.teacher(w)
        if "weights" in teacher:
            return Cost()
        return self._training_on_real(teacher, teacher, w["dataset"])

    def evaluate_all_real(self, w: Mapping) -> Cost:
        method = self.entry("methods", w["method"], w["dataset"])
        student = self.entry("students", w["student"], w["dataset"])
        return self._training_on_real(method, student, w["dataset"])

    def extract_features(self, w: Mapping) -> Cost:
        teacher, count = self.teacher(w), self.images(w["dataset"])[0]
        kept = count * self.dimension(teacher, w["dataset"]) * 4
        operations, steps = count * self.forward(teacher, w["dataset"]), count / SINGLE_BATCH
        return Cost(operations, steps, self._decoding(w["dataset"], 1), kept)

    def compute_barycenter(self, w: Mapping) -> Cost:
        settings, ipc = self.entry("barycenters", w["barycenter"], w["dataset"]), int(w["ipc"])
        first, _, last = w["block"].partition("-")
        classes = int(last or first) - int(first) + 1
        members = self.images(w["dataset"])[0] / self.classes(w["dataset"])
        seconds = (
            self.costs["core"]["barycenter_seconds"] * members * ipc * settings.get("max_iterations", 100)
        )
        kept = ipc * self.dimension(self.teacher(w), w["dataset"]) * 8
        return Cost(core_seconds=classes * seconds, bytes=classes * kept)

    def recover_images(self, w: Mapping) -> Cost:
        method = self.entry("methods", w["method"], w["dataset"])
        place = (self.classes(w["dataset"]), int(w["ipc"]), method["batch_size"], method["batch_layout"])
        classes, numbers = shard_members(*place, int(w["shard"]))
        count = len(classes) * len(numbers)
        teacher = self.teacher({**w, "teacher": method.get("teacher")})
        # The weights are frozen: a pass forward, a pass back to the pixels.
        operations = 2 * method["iterations"] * count * self.forward(teacher, w["dataset"])
        return Cost(operations, method["iterations"], bytes=count * self.pixels(w["dataset"]))

    def distil_baseline(self, w: Mapping) -> Cost:
        method, ipc = self.entry("methods", w["method"], w["dataset"]), int(w["ipc"])
        forward = self.forward(self.entry("students", method["network"], w["dataset"]), w["dataset"])
        classes, real = self.classes(w["dataset"]), method.get("real_batch", 256)
        loops, inner = method.get("outer_loops", 1), method.get("inner_steps", 1)
        # DM: forward on both sides, back to the distilled. DC: gradients of both, and back through one.
        passes = real + 2 * ipc if method["kind"] == "dm" else BACKWARD * (real + 2 * ipc)
        trained = 0 if method["kind"] == "dm" else BACKWARD * ipc * inner * (loops - 1)
        count = method["iterations"] * classes
        operations = count * (passes * loops + trained) * forward
        kept = classes * ipc * self.pixels(w["dataset"])
        return Cost(operations, count * loops, self._decoding(w["dataset"], 1), kept)

    def gather_images(self, w: Mapping) -> Cost:
        # The set once as tensors and once as PNG, which hardly shrinks noise.
        return Cost(bytes=2 * self._distilled(w) * self.pixels(w["dataset"]))

    def _distilled(self, w: Mapping) -> int:
        return self.classes(w["dataset"]) * int(w["ipc"])

    def relabel_images(self, w: Mapping) -> Cost:
        recipe, count = self.entry("recipes", w["recipe"], w["dataset"]), self._distilled(w)
        views = recipe["epochs"] * count
        operations = views * self.forward(self.teacher({**w, "teacher": None}), w["dataset"])
        return Cost(
            operations, views / min(SINGLE_BATCH, count), bytes=2 * views * self.classes(w["dataset"])
        )

    def evaluate_student(self, w: Mapping) -> Cost:
        recipe = self.entry("recipes", w["recipe"], w["dataset"])
        student, count = self.entry("students", w["student"], w["dataset"]), self._distilled(w)
        cost = self._training(recipe, student, count, w["dataset"])
        if recipe["labels"] != "online":
            return cost
        labelled = recipe["epochs"] * count * self.forward(self.teacher({**w, "teacher": None}), w["dataset"])
        return replace(cost, operations=cost.operations + labelled)


# ---- the summary -----------------------------------------------------------------------------


@dataclass
class Total:
    """What a group of jobs costs."""

    jobs: int = 0
    unknown: int = 0
    gpu_hours: float = 0.0
    core_hours: float = 0.0
    instead_hours: float = 0.0
    """Core hours of the work counted in `gpu_hours`, where there is no GPU."""
    gigabytes: float = 0.0

    def add(self, cost: Cost | None, costs: Mapping) -> None:
        start, gpu, core = costs["job_seconds"], costs["gpu"], costs["core"]
        self.jobs += 1
        if cost is None:
            self.unknown += 1
        elif cost.operations:
            seconds = max(cost.operations / gpu["tflops"] / 1e12, cost.steps * gpu["step_seconds"])
            self.gpu_hours += (start + max(seconds, cost.core_seconds / DECODERS)) / 3600
            self.instead_hours += (start + cost.operations / core["tflops"] / 1e12 + cost.core_seconds) / 3600
        else:
            self.core_hours += (start + cost.core_seconds) / 3600
        self.gigabytes += cost.bytes / 1e9 if cost else 0


def total_by(jobs: Iterable[tuple[str, Mapping]], planner: Planner) -> dict[tuple[str, str], Total]:
    """Totals by (rule, dataset) of jobs, each (rule, wildcards); the dataset of tables and figures is ""."""
    found: dict[tuple[str, str], Total] = defaultdict(Total)
    for rule, w in jobs:
        found[rule, w.get("dataset", "")].add(planner.cost(rule, w), planner.costs)
    return dict(found)


def merged(totals: Iterable[Total]) -> Total:
    """The sum of totals."""
    return Total(*map(sum, zip(*(vars(t).values() for t in totals), strict=True)))


def summarise(jobs: Iterable[tuple[str, Mapping]], config: Mapping, costs: Mapping) -> str:
    """The plan as text: jobs, hours and disk by rule and by dataset, what is largest, what it rests on."""
    totals = total_by(jobs, Planner(config, costs))
    whole = merged(totals.values())
    lines = [f"{'Plan':<26}{'jobs':>8}{'GPU hours':>12}{'core hours':>12}{'disk (GB)':>12}"]
    for place, rest in ((0, "?"), (1, "tables and figures")):
        groups: dict[str, list[Total]] = defaultdict(list)
        for key, total in totals.items():
            groups[key[place] or rest].append(total)
        sums = {name: merged(group) for name, group in groups.items()}
        hours = sorted(sums, key=lambda name: (-sums[name].gpu_hours, -sums[name].core_hours, name))
        lines += [*(_line(name, sums[name]) for name in hours), ""]
    lines += [_line("total", whole), ""]
    lines += [
        _largest("GPU hours", "gpu_hours", "h", totals, whole),
        _largest("disk", "gigabytes", "GB", totals, whole),
        f"GPU hours are estimated for an H100-class GPU ({costs['gpu']['tflops']} TFLOP/s sustained)"
        + (
            f"; without a GPU the same work takes about {_number(whole.instead_hours)} core hours"
            if whole.instead_hours >= 0.1
            else ""
        )
        + ". Disk: what is kept.",
        "Rates, which of them measured and which estimated: report/costs.yaml.",
    ]
    if whole.unknown:
        lines.append(
            f"+ {whole.unknown} of the jobs have no hours here: only describe_dataset will tell their size,"
            " report/costs.yaml lacks their network, or they measure something for a figure."
        )
    return "\n".join(line for line in lines if line is not None)


def _number(value: float) -> str:
    return (
        "–" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.1 else "< 0.1"
    )


def _line(name: str, total: Total) -> str:
    figures = [_number(v) for v in (total.gpu_hours, total.core_hours, total.gigabytes)]
    return (
        f"{name:<26}{total.jobs:>8,}"
        + "".join(f"{f:>12}" for f in figures)
        + ("  +" if total.unknown else "")
    )


def _largest(
    what: str, key: str, unit: str, totals: Mapping[tuple[str, str], Total], whole: Total, count: int = 3
) -> str | None:
    """The steps that take most, where there is anything to save."""
    if getattr(whole, key) < 1:
        return None
    most = sorted(totals, key=lambda place: -getattr(totals[place], key))[:count]
    told = (f"{r} of {d} {_number(v)} {unit}" for r, d in most if (v := getattr(totals[r, d], key)))
    return f"Most {what}: {', '.join(told)}."
