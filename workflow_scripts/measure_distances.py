"""Distances between real and distilled features, class by class, and the bound of Appendix B on a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from wmdd_core.artifacts import read_json, write_text
from wmdd_core.discrepancies import exact_wasserstein, measure_lipschitz_bound, mmd_linear, mmd_rbf
from wmdd_core.metrics import cross_entropy_lipschitz, mean_squared_distance
from wmdd_core.models import Classifier, freeze
from workflow_scripts.distilled_sets import (
    DistilledSet,
    check_artefact,
    embed_images,
    read_distilled_sets,
    real_of_class,
)
from workflow_scripts.drawing import line_styles, new_figure, save
from workflow_scripts.evaluate_student import train_student
from workflow_scripts.job import Job, listed, run
from workflow_scripts.plot_accuracy import names_of
from workflow_scripts.real_images import load_teacher, open_images
from workflow_scripts.tabulate_accuracy import check_lineage, check_place

Embedding = tuple[Classifier, Tensor, Callable[[int], Tensor]]
"""A network, its features of a distilled set, and its features of a class's real images."""

STUDENT_SEED = "0"
"""The student whose loss is measured: the first of those that the accuracy tables average over."""

MEAN = "mean"
"""In the place of a class: the mean over classes."""

METRICS = {"w1": "W₁", "w2": "W₂", "mmd_linear": "MMD, linear", "mmd_rbf": "MMD, RBF"}
MARKERS = dict(zip(METRICS, ("o", "s", "^", "D"), strict=True))
SIDES = {
    "difference": ("measured $|E_P\\,g - E_Q\\,g|$", "o"),
    "bound_estimate": ("L·W₁, L the largest slope seen", "|"),
    "bound": ("L·W₁, L in closed form", ">"),
}


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
    table = pd.DataFrame(rows)
    means = table.drop(columns="class").groupby(["ipc", "method"], sort=False, as_index=False).mean()
    parts = []
    for place, own in table.groupby(["ipc", "method"], sort=False):
        mean = means[(means.ipc == place[0]) & (means.method == place[1])]
        parts += [own, mean.assign(**{"class": MEAN})]
    return pd.concat(parts)[table.columns].reset_index(drop=True)


def soft_labels_of(job: Job, sets: Sequence[DistilledSet]) -> list[str | None]:
    """The file of each set's soft labels, checked to be this configuration's; None for hard labels."""
    if "labels" not in job.input:
        return [None] * len(sets)
    for path, own in zip(listed(job.input["labels_header"]), sets, strict=True):
        header = read_json(path)["header"]
        check_place(path, header, {"method": own.method, "ipc": own.ipc})
        check_lineage(path, header, job.settings["expected"])
    return listed(job.input["labels"])


# ---- the figure ------------------------------------------------------------------------------


def draw(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """A row of panels for each size: distances relative to the first method, and both sides of the bound."""
    table = table[table["class"] == MEAN]
    methods, sizes = list(dict.fromkeys(table.method)), list(dict.fromkeys(table.ipc))
    losses = [n for n in ("teacher", "student") if f"{n}_bound" in table]
    names, styles = names_of(methods, labels), line_styles(methods)
    height = 0.27 * len(methods) + 0.75
    figure = new_figure(3.3 + 2.75 * len(losses), height * len(sizes) + 0.55)
    grid = figure.subplots(len(sizes), 1 + len(losses), sharey=True, sharex="col", squeeze=False)
    for row, ipc in zip(grid, sizes, strict=True):
        own = table[table.ipc == ipc].set_index("method")
        size = f", {ipc} image{'s' * (ipc != 1)} per class" if len(sizes) > 1 else ""
        first = own.loc[methods[0]]
        draw_distances(row[0], own, first, styles)
        row[0].set_title(f"Distance to real features{size}", loc="left", fontsize=9)
        for axes, network in zip(row[1:], losses, strict=True):
            draw_bound(axes, own, network, styles)
            axes.set_title(f"Bound on the {network}'s loss", loc="left", fontsize=9)
        row[0].set_yticks(range(len(methods)), [names[m] for m in methods])
        row[0].set_ylim(len(methods) - 0.5, -0.5)
    grid[-1][0].set_xlabel(f"relative to {names[methods[0]]}")
    for axes in grid[-1][1:]:
        axes.set_xlabel("cross-entropy")
    grey = {"color": "#555555", "linestyle": ""}
    marks = [Line2D([], [], marker=MARKERS[m], label=t, **grey) for m, t in METRICS.items()]
    sides = [Line2D([], [], marker=m, label=t, markeredgewidth=1.6, **grey) for t, m in SIDES.values()]
    figure.legend(handles=[*marks, *sides], loc="outside lower center", ncols=4, handlelength=1, fontsize=8)
    return figure


def draw_distances(axes: Axes, own: pd.DataFrame, first: pd.Series, styles: Mapping) -> None:
    for metric, marker in MARKERS.items():
        for place, method in enumerate(own.index):
            shift = (list(MARKERS).index(metric) - 1.5) * 0.17
            ratio = own.loc[method, metric] / first[metric] if first[metric] else math.nan
            axes.plot(ratio, place + shift, marker=marker, color=styles[method]["color"], markersize=4)
    axes.axvline(1, color="#555555", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    plain_log(axes)


def draw_bound(axes: Axes, own: pd.DataFrame, network: str, styles: Mapping) -> None:
    for place, method in enumerate(own.index):
        colour = styles[method]["color"]
        at = {side: own.loc[method, f"{network}_{side}"] for side in SIDES}
        axes.plot([at["difference"], at["bound"]], [place, place], color=colour, linewidth=0.8, alpha=0.6)
        for side, (_, marker) in SIDES.items():
            axes.plot(at[side], place, marker=marker, color=colour, markeredgewidth=1.6)
    axes.set_xscale("log")
    axes.tick_params(axis="y", length=0)


def plain_log(axes: Axes) -> None:
    """Ticks 1, 2, 5 as plain numbers, where the range is short."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


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
    features, offsets = np.load(job.input["features"], mmap_mode="r"), index["offsets"]
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
    save(draw(table, job.settings["labels"]), job.output)
    write_text(job.output["csv"], table.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    for progress in progresses:
        progress.finish()


if __name__ == "__main__":
    run(main)
