"""What each distilled set costs and what it is worth: bytes, seconds, accuracy with soft and hard labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from wmdd_core.metrics import format_mean_sd, mean_and_sd
from workflow_scripts.job import Job, listed, run
from workflow_scripts.plain_tables import write_table
from workflow_scripts.tabulate_accuracy import provenance, read_cells, tested_on

STEPS = ("barycenters", "recovery", "relabel", "training")
"""Steps whose seconds are read from benchmark files."""


def bytes_of(path: str) -> int | None:
    """Size of a file, or of all files below a folder; None where there is nothing."""
    if not os.path.exists(path):
        return None
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def seconds_of(pattern: str, parts: int | Iterable[str]) -> float | None:
    """Summed seconds of benchmark files, None unless all of them are there and whole.

    `parts` are what stands for {} in `pattern`, or how many numbers do.
    """
    total = 0.0
    for part in range(parts) if isinstance(parts, int) else parts:
        path = pattern.format(part)
        if not os.path.exists(path):
            return None
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        try:
            total += sum(float(row["s"]) for row in rows) if rows else float("nan")
        except (KeyError, TypeError, ValueError):
            return None
    return total if total == total else None


def build_row(
    cell: Mapping, sizes: Mapping[str, int | None], accuracy: Mapping[str, list[dict]]
) -> dict[str, str]:
    """One line of the CSV; an empty field is missing, never zero."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    seconds = {step: seconds_of(*cell["benchmarks"][step]) for step in STEPS if step in cell["benchmarks"]}
    if seconds["training"] is not None:  # of one student
        seconds["training"] /= cell["seeds"]
    row = {key: cell[key] for key in ("method", "dataset", "ipc", "student")}
    row |= {f"{name}_bytes": text(size, "d") for name, size in sizes.items()}
    row |= {f"{step}_seconds": text(seconds.get(step), ".2f") for step in STEPS}
    for labels, found in accuracy.items():
        mean, sd = mean_and_sd([e["top1"] for e in found]) if found else (None, None)
        row[f"top1_{labels}_n"] = str(len(found))
        row[f"top1_{labels}_mean"], row[f"top1_{labels}_sd"] = text(mean, ".4f"), text(sd, ".4f")
    return row


# ---- for people ------------------------------------------------------------------------------


def size_text(size: str) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    if not size:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if int(size) >= scale:
            return f"{int(size) / scale:.1f} {unit}"
    return f"{int(size) / 1e3:.1f} kB"


def build_shown(rows: list[dict[str, str]], labels: Mapping) -> list[list[str]]:
    """The table for people; the dataset is named where there are several."""
    several = len({r["dataset"] for r in rows}) > 1
    steps = {
        "barycenters": "Barycenters",
        "recovery": "Recovery",
        "relabel": "Relabelling",
        "training": "Training",
    }
    shown = [
        [
            *(["Dataset"] if several else []),
            *("IPC", "Method", "Images", "Images as PNG", "Soft labels"),
            *(f"{step} (s)" for step in steps.values()),
            *("Top-1, soft labels (%)", "Top-1, hard labels (%)"),
        ]
    ]
    for row in rows:
        accuracy = [
            format_mean_sd(float(row[f"top1_{k}_mean"]), float(sd) if (sd := row[f"top1_{k}_sd"]) else None)
            if row[f"top1_{k}_mean"]
            else ""
            for k in ("soft", "hard")
        ]
        shown.append(
            [
                *([labels["datasets"][row["dataset"]]] if several else []),
                row["ipc"],
                labels["methods"][row["method"]],
                *(size_text(row[f"{k}_bytes"]) for k in ("image", "png", "label")),
                *(f"{float(s):.1f}" if (s := row[f"{k}_seconds"]) else "" for k in steps),
                *accuracy,
            ]
        )
    return shown


def describe(settings: Mapping, rows: list[dict[str, str]]) -> str:
    """What the columns are."""
    soft, hard = settings["recipes"]["soft"], settings["recipes"]["hard"]
    return (
        "Images: uint8 pixels, labels and weights of the whole set in one file, and the same pixels as a"
        " folder of PNG. Soft labels: the teacher's float16 logits on every view of every image. Seconds: run"
        " time of the jobs on the machine that ran them, their start included, summed over shards and"
        " classes, training for one student; of an interrupted job the time of its last part. Barycenters: of"
        f" methods that match them. Accuracy: top-1 on {tested_on(rows, settings['labels'])}, mean ± sample"
        f" standard deviation over students, with the recipes {soft} (soft labels) and {hard} (hard labels)."
        " IPC: images per class. –: not measured, or not part of the method."
    )


def main(job: Job) -> None:
    settings, cells = job.settings, job.settings["cells"]
    accuracy = {
        labels: read_cells(
            listed(job.input[labels]),
            [{**cell, "recipe": recipe} for cell in cells],
            settings["expected"][labels],
        )
        for labels, recipe in settings["recipes"].items()
    }
    sizes = {"image": "images", "png": "png", "label": "labels"}
    files = {name: listed(job.input[key]) for name, key in sizes.items()}
    rows = [
        build_row(
            cell,
            {name: bytes_of(paths[n]) for name, paths in files.items()},
            {labels: accuracy[labels][n] for labels in ("soft", "hard")},
        )
        for n, cell in enumerate(cells)
    ]
    evaluations = [e for found in accuracy.values() for cell in found for e in cell]
    notes = [describe(settings, rows), provenance(evaluations)]
    write_table(job.output, rows, build_shown(rows, settings["labels"]), settings["title"], notes)
    print(f"{len(rows)} sets")


if __name__ == "__main__":
    run(main)
