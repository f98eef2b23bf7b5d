"""Accuracy over images per class: a line for each method, the ceiling, the published figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from wmdd_core.artifacts import write_csv
from wmdd_core.terms import tell_apart
from workflow_scripts.checks import ALL
from workflow_scripts.drawing import line_styles, names_of, new_figure, save
from workflow_scripts.job import Job, run
from workflow_scripts.plain_tables import Row, read_rows

DRAWN = ["dataset", "student", "recipe", "method", "ipc", "n_seeds", "top1_mean", "top1_sd", "published_top1"]
PANELS_ABREAST = 3

MARGIN, DODGE = 1.5, 0.01
"""Room beside the first and last tick, as a factor; distance of two methods, as a share of the axis."""

CEILING = (0, (5, 2))


def select(rows: Sequence[Row], figure: Mapping) -> list[Row]:
    """The table's lines that the figure draws: those of its student and recipe, if it names them."""
    chosen = list(rows)
    for key in ("student", "recipe"):
        if key in figure:
            chosen = [r for r in chosen if r[key] == figure[key] or (key == "recipe" and r["ipc"] == ALL)]
    return chosen


def panels(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """(dataset, student, recipe) → its lines, the ceiling of that student among them."""
    places = dict.fromkeys((r["dataset"], r["student"], r["recipe"]) for r in rows if r["ipc"] != ALL)
    return [
        (
            p,
            [
                r
                for r in rows
                if (r["dataset"], r["student"]) == p[:2] and (r["recipe"] == p[2] or r["ipc"] == ALL)
            ],
        )
        for p in places
    ]


def number(text: str) -> float:
    """A number, or NaN for an empty field: a line has a gap there."""
    return float(text) if text else float("nan")


def draw_panel(axes: Axes, rows: Sequence[Row], styles: Mapping[str, Mapping]) -> None:
    """Lines with deviations, hollow markers for published figures, dashes for the ceiling."""
    ticks = sorted({int(r["ipc"]) for r in rows if r["ipc"] != ALL})
    left, right = ticks[0] / MARGIN, ticks[-1] * MARGIN
    for row in (r for r in rows if r["ipc"] == ALL and r["top1_mean"]):
        colour, mean, sd = (
            styles[row["method"]]["color"],
            number(row["top1_mean"]),
            float(row["top1_sd"] or 0),
        )
        axes.axhspan(mean - sd, mean + sd, color=colour, alpha=0.1, linewidth=0)
        axes.axhline(mean, color=colour, linestyle=CEILING, linewidth=1.2)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["ipc"] != ALL))
    for place, method in enumerate(methods):
        style = styles[method]
        own = sorted(
            (r for r in rows if r["method"] == method and r["ipc"] != ALL), key=lambda r: int(r["ipc"])
        )
        # Side by side by a little, or equal accuracies would hide each other.
        shift = (right / left) ** (DODGE * (place - (len(methods) - 1) / 2))
        x, y = [int(r["ipc"]) * shift for r in own], [number(r["top1_mean"]) for r in own]
        axes.errorbar(x, y, yerr=[float(r["top1_sd"] or 0) for r in own], capsize=2.5, elinewidth=1, **style)
        published = [number(r["published_top1"]) for r in own]
        hollow = {"marker": style["marker"], "markerfacecolor": "white", "color": style["color"]}
        axes.plot(x, published, linestyle="", **hollow)
    if not any(r["top1_mean"] for r in rows):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def legend_handles(rows: Sequence[Row], names: Mapping[str, str], styles: Mapping) -> list[Line2D]:
    """One entry for each method, and one for the hollow markers if there are published figures."""
    handles = []
    for method in dict.fromkeys(r["method"] for r in rows):
        ceiling = all(r["ipc"] == ALL for r in rows if r["method"] == method)
        style = {"color": styles[method]["color"], "linestyle": CEILING} if ceiling else styles[method]
        handles.append(Line2D([], [], label=names[method], **style))
    if any(r["published_top1"] for r in rows if r["ipc"] != ALL):
        hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": "", "color": "#444444"}
        handles.append(Line2D([], [], label="published", **hollow))
    return handles


def panel_titles(places: Sequence[Sequence[str]], labels: Mapping) -> list[str]:
    """What tells each panel from the others: dataset, student, recipe, of which some are alike in all."""
    read = [
        tell_apart({name: labels.get(block, {}).get(name, name) for name in dict.fromkeys(names)})
        for block, names in zip(("datasets", "students", "recipes"), zip(*places, strict=True), strict=True)
    ]
    several = [len(names) > 1 for names in read]
    shown = several if any(several) else (True, False, False)
    parts = ([names[n] for names, n in zip(read, place, strict=True)] for place in places)
    return [", ".join(itertools.compress(told, shown)) for told in parts]


def draw(rows: Sequence[Row], labels: Mapping) -> Figure:
    """The figure: a panel for each dataset, and for each student and recipe where there are several."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    styles, found = line_styles(methods), panels(rows)
    names = names_of(methods, labels.get("methods", {}))
    titles = panel_titles([place for place, _ in found], labels)
    across = 2 if len(found) == 4 else min(len(found), PANELS_ABREAST)
    down = -(-len(found) // across)
    handles = legend_handles(rows, names, styles)
    width = 3.4 * across
    columns = min(len(handles), int(width / (0.55 + 0.068 * max(len(h.get_label()) for h in handles))))
    below = 0.2 * -(-len(handles) // columns) if across > 1 else 0
    figure = new_figure(width if across > 1 else 6.0, 2.9 * down + below)
    grid = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(found):
            axes.set_axis_off()
            continue
        draw_panel(axes, found[index][1], styles)
        axes.set_title(titles[index], loc="left")
        axes.set_xlabel("Images per class")
        if index % across == 0:
            axes.set_ylabel("Top-1 accuracy (%)")
    if across > 1:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.04)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.6)
    else:
        figure.legend(handles=handles, loc="outside right upper", handlelength=2.6)
    return figure


def main(job: Job) -> None:
    rows = select(read_rows(job.input["table"]), job.settings["figure"])
    save(draw(rows, job.settings["labels"]), job.output)
    write_csv(job.output["csv"], pd.DataFrame(rows)[DRAWN])


if __name__ == "__main__":
    run(main)
