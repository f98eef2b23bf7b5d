"""Distances between real and distilled features, and both sides of the bound of Appendix B, as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from wmdd_core.terms import MEAN
from workflow_scripts.drawing import arranged, line_styles, names_of, new_figure, save
from workflow_scripts.job import Job, run

METRICS = {"w1": "W₁", "w2": "W₂", "mmd_linear": "MMD, linear", "mmd_rbf": "MMD, RBF"}
MARKERS = dict(zip(METRICS, ("o", "s", "^", "D"), strict=True))
SIDES = {
    "difference": ("measured $|E_P\\,g - E_Q\\,g|$", "o"),
    "bound_estimate": ("L·W₁, L the largest slope seen", "|"),
    "bound": ("L·W₁, L in closed form", ">"),
}


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
    set_log_axis(axes)


def draw_bound(axes: Axes, own: pd.DataFrame, network: str, styles: Mapping) -> None:
    for place, method in enumerate(own.index):
        colour = styles[method]["color"]
        at = {side: own.loc[method, f"{network}_{side}"] for side in SIDES}
        axes.plot([at["difference"], at["bound"]], [place, place], color=colour, linewidth=0.8, alpha=0.6)
        for side, (_, marker) in SIDES.items():
            axes.plot(at[side], place, marker=marker, color=colour, markeredgewidth=1.6)
    set_log_axis(axes)
    axes.tick_params(axis="y", length=0)


def set_log_axis(axes: Axes) -> None:
    """A logarithmic axis; its ticks are powers of ten over a long range, plain numbers over a short one."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 100:
        short = high / low < 8
        axes.xaxis.set_major_locator(MaxNLocator(4) if short else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def main(job: Job) -> None:
    measured = pd.read_csv(job.input["csv"], converters={"method": str})  # a method may be called NA, or 10
    table = arranged(measured, method=job.settings["methods"], ipc=job.settings["ipc"])
    save(draw(table, job.settings["labels"]), job.output)


if __name__ == "__main__":
    run(main)
