"""Time and memory of DC, DM, SRe2L and WMDD in one harness (Table 7): one image per class, one iteration.

Each method runs its own loop, with its own settings and the teacher's network, in a process of its own,
so that peaks of memory do not mix. What WMDD needs beforehand is measured in a further process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.baselines import DC_LOOPS
from wmdd_core.device import precision_name
from wmdd_core.errors import UserError
from wmdd_core.features import extract_features
from wmdd_core.memory import keep_freed_memory
from wmdd_core.metrics import format_mean_sd, mean_and_sd
from wmdd_core.models import freeze
from wmdd_core.seeding import numpy_generator
from wmdd_core.terms import MEASURED_BN_TERMS, SET_TERMS
from wmdd_core.timing import (
    DEVICE_MEMORY,
    RESIDENT_MEMORY,
    IterationTimer,
    describe_machine,
    peak_memory,
    timed,
)
from workflow_scripts.distil_baseline import distil
from workflow_scripts.job import Job, run
from workflow_scripts.plain_tables import read_rows, write_table
from workflow_scripts.real_images import (
    in_order,
    leave_cores_to_decoding,
    load_teacher,
    open_images,
)
from workflow_scripts.recover_images import build_shard, recover

PUBLISHED = Path(__file__).resolve().parent.parent / "report/published_efficiency.csv"

WARM_UP = 5
"""Iterations before the clock counts."""


@dataclass(frozen=True)
class Measured:
    """Seconds of consecutive steps, the peak of memory in bytes and of what, the machine, the precision."""

    seconds: list[float]
    peak: int
    memory: str
    machine: str
    precision: str


def measure_method(job: Job, method: str) -> Measured:
    """Time `iterations` consecutive iterations of a method on one image per class."""
    settings = dict(job.settings["methods"][method])
    settings["iterations"] = WARM_UP + job.settings["iterations"]
    device = job.device
    timer = IterationTimer(WARM_UP, device)
    (run_recovery if settings["kind"] == "recover" else run_baseline)(job, settings, timer)
    return measured_on(device, job, timer.seconds)


def measured_on(device: torch.device, job: Job, seconds: list[float]) -> Measured:
    """`seconds` with what this process held and computed on."""
    return Measured(
        seconds, *peak_memory(device), describe_machine(device), precision_name(job.settings, device)
    )


def run_recovery(job: Job, settings: dict, timer: IterationTimer) -> None:
    """WMDD, SRe2L and every other method of the recovery loop, as `recover_images` runs it."""
    settings.pop("kind")
    description, (teacher, _) = job.description(), load_teacher(job.input["teacher"], timer.device)
    classes = list(range(len(description["classes"])))
    shard, _ = build_shard(job, settings, classes, [0], "one_per_class")
    names = (job.settings["seed"], job.settings["dataset"])
    recover(job, description, teacher, shard, settings, names, timer)


def run_baseline(job: Job, settings: dict, timer: IterationTimer) -> None:
    """DM or DC as `distil_baseline` runs it, but with the teacher's network."""
    kind, description = settings.pop("kind"), job.description()
    if kind == "dc":
        settings["outer_loops"], settings["inner_steps"] = DC_LOOPS[1]
    network = load_teacher(job.input["teacher"], torch.device("cpu"))[1]["network"]
    store, names = open_images(job, description, "train"), (job.settings["seed"], job.settings["dataset"])
    distil(kind, settings, description, store, 1, network, names, timer.device, timer)


def measure_preparation(job: Job) -> Measured:
    """Time what precedes recovery, in seconds: features with BatchNorm statistics, then barycenters."""
    description, device = job.description(), job.device
    store = open_images(job, description, "train")
    workers = 1
    if not job.input.get("train"):  # read from files, as `extract_features` does
        leave_cores_to_decoding(device)
        workers = job.threads
    teacher, _ = load_teacher(job.input["teacher"], device)
    classes = len(description["classes"])
    features = np.empty((len(store), teacher.classifier.in_features), np.float32)

    def extract() -> None:
        def batches(start: int):
            return in_order(store, description, device, start, workers)

        extract_features(freeze(teacher), batches, features, classes).statistics()

    def compute() -> None:
        seed, dataset = job.settings["seed"], job.settings["dataset"]
        for c in range(classes):
            points = features[store.labels == c].astype(np.float64)
            generator = numpy_generator(seed, dataset, "barycenter", c, 1)
            wasserstein_barycenter(points, 1, generator=generator, **job.settings["barycenter"])

    seconds = [timed(extract, device)[1], timed(compute)[1] if job.settings["barycenter"] else 0.0]
    return measured_on(device, job, seconds)


