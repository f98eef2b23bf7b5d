"""Running the workflow as a user does, on the smoke preset."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wmdd_core.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent

keep_freed_memory()  # as every job does: the tests that train are a third faster

RUN_DEPENDENT = ("logs", "benchmarks", "checkpoints")
"""Folders below results/smoke that tell of one run: when, how long, on what."""


def _command(directory: Path, *arguments: str, root: Path = ROOT, preset: str = "smoke") -> list[str]:
    """The arguments stand behind the preset's file, so a target must not be the first of them."""
    command = [sys.executable, "-m", "snakemake", "-s", str(root / "Snakefile")]
    configuration = ["--configfile", str(root / f"presets/{preset}.yaml")] if preset else []
    return [*command, "--directory", str(directory), *configuration, *arguments]


def _environment() -> dict[str, str]:
    """Without a GPU, where a test does not ask for one: what is compared was computed on a CPU."""
    return {"CUDA_VISIBLE_DEVICES": "", **os.environ, "WMDD_COMMIT": "tests"}


def run_snakemake(directory: Path, *arguments: str, root: Path = ROOT, preset: str = "smoke", **options):
    """Run Snakemake with its working files and results in `directory`; never raises."""
    return subprocess.run(
        _command(directory, *arguments, root=root, preset=preset),
        capture_output=True,
        text=True,
        env=_environment(),
        cwd=root,
        **options,
    )


def start_snakemake(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start the smoke preset in a process group of its own, to be interrupted or killed."""
    return subprocess.Popen(
        _command(directory, *arguments),
        env={**_environment(), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # As in a terminal, also where the tests themselves run in the background, which ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def planned(directory: Path, overlay: str = "", *targets: str, root: Path = ROOT) -> set[str]:
    """The messages of the jobs that a dry run plans, with `overlay` laid over the smoke preset."""
    files = []
    if overlay:
        (directory / "overlay.yaml").write_text(overlay, encoding="utf-8")
        files = ["--configfile", str(root / "presets/smoke.yaml"), str(directory / "overlay.yaml")]
    done = run_snakemake(directory, "-n", *targets, *files, root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^Job \d+: (.+)$", done.stdout + done.stderr, re.MULTILINE))


def fingerprint(directory: Path) -> dict[str, str]:
    """Path → SHA-256 of everything that must not differ between two runs."""
    results = directory / "results" / "smoke"
    return {
        str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(results.rglob("*"))
        if path.is_file()
        and path.relative_to(results).parts[0] not in RUN_DEPENDENT
        and path.suffix != ".html"  # the page says when and on what it was made
    }


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A folder in which the smoke preset has been run with two cores.

    One process of tests does so for all of them; each has a copy, in which its tests may make more.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with open(shared / "smoke.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not (shared / "smoke-made").exists():
            done = run_snakemake(shared / "smoke-run", "--cores", "2")
            assert done.returncode == 0, done.stdout + done.stderr
            (shared / "smoke-run").rename(shared / "smoke-made")
    return Path(shutil.copytree(shared / "smoke-made", own / "smoke"))
