"""Accuracy over a swept setting, for instance λ (Fig. 5): a line for each number of images per class."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wmdd_core.artifacts import write_csv
from workflow_scripts.checks import ALL
from workflow_scripts.drawing import DASHES, MARKERS, names_of, new_figure, save
from workflow_scripts.job import Job, run
from workflow_scripts.plain_tables import Row, read_rows, symbol
from workflow_scripts.plot_accuracy import PANELS_ABREAST, panel_titles, panels, select

DRAWN = ["dataset", "student", "recipe", "ipc", "method", "value", "n_seeds", "top1_mean", "top1_sd"]
TITLES = {"lambda_bn": "λ, weight of the BatchNorm term"}
TONES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def swept_rows(rows: Sequence[Row], swept: Mapping) -> list[dict]:
    """The lines of the table whose method is a member of a sweep, with the sweep's entry and the value."""
    found = []
    for row in rows:
        if row["method"] not in swept or row["ipc"] == ALL or not row["top1_mean"]:
            continue  # students of all real images have no number of images per class to be drawn by
        member = swept[row["method"]]
        found.append({**row, "entry": member["entry"], "value": float(member["value"])})
    return found


def styles_of(names: Iterable, styles: Sequence) -> dict:
    """name → its style, from the first again where there are more names."""
    return dict(zip(names, itertools.cycle(styles), strict=False))


def draw_panel(
    axes: Axes,
    rows: Sequence[Mapping],
    others: Sequence[Row],
    tones: Mapping,
    dashes: Mapping,
    names: Mapping,
) -> None:
    """A line with deviations for each sweep and size; a dotted one for each method that is not swept."""
    for size, (colour, marker) in tones.items():
        for entry in dashes:
            own = [r for r in rows if int(r["ipc"]) == size and r["entry"] == entry]
            if not own:
                continue
            own.sort(key=lambda r: r["value"])
            name = f"{names[entry]}, " if len(dashes) > 1 else ""
            axes.errorbar(
                [r["value"] for r in own],
                [float(r["top1_mean"]) for r in own],
                yerr=[float(r["top1_sd"] or 0) for r in own],
                label=f"{name}{size} image{'s' * (size > 1)} per class",
                color=colour,
                marker=marker,
                linestyle=dashes[entry],
                capsize=2.5,
                elinewidth=1,
            )
        for other in (o for o in others if o["ipc"] == str(size) and o["top1_mean"]):
            axes.axhline(float(other["top1_mean"]), color=colour, linestyle=":", linewidth=1.2)
            name = names[other["method"]] + (f", IPC {size}" if len(tones) > 1 else "")
            place = (1.01, float(other["top1_mean"]))
            axes.annotate(name, place, xycoords=("axes fraction", "data"), va="center")
    set_scale(axes, [r["value"] for r in rows])


def set_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis; where a value is not above 0, linear up to the smallest one beside 0."""
    if min(values) > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min((abs(v) for v in values if v), default=1), linscale=0.5)


def draw(rows: Sequence[Row], swept: Mapping, key: str, labels: Mapping) -> Figure:
    """The figure: a panel for each dataset, student and recipe over a logarithmic axis of setting `key`."""
    members, found = swept_rows(rows, swept), panels(rows)
    tones = styles_of(sorted({int(r["ipc"]) for r in members}), list(zip(TONES, MARKERS, strict=False)))
    dashes = styles_of(dict.fromkeys(r["entry"] for r in members), DASHES)
    read = {r["entry"]: labels["methods"].get(r["method"], r["entry"]) for r in members}
    unswept = {r["method"] for r in rows if r["method"] not in swept}
    names = names_of([*read, *unswept], {**labels["methods"], **read})
    across = min(len(found), PANELS_ABREAST)
    down = -(-len(found) // across)
    titles = panel_titles([place for place, _ in found], labels)
    figure = new_figure(5.4, 3.2) if len(found) == 1 else new_figure(4.2 * across, 3.0 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for number, (axes, (_, own)) in enumerate(zip(grid.flat, found, strict=False)):
        others = [r for r in own if r["method"] not in swept]
        draw_panel(axes, swept_rows(own, swept), others, tones, dashes, names)
        axes.legend()
        if len(found) > 1:
            axes.set_title(titles[number], loc="left")
        axes.set_xlabel(TITLES.get(key, symbol(key)))
        if number % across == 0:
            axes.set_ylabel("Top-1 accuracy (%)")
    return figure


def main(job: Job) -> None:
    rows, swept = select(read_rows(job.input["table"]), job.settings["figure"]), job.settings["swept"]
    save(draw(rows, swept, job.settings["key"], job.settings["labels"]), job.output)
    order = ("dataset", "student", "recipe", "entry")
    members = sorted(swept_rows(rows, swept), key=lambda r: (*map(r.get, order), int(r["ipc"]), r["value"]))
    write_csv(job.output["csv"], pd.DataFrame(members)[DRAWN])


if __name__ == "__main__":
    run(main)
