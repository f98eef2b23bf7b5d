"""The workflow on a real Slurm of one node: equal bytes, shared GPUs, and failures seen, retried, resumed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fingerprint, run_snakemake
from harness import FAILED, Cluster, Run, Unavailable, slurm_job_of, wait_until

pytestmark = [pytest.mark.workflow, pytest.mark.slurm]

SMOKE = ROOT / "presets/smoke.yaml"
TEACHER = "results/smoke/digits/teachers/{}/checkpoint.safetensors"
CPU_ONLY = ("--set-resources", "describe_dataset:mem_mb=2000")
"""On the command line it takes the place of the profile's per-rule requests: no job asks for a GPU."""


@pytest.fixture(scope="session")
def cluster():
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(Cluster())
        except Unavailable as reason:
            pytest.skip(f"no Slurm here: {reason}")
        yield running


@pytest.fixture(scope="session")
def smoke_run(cluster, tmp_path_factory) -> Run:
    """The smoke preset on Slurm by the profile as it is, begun but not awaited."""
    return cluster.run(tmp_path_factory.mktemp("slurm-smoke"))


@pytest.fixture(scope="session", autouse=True)
def begun_early(request):
    """One pretended GPU keeps the smoke run at one job: it goes on beside the other tests."""
    if any("smoke_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("smoke_run")


@pytest.fixture
def done(smoke, tmp_path) -> Path:
    """A copy of a folder in which the smoke preset has been run: only what a test adds is to do."""
    return Path(shutil.copytree(smoke, tmp_path / "done"))


def overlay(directory: Path, text: str) -> tuple[Path, Path]:
    """The smoke preset and `text` laid over it."""
    path = directory.parent / "overlay.yaml"
    path.write_text(text, encoding="utf-8")
    return SMOKE, path


def of_rule(jobs: list[dict], rule: str, *wildcards: str) -> list[dict]:
    """The Slurm jobs of a rule, by the comment that the plugin gives them."""
    comment = "_".join([f"rule_{rule}", *(["wildcards", *wildcards] if wildcards else [])])
    return [job for job in jobs if job["Comment"].startswith(comment)]


def states(jobs: list[dict]) -> list[str]:
    return [job["JobState"] for job in jobs]


def rules_of(jobs: list[dict]) -> list[str]:
    return sorted(re.match(r"rule_(.+?)(_wildcards|$)", job["Comment"]).group(1) for job in jobs)


def stop_at_work(cluster: Cluster, directory: Path, teachers: list[str]) -> dict[str, int]:
    """Teacher → process, each held still (SIGSTOP) once it has a checkpoint and is still training."""
    held: dict[str, int] = {}

    def hold() -> bool:
        for teacher in set(teachers) - set(held):
            checkpoint = (
                directory / f"results/smoke/checkpoints/pretrain_teacher/dataset-digits/teacher-{teacher}.pt"
            )
            pid = checkpoint.exists() and cluster.script(directory, "pretrain_teacher", teacher=teacher)
            if pid:
                os.kill(pid, signal.SIGSTOP)
                held[teacher] = pid
        return len(held) == len(teachers)

    wait_until(hold, f"{teachers} at work", 600, every=0.02)
    return held


def log_of(directory: Path, teacher: str) -> str:
    return (directory / f"results/smoke/logs/pretrain_teacher/digits/{teacher}.log").read_text()


# ---- failures --------------------------------------------------------------------------------


def test_what_ends_a_job_is_seen_retried_resumed_and_reported(cluster, done, tmp_path):
    ends = ["killed", "cancelled", "requeued", "overdue"]
    presets = overlay(
        done,
        "teachers:\n"
        + "".join(f"  {name}: {{like: convnet, epochs: 40}}\n" for name in ends)
        + "tables: {main: {ipc: [4], methods: [random]}}\n",
    )
    untroubled = Path(shutil.copytree(done, tmp_path / "untroubled"))
    targets = [TEACHER.format(name) for name in ends]
    evaluation = "results/smoke/digits/evaluation/wmdd/random/ipc4/convnet/seed0.json"
    run = cluster.run(
        done,
        *targets,
        evaluation,
        "--set-resources",
        "pretrain_teacher:runtime=1 if wildcards.teacher == 'overdue' and attempt == 1 else 30 * attempt",
        "select_images:mem_mb=250 if attempt == 1 else 4000",
        "relabel_images:mem_mb=250",
        presets=presets,
        jobs=6,
    )
    held = stop_at_work(cluster, done, ends)
    os.kill(held["killed"], signal.SIGKILL)
    cluster.call("scancel", slurm_job_of(held["cancelled"]))
    cluster.call("scontrol", "requeue", slurm_job_of(held["requeued"]))

    assert run.wait() == 1, run.told  # what needs relabel_images could not be made
    jobs = run.jobs()
    by_end = {name: of_rule(jobs, "pretrain_teacher", "digits", name) for name in ends}
    assert states(by_end["killed"]) == ["FAILED", "COMPLETED"]
    assert states(by_end["cancelled"]) == ["CANCELLED", "COMPLETED"]
    assert states(by_end["overdue"]) == ["TIMEOUT", "COMPLETED"]
    assert states(by_end["requeued"]) == ["COMPLETED"] and by_end["requeued"][0]["Restarts"] == "1"
    # More of what helps: the profile doubles memory, the test's own expression scales the time.
    first, second = by_end["killed"]
    assert (first["MinMemoryNode"], second["MinMemoryNode"]) == ("2000M", "4000M")
    assert (first["TimeLimit"], second["TimeLimit"]) == ("00:30:00", "01:00:00")
    out_of_memory = of_rule(jobs, "select_images")
    assert states(out_of_memory)[-1] == "COMPLETED" and len(out_of_memory) == 2
    assert states(out_of_memory)[0] in FAILED

    for name in ends:
        assert "resuming after step" in log_of(done, name), name
    told = run_snakemake(untroubled, "--cores", "2", *targets, "--configfile", *map(str, presets), preset="")
    assert told.returncode == 0, told.stdout + told.stderr
    for target in targets:
        assert (done / target).read_bytes() == (untroubled / target).read_bytes(), target

    # Retries are spent: the rule, its wildcards and the log are named.
    assert len(of_rule(jobs, "relabel_images")) == 3
    assert not of_rule(jobs, "evaluate_student")
    ending = run.told[run.told.rindex("Error in rule relabel_images") :]
    assert "results/smoke/logs/relabel_images/digits/wmdd/random/ipc4.log" in ending
    assert '"wildcards":{"dataset":"digits","ipc":"4","method":"random","recipe":"wmdd"}' in ending

    again = cluster.run(done, *targets, evaluation, *CPU_ONLY, presets=presets)
    assert again.wait() == 0, again.told
    assert rules_of(again.jobs()) == ["evaluate_student", "relabel_images"]


def test_ctrl_c_cancels_the_jobs_and_a_rerun_goes_on(cluster, done):
    presets = overlay(done, "teachers: {slow: {like: convnet, epochs: 40}}")
    run = cluster.run(done, TEACHER.format("slow"), *CPU_ONLY, presets=presets)
    stop_at_work(cluster, done, ["slow"])
    run.interrupt()
    assert run.wait() != 0
    wait_until(lambda: not cluster.active(done), "the end of the cluster's jobs", 60)
    assert states(run.jobs()) == ["CANCELLED"]
    again = cluster.run(done, TEACHER.format("slow"), *CPU_ONLY, presets=presets)
    assert again.wait() == 0, again.told
    assert "resuming after step" in log_of(done, "slow")


def test_twins_never_work_at_the_same_time(cluster, done):
    presets = overlay(done, "teachers: {twin: {like: convnet, epochs: 40}}")
    target = TEACHER.format("twin")
    run = cluster.run(done, target, *CPU_ONLY, presets=presets)
    old = stop_at_work(cluster, done, ["twin"])["twin"]
    run.kill()
    assert states(cluster.active(done)) == ["RUNNING"]  # nobody has cancelled it
    unlocked = run_snakemake(done, "--unlock", "--configfile", *map(str, presets), preset="")
    assert unlocked.returncode == 0

    folder = done / "results/smoke/checkpoints/pretrain_teacher/dataset-digits"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = cluster.run(done, target, *CPU_ONLY, presets=presets)
    wait_until(lambda: "another process is at work" in _text(done, "twin"), "the twin's wait")
    new = wait_until(
        lambda: [
            p
            for p, c in cluster.processes(done).items()
            if c[1:3] == ["-m", "workflow_scripts.pretrain_teacher"] and p != old
        ],
        "the twin",
    )
    assert states(cluster.active(done)) == ["RUNNING", "RUNNING"]
    time.sleep(6)  # longer than the twin waits between two looks
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (done / target).exists()
    os.kill(old, signal.SIGCONT)
    assert again.wait() == 0, again.told
    assert states(cluster.jobs(done)) == ["COMPLETED", "COMPLETED"] and new
    log = log_of(done, "twin")
    assert "another process is at work" in log and "\0" not in log
    assert log.index("waiting for it to end") < log.index("top-1")


def _text(directory: Path, teacher: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        return log_of(directory, teacher)
    return ""


# ---- changes ---------------------------------------------------------------------------------


def test_a_changed_lambda_submits_what_depends_on_it(cluster, done):
    presets = overlay(done, "methods: {wmdd: {lambda_bn: 3}}")
    target = "results/smoke/digits/labels/wmdd/wmdd/ipc1/labels.npy"
    run = cluster.run(done, target, *CPU_ONLY, presets=presets)
    assert run.wait() == 0, run.told
    assert rules_of(run.jobs()) == ["gather_images", *["recover_images"] * 3, "relabel_images"]
    assert all(job["Comment"].find("sre2l") < 0 for job in run.jobs())


# ---- many classes ----------------------------------------------------------------------------


@pytest.fixture
def thousand(tmp_path) -> Path:
    """A folder with features of 1,000 classes, 20 points each in 16 dimensions."""
    folder = tmp_path / "thousand/results/smoke/many/features/convnet"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    np.save(folder / "features.npy", generator.standard_normal((20_000, 16), dtype=np.float32))
    header = {"rule": "extract_features", "lineage": {}}
    index = {"offsets": list(range(0, 20_001, 20)), "dimension": 16, "header": header}
    (folder / "index.json").write_text(json.dumps(index))
    return tmp_path / "thousand"


MANY = """
datasets: {{many: {{source: imagefolder, classes: 1000, resolution: 8, teacher: convnet}}}}
classes_per_job: {}
"""
BARYCENTERS = "results/smoke/many/barycenters/convnet/learned/ipc2"


def test_a_thousand_classes_in_blocks_of_fifty(cluster, thousand, record_property):
    targets = [f"{BARYCENTERS}/class{first}-{first + 49}.npz" for first in range(0, 1000, 50)]
    began = time.monotonic()
    run = cluster.run(
        thousand,
        *targets,
        "--allowed-rules",
        "compute_barycenter",
        *CPU_ONLY,
        presets=overlay(thousand, MANY.format(50)),
    )
    assert run.wait() == 0, run.told
    wall = time.monotonic() - began
    assert rules_of(run.jobs()) == ["compute_barycenter"] * 20
    logs = (thousand / "results/smoke/logs/compute_barycenter").rglob("*.log")
    seconds = [float(s) for log in logs for s in re.findall(r", ([\d.]+) s$", log.read_text(), re.MULTILINE)]
    assert len(seconds) == 1000
    overhead = (wall - sum(seconds) / 2) / 1000
    record_property("overhead_per_class", overhead)
    print(
        f"1,000 classes: {wall:.0f} s of wall time, {sum(seconds):.0f} s of computing on two cores,"
        f" {overhead:.3f} s of overhead for each"
    )
    assert overhead < 0.5

    few = [f"{BARYCENTERS}/class{c}.npz" for c in (0, 1, 999)]
    single = cluster.run(
        thousand,
        *few,
        "--allowed-rules",
        "compute_barycenter",
        *CPU_ONLY,
        presets=overlay(thousand, MANY.format(1)),
    )
    assert single.wait() == 0, single.told
    assert len(single.jobs()) == 3
    for path, block, row in zip(few, (0, 0, 19), (0, 1, 49), strict=True):
        alone, among = np.load(thousand / path), np.load(thousand / targets[block])
        assert np.array_equal(alone["support"][0], among["support"][row])
        assert np.array_equal(alone["weights"][0], among["weights"][row])


# ---- the smoke preset by the profile as it is ------------------------------------------------


def test_slurm_gives_the_same_bytes_as_two_cores(smoke_run, smoke):
    assert smoke_run.wait(1800) == 0, smoke_run.told
    assert fingerprint(smoke_run.directory) == fingerprint(smoke)
    assert set(states(smoke_run.jobs())) == {"COMPLETED"}


def test_gpu_jobs_never_run_at_once_and_cpu_jobs_fill_in(smoke_run):
    smoke_run.wait(1800)

    def span(job: dict) -> tuple[float, float]:
        return tuple(
            time.mktime(time.strptime(job[key], "%Y-%m-%dT%H:%M:%S")) for key in ("StartTime", "EndTime")
        )

    with_gpu = [job for job in smoke_run.jobs() if "gres:gpu" in job.get("TresPerJob", "")]
    without = [job for job in smoke_run.jobs() if job not in with_gpu]
    wanted = {
        "pretrain_teacher",
        "extract_features",
        "recover_images",
        "relabel_images",
        "evaluate_student",
        "evaluate_all_real",
    }
    assert set(rules_of(with_gpu)) == wanted and not wanted & set(rules_of(without))
    spans = sorted(span(job) for job in with_gpu)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start, f"two GPU jobs at once: one ended at {end}, another began at {start}"
    beside = [
        job for job in without if any(span(job)[0] < end and start < span(job)[1] for start, end in spans)
    ]
    assert beside