def alone(name: str, call: Callable[..., Measured], *arguments: object) -> Measured:
    """`call(*arguments)` in a fresh process, whose memory is kept as a job's is."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=keep_freed_memory) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            raise UserError(
                f"the process that measured {name} ran out of memory or was killed; take {name} off the"
                " list of methods, or measure on a larger machine"
            ) from error


# ---- the table -------------------------------------------------------------------------------


def preparation_seconds(settings: Mapping, preparation: Measured) -> float:
    """What a method needs before its first iteration: features or their statistics, and barycenters."""
    features, barycenters = preparation.seconds
    if settings["kind"] != "recover":
        return 0.0
    if settings["feature_term"] == "barycenter":
        return features + barycenters
    embedded = settings["feature_term"] in SET_TERMS or settings["bn_term"] in MEASURED_BN_TERMS
    return features if embedded else 0.0


def build_row(job: Job, method: str, measured: Measured, before: float, published: Mapping) -> dict[str, str]:
    """One line of the CSV."""
    mean, sd = mean_and_sd(measured.seconds)
    projected = job.settings["projected_iterations"]
    row = {
        "method": job.settings["labels"][method],
        "entry": method,
        "dataset": job.settings["dataset"],
        "iterations_timed": str(len(measured.seconds)),
        "seconds_per_iteration_mean": f"{mean:.6f}",
        "seconds_per_iteration_sd": "" if sd is None else f"{sd:.6f}",
        "peak_memory_gib": f"{measured.peak / 2**30:.3f}",
        "memory": measured.memory,
        "preparation_seconds": f"{before:.2f}",
        "iterations_projected": str(projected),
        "total_seconds": f"{before + mean * projected:.2f}",
    }
    for key in ("seconds_mean", "seconds_sd", "peak_gb", "total_seconds", "source"):
        row[f"published_{key}"] = published.get(method, {}).get(key, "")
    return {**row, "machine": measured.machine}


def build_shown(rows: list[dict[str, str]]) -> list[list[str]]:
    """The table for people, the published figures in parentheses."""

    def beside(text: str, published: str) -> str:
        return f"{text} ({published})" if published else text

    shown = [["Method", "Time per iteration (s)", "Peak memory (GiB)", "Total time (s)"]]
    for row in rows:
        sd = row["seconds_per_iteration_sd"]
        time = format_mean_sd(float(row["seconds_per_iteration_mean"]), float(sd) if sd else None, 4)
        theirs = f"{row['published_seconds_mean']} ± {row['published_seconds_sd']}"
        shown.append(
            [
                row["method"],
                beside(time, theirs if row["published_seconds_mean"] else ""),
                beside(f"{float(row['peak_memory_gib']):.2f}", row["published_peak_gb"]),
                beside(f"{float(row['total_seconds']):.1f}", row["published_total_seconds"]),
            ]
        )
    return shown


def describe(
    job: Job, rows: list[dict[str, str]], preparation: Measured, network: Mapping, load: float
) -> list[str]:
    """What was measured, on what, and what stands in parentheses."""
    features, barycenters = preparation.seconds
    peak, settings = preparation.peak / 2**30, job.settings
    on_gpu, half = rows[0]["memory"] == DEVICE_MEMORY, preparation.precision == "bfloat16"
    notes = [
        f"Time to update one image per class by one iteration on {settings['dataset_title']}, mean ± sample"
        f" standard deviation over {rows[0]['iterations_timed']} consecutive iterations after {WARM_UP} of"
        f" warm-up. All methods optimise at {network['resolution']} pixels with the teacher's network"
        f" ({network['architecture']}); DC and DM draw it anew in each iteration"
        + (
            " and compute in float32, the others use the trained one in bfloat16."
            if half
            else ", the others use the trained one."
        )
        + (
            " On a GPU those of them without real features in each step replay CUDA graphs." if on_gpu else ""
        ),
        f"Peak memory: {rows[0]['memory']}, a process for each method"
        + (", libraries included." if rows[0]["memory"] == RESIDENT_MEMORY else "."),
        f"Total time: {settings['projected_iterations']} iterations, projected from the mean; for methods"
        f" that need them with the real features ({features:.1f} s, peak {peak:.2f} GiB) and, for"
        f" barycenters, their computation ({barycenters:.2f} s). Training the teacher, which keeps global"
        " BatchNorm statistics, is not included.",
        f"Measured with no other job of this workflow beside it on {rows[0]['machine']}; the load average was"
        f" {load:.1f} at the start.",
    ]
    if any(r["published_source"] for r in rows):
        notes.append(
            "In parentheses: the published figures, in GB, for ImageNette at its original resolution with a"
            " ResNet-18 on an RTX-3090 (WMDD paper, Table 7). Its totals are more than 2,000 iterations take;"
            " what else they hold is not stated."
        )
    return notes


def main(job: Job) -> None:
    methods = {name: job.settings["methods"][name] for name in job.settings["order"]}
    published = {row["method"]: row for row in read_rows(PUBLISHED)}
    description = job.description()
    _, teacher_header = load_teacher(job.input["teacher"], torch.device("cpu"))
    header = job.header([description["header"], teacher_header])

    load = os.getloadavg()[0]
    preparation = alone("the preparation", measure_preparation, job)
    rows = []
    for method, settings in methods.items():
        measured = alone(method, measure_method, job, method)
        before = preparation_seconds(settings, preparation)
        rows.append(build_row(job, method, measured, before, published))
        print(f"{method}: {rows[-1]['seconds_per_iteration_mean']} s an iteration", flush=True)

    versions = ", ".join(f"{k} {v}" for k, v in sorted(header["versions"].items()))
    notes = describe(job, rows, preparation, teacher_header["network"], load)
    origin = f"Commit {header['commit']}; {versions}."
    write_table(job.output, rows, build_shown(rows), job.settings["title"], [*notes, origin])


if __name__ == "__main__":
    run(main)
