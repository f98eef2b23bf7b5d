"""Accuracy over a swept setting, for instance λ (Fig. 5): a line for each number of images per class."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from wmdd_core.artifacts import write_text
from wmdd_core.errors import UserError
from workflow_scripts.drawing import MARKERS, new_figure, save
from workflow_scripts.job import Job, run
from workflow_scripts.tabulate_accuracy import Row, read_rows

TITLES = {"lambda_bn": "λ, weight of the BatchNorm term"}
TONES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")


def swept_rows(rows: Sequence[Row], swept: Mapping) -> list[dict]:
    """The lines of the table whose method is a member of the sweep, with its value."""
    return [
        {**row, "value": float(swept[row["method"]]["value"])}
        for row in rows
        if row["method"] in swept and row["top1_mean"]
    ]


def draw(rows: Sequence[Mapping], others: Sequence[Row], key: str, labels: Mapping) -> Figure:
    """Lines with deviations over a logarithmic axis; a dotted line for each method that is not swept."""
    figure = new_figure(5.4, 3.2)
    axes = figure.subplots()
    sizes = sorted({int(r["ipc"]) for r in rows})
    for size, colour, marker in zip(sizes, TONES, MARKERS, strict=False):
        own = sorted((r for r in rows if int(r["ipc"]) == size), key=lambda r: r["value"])
        axes.errorbar(
            [r["value"] for r in own],
            [float(r["top1_mean"]) for r in own],
            yerr=[float(r["top1_sd"] or 0) for r in own],
            label=f"{size} image{'s' * (size > 1)} per class",
            color=colour,
            marker=marker,
            capsize=2.5,
            elinewidth=1,
        )
        for other in (o for o in others if o["ipc"] == str(size) and o["top1_mean"]):
            axes.axhline(float(other["top1_mean"]), color=colour, linestyle=":", linewidth=1.2)
            name = labels["methods"].get(other["method"], other["method"])
            axes.annotate(
                name, (1.01, float(other["top1_mean"])), xycoords=("axes fraction", "data"), va="center"
            )
    axes.set_xscale("log")
    axes.set_xlabel(TITLES.get(key, key))
    axes.set_ylabel("Top-1 accuracy (%)")
    axes.legend()
    return figure


def main(job: Job) -> None:
    figure, swept = job.settings["figure"], job.settings["swept"]
    rows = read_rows(job.input["table"])
    members = swept_rows(rows, swept)
    if not members:
        raise UserError(f"table {figure['table']} holds no member of a sweep; name a sweep among its methods")
    (key,) = {swept[r["method"]]["key"] for r in members}
    others = [r for r in rows if r["method"] not in swept]
    save(draw(members, others, key, job.settings["labels"]), job.output)
    text = io.StringIO()
    columns = ["dataset", "ipc", "method", "value", "n_seeds", "top1_mean", "top1_sd"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(members, key=lambda r: (r["dataset"], int(r["ipc"]), r["value"])))
    write_text(job.output["csv"], text.getvalue())


if __name__ == "__main__":
    run(main)
