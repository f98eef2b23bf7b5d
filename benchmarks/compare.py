"""Two sides of a stage in processes of their own: do they agree, how long do they take, what do they hold?"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np

from wmdd_core.memory import ENVIRONMENT, keep_freed_memory

SIDES = ("ours", "plain")
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "POT")

# ‖ours − plain‖ / ‖plain‖ of the arrays that a side's check gives, in float32 and in bfloat16. Adam's first
# steps go by the gradient's sign, so a value whose gradient is all rounding moves a full step either way:
# losses are held close, what Adam has moved to what tells one gradient from another (unrelated ones: 1.4).
TOLERANCES = {
    "features": {"": (1e-4, 1e-4)},
    "recover": {"losses": (1e-4, 1e-2), "movement": (0.2, 0.8)},
    "relabel": {"logits": (2e-3, 3e-2)},
    "evaluate": {"losses": (1e-2, 5e-2), "logits": (0.1, 0.4)},
}
"""Stage → array ("" is all others) → largest relative difference."""

WHOLE = {"epochs": 300, "test": 3925, "tests": {"ours": 1, "plain": 31}}
"""A student's whole evaluation on ten images a class of ImageNette, a hundred in all."""

COLUMNS = ("Stage", "Work", "Ours (s)", "Plain (s)", "Ratio", "Target", "Peak memory (MiB)", "Agreement")


@dataclass(frozen=True)
class Compared:
    """Seconds and other figures of each repeat, and peak bytes, by side; by how much their results differ."""

    stage: str
    sizes: dict
    device: str
    seconds: dict[str, list[float]]
    peak: dict[str, int]
    figures: dict[str, list[dict[str, float]]]
    differences: dict[str, float]
    target: float | None = None
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median seconds of ours over those of the plain side."""
        return statistics.median(self.seconds["ours"]) / statistics.median(self.seconds["plain"])

    def median_figures(self, side: str) -> dict[str, float]:
        """The median of each figure of a side."""
        repeats = self.figures[side]
        return {name: statistics.median(r[name] for r in repeats) for name in repeats[0]}


class Disagreement(Exception):
    """The sides did not do the same work, so their times say nothing."""


def compare(
    stage: str,
    sizes: Mapping,
    *,
    device: str = "cpu",
    threads: int = 2,
    repeats: int = 3,
    target: float | None = None,
) -> Compared:
    """Check that both sides of `stage` agree, then time them in turn, `repeats` times each.

    The check is each side's warm-up. Raises `Disagreement` if the results differ by more than the stage's
    tolerance, or for a barycenter if ours is worse than it must be.
    """
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    # Read when a process starts, before NumPy or PyTorch count the cores for themselves.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))
    with tempfile.TemporaryDirectory(prefix="wmdd-bench-") as folder:
        pools = {s: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for s in SIDES}
        try:
            for side, pool in pools.items():
                with mock.patch.dict(os.environ, ENVIRONMENT if side == "ours" else {}):
                    pool.submit(_prepare, stage, side, device, folder, dict(sizes)).result()
            checked = {side: pool.submit(_check, device).result() for side, pool in pools.items()}
            differences = check_agreement(stage, sizes, checked["ours"], checked["plain"])
            for _ in range(repeats):
                for side, pool in pools.items():
                    taken, found = pool.submit(_run, device).result()
                    seconds[side].append(taken)
                    figures[side].append(found)
            peak = {side: pool.submit(_peak, device).result() for side, pool in pools.items()}
        finally:
            for pool in pools.values():
                pool.shutdown()
    origin = describe_origin(threads, device)
    return Compared(stage, dict(sizes), device, seconds, peak, figures, differences, target, origin)


_work = None
"""This process's side."""


def _prepare(stage: str, side: str, device: str, folder: str, sizes: dict) -> None:
    global _work
    from benchmarks import stages

    if side == "ours":  # as every job of the workflow does
        keep_freed_memory()
        if device == "cuda":
            from wmdd_core.device import compute_reproducibly

            compute_reproducibly()
    _work = getattr(stages, stage)(side, device, Path(folder), **sizes)


def _check(device: str) -> dict[str, np.ndarray]:
    if device != "cuda":
        return _work.check()
    import torch

    # In TF32, a GPU's float32 of 10 bits, the sides would round by their memory format. They are timed in it.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        checked = _work.check()
    _work.run()
    return checked


