"""The state of an experiment, from its files and logs alone: what is done, running, failed and to do.

    python -m workflow_scripts.status --configfile presets/cifar10.yaml

Arguments are Snakemake's, targets too. The plan is that of a dry run. A job runs while its lock in the
checkpoint folder is held; it has failed, or was interrupted, if its log is younger than its benchmark file,
which is written at its end. Hours are those of the finished jobs that are most like it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from wmdd_core.errors import UserError
from workflow_scripts.job import NO_LOCKS, job_name

ROOT = Path(__file__).resolve().parent.parent
STATES = ("done", "running", "failed", "to do")


@dataclass(frozen=True, eq=False)
class Planned:
    """A job that a dry run plans."""

    rule: str
    wildcards: Mapping[str, str]
    log: Path
    benchmark: Path
    lock: Path

    @classmethod
    def from_command(cls, command: str) -> Planned | None:
        """Read a rule's command (rules/common.smk, `run_script`); None for a command of another kind."""
        words = shlex.split(command)
        module = next((w for w in words if w.startswith("workflow_scripts.")), None)
        if words[0] != "printf" or not module:
            return None
        rule, given = module.removeprefix("workflow_scripts."), json.loads(words[2])
        log, results = Path(words[words.index(">") + 1]), Path(given["checkpoints"]).parent
        benchmark = results / "benchmarks" / log.relative_to(results / "logs").with_suffix(".tsv")
        lock = Path(given["checkpoints"]) / f"{job_name(rule, given['wildcards'])}.lock"
        return cls(rule, given["wildcards"], log, benchmark, lock)

    @property
    def state(self) -> str:
        """`running`, `failed` or `to do`."""
        if is_held(self.lock):
            return "running"
        if not self.log.exists() or not self.log.stat().st_size:
            return "to do"  # an empty log is that of a job in its first seconds, which has no lock yet
        finished = self.benchmark.exists() and self.benchmark.stat().st_mtime >= self.log.stat().st_mtime
        return "to do" if finished else "failed"  # finished, but by settings that have changed since

    def describe(self) -> str:
        """Rule, wildcards, log and its last line."""
        wildcards = " ".join(f"{key}={value}" for key, value in self.wildcards.items())
        return f"{self.rule} {wildcards}\n    {self.log}\n    {last_line(self.log)}"


def is_held(lock: Path) -> bool:
    """Whether some process on some machine holds this lock file."""
    try:
        with open(lock) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in NO_LOCKS
    return False


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty; nothing, where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            return last_of(file.read().decode(errors="replace"))
    except FileNotFoundError:
        return ""


def dry_run(*arguments: str) -> str:
    """What Snakemake prints when it plans."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"snakemake --dry-run: {last_of(done.stderr) or last_of(done.stdout)}")
    return done.stdout + done.stderr


def last_of(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def count_jobs(told: str) -> dict[str, int]:
    """Rule → number of jobs, from a dry run's table `Job stats`; rules that run no script are left out."""
    counts: dict[str, int] = {}
    for line in told.partition("Job stats:")[2].splitlines()[3:]:
        found = re.fullmatch(r"(\S+) +(\d+)", line.strip())
        if not found or found[1] == "total":
            break
        if (ROOT / f"workflow_scripts/{found[1]}.py").exists():
            counts[found[1]] = int(found[2])
    return counts


def planned_jobs(told: str) -> list[Planned]:
    """The jobs that a dry run with --printshellcmds names."""
    line = r"^\s*(?:Shell command: )?(printf .+ python -m workflow_scripts\..+)$"
    commands = re.findall(line, told, re.MULTILINE)
    return [job for command in commands if (job := Planned.from_command(command))]


def seconds_of(benchmark: Path) -> float | None:
    """How long a job took, from its benchmark file."""
    try:
        names, values = (line.split("\t") for line in benchmark.read_text().splitlines()[:2])
        return float(dict(zip(names, values, strict=True))["s"])
    except (OSError, ValueError, KeyError):  # none, or one that is just being written
        return None


