"""How far the stages are from what the machine can do: its rates, and the operations of each stage."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import describe_origin, origin_note
from benchmarks.stages import placed, teacher
from wmdd_core.models import Classifier, build_model
from workflow_scripts.plain_tables import as_markdown

SIDES = (1024, 2048, 4096)
COPIED = 2**28
"""Bytes of the copied array, far beyond the caches."""


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The least of a few warm repeats: a limit is what the machine can do, not what it mostly does."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def measure_rates() -> dict[str, float]:
    """10⁹ operations a second of a square product in each precision, 10⁹ bytes a second of a copy."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rates[name] = 0.0
        for side in SIDES:
            left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
            reached = 2 * side**3 / best_seconds(lambda a=left, b=right: a @ b) / 1e9
            rates[name] = max(rates[name], reached)
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source)
    rates["copy"] = 2 * COPIED / best_seconds(lambda: target.copy_(source)) / 1e9
    return rates


def count_operations(model: Classifier, images: Tensor, backward: bool) -> int:
    """Multiplications and additions (a pair is two) of a forward pass, and of a backward one if asked for.

    Backward goes to whatever requires a gradient: the images, or the weights.
    """
    with FlopCounterMode(display=False) as counter:
        output = model(images)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def operations_of(stage: str, sizes: Mapping) -> float:
    """Operations of one repeat of `stage`, counted on one image and scaled.

    Those that convolutions are defined by, and PyTorch's own do: minimal filtering needs fewer.
    """
    architecture, resolution = sizes["architecture"], sizes["resolution"]
    image = torch.zeros(2, 3, resolution, resolution)
    frozen = teacher(architecture, 10, resolution, "plain", "cpu")
    forward = count_operations(frozen, image, backward=False) / len(image)
    if stage == "features":
        return forward * sizes["images"]
    if stage == "relabel":
        return forward * sizes["images"] * sizes["epochs"]
    if stage == "recover":
        step = count_operations(frozen, image.clone().requires_grad_(True), backward=True) / len(image)
        return step * sizes["classes"] * sizes["ipc"] * sizes["iterations"]
    student = placed(build_model(architecture, 10, resolution, seed=0), "plain", "cpu")
    step = count_operations(student, image, backward=True) / len(image)
    return step * sizes["images"] * sizes["epochs"] + forward * sizes["test"]


def measured_before(folder: Path, machine: str) -> list[dict]:
    """The networks' stages in the JSON files of `folder` that ran on `machine`, the last of equal work."""
    latest = {}
    for path in sorted(folder.glob("*-cpu*.json"), key=lambda p: p.stat().st_mtime_ns):
        for row in json.loads(path.read_text()):
            here = (row["device"], row["origin"]["machine"]) == ("cpu", machine)
            if here and "architecture" in row["sizes"]:
                latest[row["stage"], json.dumps(row["sizes"])] = row
    return list(latest.values())


def measure_limits(folder: Path, threads: int) -> tuple[dict, str]:
    """The machine's rates, and what share of them the stages of `measured_before` reach."""
    torch.set_num_threads(threads)
    origin = describe_origin(threads)
    rates = measure_rates()
    lines = [["Stage", "Work", "10⁹ operations", "Seconds", "10⁹ operations/s", "Of the product's rate"]]
    stages = []
    for row in measured_before(folder, origin["machine"]):
        sizes, kind = row["sizes"], "bfloat16" if row["sizes"].get("bfloat16") else "float32"
        operations = operations_of(row["stage"], sizes) / 1e9
        seconds = statistics.median(row["seconds"]["ours"])
        share = operations / seconds / rates[kind]
        stages.append({"stage": row["stage"], "sizes": sizes, "gigaoperations": operations, "share": share})
        work = f"{sizes['architecture']}, {sizes['resolution']} pixels, {kind}"
        figures = [f"{operations:,.0f}", f"{seconds:.2f}", f"{operations / seconds:,.0f}", f"{share:.0%}"]
        lines.append([row["stage"], work, *figures])
    notes = [
        f"Best product of matrices of {SIDES} rows: {rates['float32']:.0f}·10⁹ operations/s in float32, "
        f"{rates['bfloat16']:.0f}·10⁹ in bfloat16; copies: {rates['copy']:.0f}·10⁹ bytes/s,"
        " read plus written.",
        origin_note(origin),
    ]
    return {"rates": rates, "stages": stages, "origin": origin}, as_markdown(lines, "Limits", notes)
