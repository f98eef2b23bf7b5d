"""What each workflow script costs before it works, and whether it imports what it never uses."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.compare import Disagreement, describe_origin, origin_note, spread
from workflow_scripts.plain_tables import as_markdown

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ("torch", "torchvision", "sklearn", "scipy", "ot", "matplotlib", "pandas")

NETWORKS = ("matplotlib", "sklearn", "torchvision", "pandas", "ot")
"""A job that runs a network and draws nothing: torchvision comes when a network of its is built."""

UNUSED = {
    "compute_barycenter": ("torch", "torchvision", "matplotlib", "sklearn", "pandas"),
    "describe_dataset": ("torch", "torchvision", "matplotlib", "sklearn", "pandas", "scipy", "ot"),
    "decode_images": ("torch", "torchvision", "matplotlib", "sklearn", "pandas", "scipy", "ot"),
    "pretrain_teacher": NETWORKS,
    "extract_features": NETWORKS,
    "recover_images": NETWORKS,
    "relabel_images": NETWORKS,
    "evaluate_student": NETWORKS,
    "gather_images": ("torch", *NETWORKS),
    "measure_distances": ("matplotlib", "torchvision"),
    "embed_tsne": ("matplotlib", "torchvision"),
    "plot_accuracy": ("torch", "torchvision", "sklearn"),
    "plot_sweep": ("torch", "torchvision", "sklearn"),
    "tabulate_accuracy": ("torch", "torchvision", "sklearn", "matplotlib"),
}
"""Script → packages that it must not import."""


def scripts() -> list[str]:
    """The scripts that are jobs: those that hand their `main` to `run`."""
    folder = ROOT / "workflow_scripts"
    return sorted(p.stem for p in folder.glob("*.py") if "\n    run(main)" in p.read_text(encoding="utf-8"))


def imported(script: str) -> list[str]:
    """The heavy packages in memory once `script` is imported, in a fresh process."""
    loaded = imported_by(f"import workflow_scripts.{script}")
    return [name for name in HEAVY if name in loaded]


def imported_by(code: str) -> set[str]:
    """The modules that a fresh process has at the end of `code`, which prints nothing."""
    done = _python(f"{code}\nimport json, sys; print(json.dumps([*sys.modules]))", stdout=subprocess.PIPE)
    return set(json.loads(done.stdout))


def _python(code: str, **options) -> subprocess.CompletedProcess:
    # As Snakemake starts jobs, with one thread, and with compiled modules kept as they are after a first run.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, **options)


def seconds(code: str, repeats: int) -> list[float]:
    """Seconds of fresh processes that run `code`, after one that warms the file cache."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        _python(code)
        found.append(time.perf_counter() - start)
    return found[1:]


def check_unused(script: str, found: list[str]) -> None:
    """Raise `Disagreement` if `script` imports what it never uses."""
    surplus = sorted(set(found) & set(UNUSED.get(script, ())))
    if surplus:
        raise Disagreement(f"{script} imports {', '.join(surplus)} and uses none of it")


def measure_startup(repeats: int) -> tuple[dict, str]:
    """Seconds of Python alone and of each script's imports; figures and table."""
    bare = seconds("pass", repeats)
    lines = [["Script", "Seconds", "Imports"], ["Python alone", spread(bare), ""]]
    figures = {"python": bare, "scripts": {}}
    for script in scripts():
        found = imported(script)
        check_unused(script, found)
        taken = seconds(f"import workflow_scripts.{script}", repeats)
        figures["scripts"][script] = {"seconds": taken, "imports": found}
        lines.append([script, spread(taken), ", ".join(found)])
    lines[2:] = sorted(lines[2:], key=lambda line: statistics.median(figures["scripts"][line[0]]["seconds"]))
    figures["origin"] = origin = describe_origin(1)
    notes = [f"Seconds of a whole process: median (range) of {repeats}.", origin_note(origin)]
    return figures, as_markdown(lines, "Start-up", notes)