def _run(device: str) -> tuple[float, dict[str, float]]:
    _wait(device)
    start = time.perf_counter()
    figures = _work.run()
    _wait(device)
    return time.perf_counter() - start, figures


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    (line,) = (v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def check_agreement(stage: str, sizes: Mapping, ours: Mapping, plain: Mapping) -> dict[str, float]:
    """By how much the results differ; raises `Disagreement` where that is too much."""
    if stage == "barycenter":
        above = float(ours["w2_squared"] / plain["w2_squared"] - 1)
        against = float(ours["w2_squared"] / plain["free_support"] - 1)
        if above > 0.02 or against > 0:
            raise Disagreement(
                f"barycenter: W2² is {above:+.2%} above ten k-means runs,"
                f" {against:+.2%} above POT's free support"
            )
        return {"above k-means": above, "above free support": against}
    tolerances, differences = TOLERANCES[stage], {}
    for name, wanted in plain.items():
        tolerance = tolerances.get(name, tolerances.get(""))[bool(sizes.get("bfloat16"))]
        difference = np.linalg.norm(np.float64(ours[name]) - wanted) / np.linalg.norm(np.float64(wanted))
        if not difference <= tolerance:
            raise Disagreement(f"{stage}: {name} differ by {difference:.2g} relative, more than {tolerance}")
        differences[name] = float(difference)
    return {"largest": max(differences.values())} if "" in tolerances else differences


def describe_origin(threads: int, device: str = "cpu") -> dict[str, str]:
    """Machine, versions, date and commit."""
    import torch

    from wmdd_core.machine import processor_name

    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    return {
        "machine": f"{gpu}{processor_name()}, {threads} threads, {platform.system()} {platform.release()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "date": date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def origin_note(origin: Mapping[str, str]) -> str:
    """What `describe_origin` found, as a table's note."""
    return (
        f"`{origin['command']}`; {origin['date']}, commit {origin['commit']}, {origin['machine']};"
        f" {origin['versions']}."
    )


# ---- tables -------------------------------------------------------------------------------------


def write_json(path: Path, compared: Sequence[Compared]) -> None:
    """All figures, every repeat of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**asdict(c), "ratio": c.ratio} for c in compared], indent=1) + "\n")


def spread(seconds: Sequence[float]) -> str:
    """Median and range.

    >>> spread([1.0, 3.0, 2.0])
    '2.00 (1.00–3.00)'
    """
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def build_lines(compared: Sequence[Compared]) -> list[list[str]]:
    """The table, its head first."""
    lines = [list(COLUMNS)]
    for c in compared:
        work = ", ".join(f"{key} {value}" for key, value in c.sizes.items() if key != "root")
        memory = " / ".join(f"{c.peak[side] / 2**20:.0f}" for side in SIDES)
        agreement = ", ".join(f"{name} {value:.1e}" for name, value in c.differences.items())
        times = [spread(c.seconds[side]) for side in SIDES]
        target = "" if c.target is None else f"≤ {c.target:g}"
        lines.append([c.stage, work, *times, f"{c.ratio:.2f}", target, memory, agreement])
    return lines


def notes_of(compared: Sequence[Compared]) -> list[str]:
    """What the tables' figures are, and what else was counted."""
    notes = [
        "Seconds: median (range) of the repeats, warm, in turn. Memory: ours / plain, a process each.",
        origin_note(compared[0].origin),
    ]
    for c in compared:
        medians = {side: c.median_figures(side) for side in SIDES}
        told = {s: ", ".join(f"{k} {v:,.6g}" for k, v in f.items()) for s, f in medians.items() if f}
        if told:
            notes.append(f"{c.stage}: " + "; ".join(f"{side} {text}" for side, text in told.items()) + ".")
        if c.stage == "evaluate":
            whole = {side: whole_evaluation(c, side) for side in SIDES}
            times = " / ".join(f"{seconds:,.0f} s" for seconds in whole.values())
            notes.append(
                f"evaluate, {WHOLE['epochs']} epochs and ImageNette's {WHOLE['test']:,} test images, tested"
                f" once by ours and {WHOLE['tests']['plain']} times by the reference, as the released code"
                f" does, reckoned from the line above: {times}, ratio {whole['ours'] / whole['plain']:.2f}."
            )
    return notes


def whole_evaluation(compared: Compared, side: str) -> float:
    """Seconds of a whole evaluation, from those of an epoch and of a test image."""
    figures = compared.median_figures(side)
    testing = WHOLE["tests"][side] * WHOLE["test"] * figures["seconds a test image"]
    return WHOLE["epochs"] * figures["seconds an epoch"] + testing
