"""Time and memory of DC, DM, SRe2L, WMDD and others in one harness: one image per class, one iteration.

Each method runs its own loop, with its own settings and the teacher's network, in a process of its own,
so that peaks of memory do not mix. What WMDD needs beforehand is measured in a further process.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import numpy as np
import torch

from wmdd_core.artifacts import write_json
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.baselines import DC_LOOPS
from wmdd_core.device import precision_name
from wmdd_core.errors import UserError
from wmdd_core.features import extract_features
from wmdd_core.memory import keep_freed_memory
from wmdd_core.metrics import mean_and_sd
from wmdd_core.models import freeze
from wmdd_core.seeding import numpy_generator
from wmdd_core.terms import MEASURED_BN_TERMS, SET_TERMS
from wmdd_core.timing import IterationTimer, describe_machine, peak_memory, timed
from workflow_scripts.distil_baseline import distil
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import (
    in_order,
    leave_cores_to_decoding,
    load_teacher,
    open_images,
)
from workflow_scripts.recover_images import build_shard, recover

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


def preparation_seconds(settings: Mapping, preparation: Measured) -> float:
    """What a method needs before its first iteration: features or their statistics, and barycenters."""
    features, barycenters = preparation.seconds
    if settings["kind"] != "recover":
        return 0.0
    if settings["feature_term"] == "barycenter":
        return features + barycenters
    embedded = settings["feature_term"] in SET_TERMS or settings["bn_term"] in MEASURED_BN_TERMS
    return features if embedded else 0.0


def main(job: Job) -> None:
    description, device = job.description(), torch.device("cpu")
    _, teacher_header = load_teacher(job.input["teacher"], device)
    load = os.getloadavg()[0]
    preparation = alone("the preparation", measure_preparation, job)
    methods = {}
    for method, settings in job.settings["methods"].items():
        measured = alone(method, measure_method, job, method)
        before = preparation_seconds(settings, preparation)
        methods[method] = {**asdict(measured), "preparation_seconds": before}
        print(f"{method}: {mean_and_sd(measured.seconds)[0]:.6f} s an iteration", flush=True)
    content = {
        "network": teacher_header["network"],
        "load": load,
        "warm_up": WARM_UP,
        "preparation": asdict(preparation),
        "methods": methods,
    }
    write_json(job.output["measured"], content, job.header([description["header"], teacher_header]))


if __name__ == "__main__":
    run(main)