def expected_seconds(benchmark: Path, top: Path) -> float | None:
    """The mean over the finished jobs nearest to this one: itself, its folder, the folder above, to `top`."""
    own = seconds_of(benchmark)
    if own is not None:
        return own
    folder = benchmark.parent
    while folder == top or top in folder.parents:
        found = [s for path in folder.rglob("*.tsv") if (s := seconds_of(path)) is not None]
        if found:
            return sum(found) / len(found)
        folder = folder.parent
    return None


def gpu_rules() -> set[str]:
    """The rules that profiles/slurm gives a GPU."""
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text(encoding="utf-8"))
    return {rule for rule, wanted in profile["set-resources"].items() if wanted.get("gpu")}


def hours_left(jobs: Iterable[Planned]) -> tuple[dict[str, float], set[str]]:
    """Rule → hours of computing that its jobs still take, and the rules of which no job has finished yet."""
    hours: dict[str, float] = defaultdict(float)
    unknown = set()
    nearest: dict[Path, float | None] = {}
    for job in jobs:
        top = next(p for p in job.benchmark.parents if p.name == job.rule and p.parent.name == "benchmarks")
        key = job.benchmark if job.benchmark.exists() else job.benchmark.parent
        if key not in nearest:
            nearest[key] = expected_seconds(job.benchmark, top)
        seconds = nearest[key]
        if seconds is None:
            unknown.add(job.rule)
            continue
        if job.state == "running":
            seconds = max(0.0, seconds - running_seconds(job.lock))
        hours[job.rule] += seconds / 3600
    return hours, unknown


def running_seconds(lock: Path) -> float:
    """Seconds since a running job took its lock; 0 if it has ended in this moment."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def holder_of(job: Planned) -> str:
    """Where a running job runs, and since when."""
    try:
        holder = json.loads(job.lock.read_text())
    except (OSError, ValueError):  # it has ended in this moment
        return ""
    slurm = f", Slurm job {holder['slurm']}" if holder["slurm"] else ""
    minutes = running_seconds(job.lock) / 60
    return f"on {holder['host']}, process {holder['pid']}{slurm}, for {minutes:.0f} min"


def render(totals: Mapping[str, int], jobs: Sequence[Planned]) -> str:
    """The table of rules, what is left, and the jobs to look at."""
    states = {job: job.state for job in jobs}
    counts = {rule: Counter(s for job, s in states.items() if job.rule == rule) for rule in totals}
    for rule, total in totals.items():
        counts[rule]["done"] = total - counts[rule].total()
    hours, unknown = hours_left(jobs)
    rows = [("rule", *STATES, "hours left")]
    for rule, count in counts.items():
        left = sum(count[s] for s in STATES[1:])
        told = "?" if rule in unknown else f"{hours[rule]:.2f}" if left else "-"
        rows.append((rule, *(str(count[s]) for s in STATES), told))
    summed = sum(counts.values(), Counter())
    known = f"{sum(hours.values()):.2f}" if hours or not unknown else "?"
    rows.append(("all", *(str(summed[s]) for s in STATES), known))
    lines = [f"{row[0]:20}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows]
    with_gpu = sum(h for rule, h in hours.items() if rule in gpu_rules())
    lines += ["", f"{with_gpu:.2f} of the hours left are for a GPU, if the rules that use one have it"]
    if unknown:
        lines.append(f"not counted, as no job of theirs has finished yet: {', '.join(sorted(unknown))}")
    for state in ("running", "failed"):
        found = [job for job, s in states.items() if s == state]
        if found:
            lines += [
                "",
                "running:" if state == "running" else "failed or interrupted, with the end of the log:",
            ]
            lines += [
                f"  {job.describe()} {holder_of(job) if state == 'running' else ''}".rstrip() for job in found
            ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the state of the experiment that these arguments of Snakemake name."""
    totals = count_jobs(dry_run("--forceall", *arguments))
    jobs = planned_jobs(dry_run("--printshellcmds", *arguments))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-d", "--directory", default=".")
    os.chdir(parser.parse_known_args(arguments)[0].directory)  # where Snakemake's paths begin
    print(render(totals, jobs))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
