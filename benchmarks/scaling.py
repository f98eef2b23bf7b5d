"""Cost of our stages against images, classes, images per class and resolution, log-log with slopes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import stages
from benchmarks.compare import describe_origin, origin_note
from workflow_scripts.plain_tables import as_markdown

NETWORK = {"architecture": "convnet", "resolution": 32}
BASE = {
    "features": {**NETWORK, "images": 500, "classes": 10},
    "barycenter": {"points": 500, "dimension": 256, "atoms": 10},
    "recover": {**NETWORK, "classes": 10, "ipc": 4, "iterations": 4},
    "relabel": {**NETWORK, "images": 200, "epochs": 1},
    "evaluate": {**NETWORK, "images": 200, "epochs": 1, "test": 100},
}
# Panel → values, and for each stage its sizes at a value. A barycenter has a job for each class, so its time
# against classes is a straight line by construction, and left out.
PANELS = {
    "images": (
        (250, 500, 1000, 2000),
        {"features": lambda n: {"images": n}, "barycenter": lambda n: {"points": n}},
    ),
    "classes": (
        (4, 16, 64),
        {"features": lambda n: {"classes": n}, "recover": lambda n: {"classes": n}},
    ),
    "images per class": (
        (5, 10, 20, 40),
        {
            "barycenter": lambda n: {"atoms": n},
            "recover": lambda n: {"ipc": n},
            "relabel": lambda n: {"images": 10 * n},
            "evaluate": lambda n: {"images": 10 * n},
        },
    ),
    "resolution (pixels)": (
        (16, 32, 64),
        dict.fromkeys(("features", "recover", "relabel", "evaluate"), lambda n: {"resolution": n}),
    ),
}
TINY = {
    "images": ((50, 100), {"barycenter": lambda n: {"points": n}}),
    "classes": ((2, 4), {"features": lambda n: {"classes": n, "images": 20}}),
}


def seconds_of(stage: str, sizes: dict, repeats: int) -> float:
    """Median seconds of our side after one run to warm up."""
    found = []
    with tempfile.TemporaryDirectory(prefix="wmdd-bench-") as folder:
        work = stages.__dict__[stage]("ours", "cpu", Path(folder), **sizes)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work.run()
            found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ∝ xᵖ, by least squares of the logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure_scaling(threads: int, tiny: bool, output: Path) -> tuple[dict, str]:
    """Times, slopes, and the figure in `output`."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    from wmdd_core.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    found: dict[str, list[dict]] = {}
    lines = [["Against", "Stage", "Sizes", "Seconds", "Slope"]]
    for panel, (values, curves) in (TINY if tiny else PANELS).items():
        for stage, at in curves.items():
            taken = [seconds_of(stage, {**BASE[stage], **at(v)}, 1 if tiny else 3) for v in values]
            exponent = slope(values, taken)
            found.setdefault(panel, []).append(
                {"stage": stage, "values": values, "seconds": taken, "slope": exponent}
            )
            shown = (", ".join(f"{v:g}" for v in values), ", ".join(f"{t:.3f}" for t in taken))
            lines.append([panel, stage, *shown, f"{exponent:.2f}"])
    draw(found, output / "scaling.png")
    origin = describe_origin(threads)
    return {"panels": found, "origin": origin}, as_markdown(lines, "Scaling", [origin_note(origin)])


def draw(panels: dict[str, list[dict]], path: Path) -> None:
    """One panel for each size that grows; a stage has one colour, marker and dash in all of them."""
    from workflow_scripts.drawing import COLOURS, DASHES, DPI, MARKERS, new_figure

    stage_names, colours = list(BASE), list(COLOURS.values())
    figure = new_figure(7.0, 5.2 if len(panels) > 2 else 2.8)
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for curve in curves:
            number = stage_names.index(curve["stage"])
            axis.plot(
                curve["values"],
                curve["seconds"],
                color=colours[number],
                marker=MARKERS[number],
                linestyle=DASHES[number % len(DASHES)],
                label=f"{curve['stage']}: slope {curve['slope']:.2f}",
            )
        seconds = [t for curve in curves for t in curve["seconds"]]
        low, high = 10 ** np.floor(np.log10(min(seconds))), 10 ** np.ceil(np.log10(max(seconds)))
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds", ylim=(low, high))
        axis.set_xticks(curves[0]["values"], [f"{v:g}" for v in curves[0]["values"]])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
