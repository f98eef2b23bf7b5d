"""What `python -m workflow_scripts.status` tells, from files and logs alone."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from workflow_scripts import status
from workflow_scripts.status import (
    Planned,
    count_jobs,
    expected_seconds,
    gpu_rules,
    hours_left,
    planned_jobs,
    render,
)

BENCHMARK = "s\th:m:s\tmax_rss\n{}\t0:00:01\t100.0\n"

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def command_of(results: Path, seed: int, environment: str = "") -> str:
    """A line of a dry run, as `run_script` in rules/common.smk makes it."""
    job = {
        "checkpoints": f"{results}/checkpoints",
        "device": "auto",
        "input": {},
        "output": {"evaluation": f"{results}/it's.json"},
        "wildcards": {"dataset": "digits", "seed": str(seed)},
    }
    log = f"{results}/logs/evaluate_student/digits/seed{seed}.log"
    given = shlex.join(["printf", "%s\\n", json.dumps(job), "{}"])
    return f"{given} | {environment}python -m workflow_scripts.evaluate_student 0123 --threads 1 > {log} 2>&1"


@pytest.fixture
def jobs(tmp_path) -> list[Planned]:
    return planned_jobs("\n".join(f"Shell command: {command_of(tmp_path, seed)}" for seed in range(4)))


def write(path: Path, text: str, age: float = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))


def test_jobs_are_read_from_a_dry_run(jobs, tmp_path):
    assert [job.wildcards["seed"] for job in jobs] == ["0", "1", "2", "3"]
    assert jobs[2].rule == "evaluate_student"
    assert jobs[2].log == tmp_path / "logs/evaluate_student/digits/seed2.log"
    assert jobs[2].benchmark == tmp_path / "benchmarks/evaluate_student/digits/seed2.tsv"
    assert jobs[2].lock == tmp_path / "checkpoints/evaluate_student/dataset-digits/seed-2.lock"
    assert planned_jobs("Shell command: echo python -m workflow_scripts.x") == []
    assert len(planned_jobs(f"    {command_of(tmp_path, 7, 'WMDD_GPUS=2 ')}")) == 1


def test_counts_are_read_from_the_table():
    told = """
Job stats:
job                 count
----------------  -------
all                     1
evaluate_student       12
recover_images          8
total                  21

evaluate_student 99
"""
    assert count_jobs(told) == {"evaluate_student": 12, "recover_images": 8}
    assert count_jobs("Nothing to be done") == {}


def test_states_follow_from_lock_log_and_benchmark(jobs):
    running, failed, changed, new = jobs
    write(new.log, "")  # of a job that has not taken its lock yet
    for job in (running, failed, changed):
        write(job.log, "begun\n1/5 loss 0.5\n\n", age=100)
    write(changed.benchmark, BENCHMARK.format(7), age=50)  # finished, with other settings
    running.lock.parent.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(running.lock)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        running.lock.write_text(json.dumps({"host": "node7", "pid": 42, "slurm": "123"}))
        assert [job.state for job in jobs] == ["running", "failed", "to do", "to do"]
        told = render({"evaluate_student": 6, "recover_images": 3}, jobs)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line and line[0] != " "}
    assert rows["evaluate_student"][:4] == ["2", "1", "1", "2"]
    assert rows["recover_images"] == ["3", "0", "0", "0", "-"]
    assert rows["all"][:4] == ["5", "1", "1", "2"]
    assert "on node7, process 42, Slurm job 123" in told and "1/5 loss 0.5" in told
    assert told.index("running:") < told.index("failed or interrupted") < told.index("seed=1")
    assert [job.state for job in jobs] == ["failed", "failed", "to do", "to do"]  # its process is gone


def test_hours_come_from_the_nearest_finished_jobs(jobs, tmp_path):
    top = tmp_path / "benchmarks/evaluate_student"
    write(top / "cifar/seed0.tsv", BENCHMARK.format(100))
    assert expected_seconds(jobs[0].benchmark, top) == 100  # another dataset, for want of better
    write(top / "digits/seed7.tsv", BENCHMARK.format(10))
    write(top / "digits/seed8.tsv", BENCHMARK.format(20))
    assert expected_seconds(jobs[0].benchmark, top) == 15
    write(jobs[0].benchmark, BENCHMARK.format(3600))
    assert expected_seconds(jobs[0].benchmark, top) == 3600
    hours, unknown = hours_left(jobs[:1])
    assert hours == {"evaluate_student": 1} and not unknown


def test_a_job_that_ends_while_it_is_looked_at_counts_whole(jobs, monkeypatch):
    write(jobs[0].benchmark, BENCHMARK.format(3600))
    monkeypatch.setattr(Planned, "state", "running")  # and its lock is gone already
    assert hours_left(jobs[:1])[0] == {"evaluate_student": 1}


def test_without_locks_nothing_is_said_to_run(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    (tmp_path / "job.lock").touch()
    monkeypatch.setattr(status.fcntl, "lockf", refuse)
    assert not status.is_held(tmp_path / "job.lock")


def test_a_rule_without_a_finished_job_is_said_to_be_unknown(jobs):
    hours, unknown = hours_left(jobs)
    assert hours == {} and unknown == {"evaluate_student"}
    assert "no job of theirs has finished yet: evaluate_student" in render({"evaluate_student": 4}, jobs)


def test_rules_with_a_gpu_in_the_profile_are_those_that_count_one_locally():
    declared = set()
    for path in (ROOT / "rules").glob("*.smk"):
        for block in path.read_text(encoding="utf-8").split("\nrule ")[1:]:
            if "local_gpu=local_gpu" in block:
                declared.add(block.partition(":")[0])
    assert gpu_rules() - {"gpu_jobs"} == declared


@pytest.mark.workflow
def test_a_finished_run_has_nothing_left(smoke):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WMDD_COMMIT": "tests"}
    command = [
        sys.executable,
        "-m",
        "workflow_scripts.status",
        "--configfile",
        str(ROOT / "presets/smoke.yaml"),
    ]
    told = []
    for folder, more in ((smoke, []), (smoke.parent, ["--directory", smoke.name])):
        done = subprocess.run([*command, *more], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1]
    rows = {line.split()[0]: line.split()[1:] for line in told[0].splitlines() if line and line[0] != " "}
    assert rows["evaluate_student"] == ["12", "0", "0", "0", "-"]
    assert rows["all"] == ["63", "0", "0", "0", "0.00"]


def test_a_mistake_is_told_in_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("sede: 1", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "workflow_scripts.status", "--configfile", "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "did you mean 'seed'" in done.stderr
