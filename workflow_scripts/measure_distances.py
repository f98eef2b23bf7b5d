"""Distances between real and distilled features, class by class, and the bound of Appendix B on a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from wmdd_core.artifacts import read_array, read_json, write_csv
from wmdd_core.discrepancies import exact_wasserstein, measure_lipschitz_bound, mmd_linear, mmd_rbf
from wmdd_core.metrics import cross_entropy_lipschitz, mean_squared_distance
from wmdd_core.models import Classifier, freeze
from wmdd_core.relabeling import ViewSettings
from wmdd_core.terms import MEAN
from workflow_scripts.checks import check_lineage, check_place
from workflow_scripts.distilled_sets import (
    DistilledSet,
    check_artefact,
    embed_images,
    read_distilled_sets,
    real_of_class,
)
from workflow_scripts.evaluate_student import train_student
from workflow_scripts.job import Job, listed, run
from workflow_scripts.real_images import load_teacher, open_images

Embedding = tuple[Classifier, Tensor, Callable[[int], Tensor]]
"""A network, its features of a distilled set, and its features of a class's real images."""

STUDENT_SEED = "0"
"""The student whose loss is measured: the first of those that the accuracy tables average over."""


# ---- numbers ---------------------------------------------------------------------------------


def distances(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, float]:
    """W₂ (exact), linear MMD and RBF MMD, none squared, between real x (N, D) and distilled y (M, D).

    `weights` (M,) are y's. The RBF kernel's bandwidth comes from the real features alone, so that
    methods are measured with one kernel; W₁ is measured with the bound.
    """
    bandwidth = max(mean_squared_distance(x.numpy()), 1e-30) if len(x) > 1 else None
    return {
        "w2": exact_wasserstein(x, y, None, weights, p=2),
        "mmd_linear": math.sqrt(max(0.0, float(mmd_linear(x, y, None, weights)))),
        "mmd_rbf": math.sqrt(max(0.0, float(mmd_rbf(x, y, None, weights, bandwidth=bandwidth)))),
    }


def loss_values(network: Classifier, features: Tensor, c: int) -> Tensor:
    """g at each row of `features` (N, D): the network's cross-entropy for class c, float64 (N,)."""
    weight, bias = (p.detach().double().cpu() for p in (network.classifier.weight, network.classifier.bias))
    labels = torch.full((len(features),), c)
    return F.cross_entropy(F.linear(features, weight, bias), labels, reduction="none")


def both_sides(network: Classifier, x: Tensor, y: Tensor, weights: Tensor, c: int) -> dict[str, float]:
    """|E_P g − E_Q g| and L·W₁ (Appendix B, eq. 20) for g the network's loss as a function of its features.

    P: real features x (N, D) of class c; Q: distilled y (M, D) with `weights` (M,). L in closed form
    (`cross_entropy_lipschitz`), and as the largest slope between any two of these features.
    """
    values_x, values_y = loss_values(network, x, c), loss_values(network, y, c)
    measured = measure_lipschitz_bound(values_x, values_y, x, y, None, weights)
    lipschitz = cross_entropy_lipschitz(network.classifier.weight.detach().double().cpu().numpy(), c)
    return {
        "w1": measured.w1,
        "difference": measured.expected_difference,
        "lipschitz_estimate": measured.lipschitz,
        "bound_estimate": measured.bound,
        "lipschitz": lipschitz,
        "bound": lipschitz * measured.w1,
    }


def with_means(rows: Sequence[dict]) -> pd.DataFrame:
    """The lines, and after those of each method and size one with their mean over classes."""
    table, place, parts = pd.DataFrame(rows), ["ipc", "method"], []
    for _, own in table.groupby(place, sort=False):
        mean = own.drop(columns="class").groupby(place, as_index=False).mean()
        parts += [own, mean.assign(**{"class": MEAN})]
    return pd.concat(parts, ignore_index=True)[table.columns]


def soft_labels_of(job: Job, sets: Sequence[DistilledSet]) -> list[str | None]:
    """The file of each set's soft labels, checked to be this configuration's; None for hard labels."""
    if "labels" not in job.input:
        return [None] * len(sets)
    views = ViewSettings(**job.settings["views"])
    for path, own in zip(listed(job.input["labels_header"]), sets, strict=True):
        labelled = read_json(path)
        check_place(path, labelled["header"], {"method": own.method, "ipc": own.ipc})
        check_lineage(path, labelled["header"], job.settings["expected"])
        views.check(labelled["views"], len(own.images), own.images.shape[-1], path)
    return listed(job.input["labels"])


# ---- the job ---------------------------------------------------------------------------------


def measure_set(own: DistilledSet, networks: Mapping[str, Embedding], classes: int) -> list[dict]:
    """A line for each class: distances in the teacher's features, both sides of the bound for each network.

    networks: name → network, its features (M, D) of the set's images, and class → those (n, D) of real ones.
    """
    lines = []
    for c in range(classes):
        rows = own.rows(c)
        weights = own.weights[rows].double()
        line = {"method": own.method, "ipc": int(own.ipc), "class": str(c)}
        for name, (network, features, real) in networks.items():
            x, y = real(c), features[rows]
            sides = both_sides(network, x, y, weights, c)
            if name == "teacher":
                line |= {"w1": sides.pop("w1"), **distances(x, y, weights)}
            line |= {f"{name}_{key}": value for key, value in sides.items()}
        lines.append(line)
    return lines


def main(job: Job) -> None:
    device, description = job.device, job.description()
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    index = read_json(job.input["index"])
    check_artefact(job, description, job.input["teacher"], teacher_header)
    check_artefact(job, description, job.input["index"], index["header"])
    features, offsets = read_array(job.input["features"]), index["offsets"]
    store = open_images(job, description, "train") if "student" in job.settings else None
    sets = read_distilled_sets(job, description)
    freeze(teacher)

    def stored(c: int) -> Tensor:
        return torch.from_numpy(np.array(features[offsets[c] : offsets[c + 1]])).double()

    lines, progresses = [], []
    for own, labels in zip(sets, soft_labels_of(job, sets), strict=True):
        networks = {"teacher": (teacher, embed_images(teacher, own.images, description, device), stored)}
        if store is not None:
            headers = [description["header"], own.header]
            progresses.append(job.progress(headers, method=own.method, ipc=own.ipc))
            student, _ = train_student(
                job.settings, vars(own), labels, description, STUDENT_SEED, device, progresses[-1]
            )
            freeze(student)

            def real(c: int, student: Classifier = student) -> Tensor:
                return embed_images(student, real_of_class(store, c), description, device)

            networks["student"] = (student, embed_images(student, own.images, description, device), real)
        lines += measure_set(own, networks, len(description["classes"]))
    table = with_means(lines)
    write_csv(job.output["csv"], table, "%.6g")
    for progress in progresses:
        progress.finish()


if __name__ == "__main__":
    run(main)
