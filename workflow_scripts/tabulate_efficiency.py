"""Time and memory of methods as a table (Table 7), from what `measure_efficiency` measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wmdd_core.artifacts import read_json
from wmdd_core.machine import DEVICE_MEMORY, RESIDENT_MEMORY
from wmdd_core.metrics import format_mean_sd, mean_and_sd
from workflow_scripts.job import Job, run
from workflow_scripts.plain_tables import read_rows, write_table

PUBLISHED = Path(__file__).resolve().parent.parent / "report/published_efficiency.csv"


def build_row(settings: Mapping, method: str, measured: Mapping, published: Mapping) -> dict[str, str]:
    """One line of the CSV; `published` are the method's published figures, if it has any."""
    mean, sd = mean_and_sd(measured["seconds"])
    before, projected = measured["preparation_seconds"], settings["projected_iterations"]
    row = {
        "method": settings["labels"][method],
        "entry": method,
        "dataset": settings["dataset"],
        "iterations_timed": str(len(measured["seconds"])),
        "seconds_per_iteration_mean": f"{mean:.6f}",
        "seconds_per_iteration_sd": "" if sd is None else f"{sd:.6f}",
        "peak_memory_gib": f"{measured['peak'] / 2**30:.3f}",
        "memory": measured["memory"],
        "preparation_seconds": f"{before:.2f}",
        "iterations_projected": str(projected),
        "total_seconds": f"{before + mean * projected:.2f}",
    }
    for key in ("seconds_mean", "seconds_sd", "peak_gb", "total_seconds", "source"):
        row[f"published_{key}"] = published.get(key, "")
    return {**row, "machine": measured["machine"]}


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


def describe(settings: Mapping, rows: list[dict[str, str]], found: Mapping) -> list[str]:
    """What was measured, on what, and what stands in parentheses."""
    preparation, network = found["preparation"], found["network"]
    features, barycenters = preparation["seconds"]
    peak = preparation["peak"] / 2**30
    on_gpu, half = rows[0]["memory"] == DEVICE_MEMORY, preparation["precision"] == "bfloat16"
    notes = [
        f"Time to update one image per class by one iteration on {settings['dataset_title']}, mean ± sample"
        f" standard deviation over {rows[0]['iterations_timed']} consecutive iterations after"
        f" {found['warm_up']} of warm-up. All methods optimise at {network['resolution']} pixels with the"
        f" teacher's network ({network['architecture']}); DC and DM draw it anew in each iteration"
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
        f" {found['load']:.1f} at the start.",
    ]
    if any(r["published_source"] for r in rows):
        notes.append(
            "In parentheses: the published figures, in GB, for ImageNette at its original resolution with a"
            " ResNet-18 on an RTX-3090 (WMDD paper, Table 7). Its totals are more than 2,000 iterations take;"
            " what else they hold is not stated."
        )
    return notes


def main(job: Job) -> None:
    settings, found = job.settings, read_json(job.input["measured"])
    published = {row["method"]: row for row in read_rows(PUBLISHED)}
    rows = [
        build_row(settings, method, found["methods"][method], published.get(method, {}))
        for method in settings["methods"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(found["header"]["versions"].items()))
    notes = [*describe(settings, rows, found), f"Commit {found['header']['commit']}; {versions}."]
    write_table(job.output, rows, build_shown(rows), settings["title"], notes)


if __name__ == "__main__":
    run(main)
