"""t-SNE maps of real and distilled images (Fig. 6, App. G), a panel for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workflow_scripts.drawing import arranged, class_titles, names_of, new_figure, save
from workflow_scripts.job import Job, run

# Tol's muted colours and black: ten that colour-blind readers can tell apart.
CLASS_COLOURS = (
    "#332288",
    "#88ccee",
    "#cc6677",
    "#117733",
    "#ddcc77",
    "#882255",
    "#44aa99",
    "#222222",
    "#aa4499",
    "#999933",
)


def draw(points: pd.DataFrame, labels: Mapping[str, str], classes: Sequence[str]) -> Figure:
    """A map for each method, left to right, each as large as its panel: a map's own scale says nothing.

    `classes` are the shown ones' titles.
    """
    methods, numbers = list(dict.fromkeys(points.method)), sorted(points["class"].unique())
    colours = dict(zip(numbers, CLASS_COLOURS, strict=False))
    names = names_of(methods, labels)
    figure = new_figure(3.4 * len(methods) + 0.4 + 0.075 * max(9, *map(len, classes)), 3.75)
    grid = figure.subplots(1, len(methods), squeeze=False)[0]
    for axes, method in zip(grid, methods, strict=True):
        draw_map(axes, points[points.method == method], colours)
        axes.set_title(names[method], loc="left")
    for axes in grid:
        axes.set_box_aspect(1)
        axes.set(xticks=[], yticks=[])
        axes.spines[["top", "right"]].set_visible(True)
    kinds = [
        Line2D([], [], linestyle="", color="#555555", marker="o", markersize=3.5, label="real"),
        Line2D([], [], linestyle="", color="#555555", marker="^", markersize=5.5, label="distilled"),
    ]
    handles = [
        Line2D([], [], linestyle="", color=colours[c], marker="s", label=t)
        for c, t in zip(numbers, classes, strict=True)
    ]
    figure.legend(handles=[*kinds, *handles], loc="outside right upper", handletextpad=0.2)
    return figure


def draw_map(axes: Axes, points: pd.DataFrame, colours: Mapping[int, str]) -> None:
    extent = 1.06 * max(points.x.abs().max(), points.y.abs().max())
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent))
    real, distilled = (points[points.kind == k] for k in ("real", "distilled"))
    axes.scatter(real.x, real.y, s=7, c=real["class"].map(colours), alpha=0.45, linewidths=0)
    axes.scatter(
        distilled.x,
        distilled.y,
        s=30,
        c=distilled["class"].map(colours),
        marker="^",
        edgecolors="black",
        linewidths=0.7,
        zorder=3,
    )


def main(job: Job) -> None:
    points = arranged(
        pd.read_csv(job.input["points"], converters={"method": str}), method=job.settings["methods"]
    )
    titles = class_titles(job.description(), sorted(points["class"].unique()))
    save(draw(points, job.settings["labels"], titles), job.output)


if __name__ == "__main__":
    run(main)
