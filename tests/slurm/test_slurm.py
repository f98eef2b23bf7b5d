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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fingerprint, run_snakemake
from harness import FAILED, Cluster, Run, Unavailable, slurm_job_of, wait_until

pytestmark = pytest.mark.workflow

SMOKE = ROOT / "presets/smoke.yaml"
PART = (
    "results/smoke/digits/evaluation/wmdd/sre2l/ipc1/convnet/seed0.json",
    "results/smoke/digits/evaluation/own/all_real/ipcall/convnet/seed0.json",
    "results/smoke/digits/barycenters/convnet/learned/ipc1/class0.npz",
)
WITH_GPU = {
    "pretrain_teacher",
    "extract_features",
    "recover_images",
    "relabel_images",
    "evaluate_student",
    "evaluate_all_real",
}
LABELS = "results/smoke/digits/labels/wmdd/{}/ipc{}/labels.npy"
TEACHER = "results/smoke/digits/teachers/{}/checkpoint.safetensors"
CPU_ONLY = ("--set-resources", "describe_dataset:mem_mb=2000")
"""On the command line it takes the place of the profile's per-rule requests: no job asks for a GPU."""
ENDS = ("killed", "cancelled", "requeued", "overdue")
LONG = "{like: convnet, epochs: 40}"
TROUBLED = f"""
teachers: {{{", ".join(f"{name}: {LONG}" for name in ENDS)}}}
tables: {{main: {{ipc: [4], methods: [random]}}}}
"""
STUDENT = "results/smoke/digits/evaluation/wmdd/random/ipc4/convnet/seed0.json"
WATCHERS = ThreadPoolExecutor()
"""Threads that hold teachers still: each is at work for seconds only."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except Unavailable as reason:
            pytest.skip(f"no Slurm here: {reason}")
        yield running


# ---- what is begun ---------------------------------------------------------------------------
#
# Runs that stand for a scenario begin together, and tests wait for their ends: most of a job's time on a
# cluster is waiting.


@pytest.fixture(scope="session")
def copy_of_smoke(smoke, tmp_path_factory) -> Callable[[str], Path]:
    """Makes copies of a folder in which the smoke preset has been run: only what a test adds is to do."""
    return lambda name: Path(shutil.copytree(smoke, tmp_path_factory.mktemp(name) / name))


@pytest.fixture(scope="session")
def part_of_smoke(cluster, tmp_path_factory) -> Run:
    """Files of the smoke preset that take each kind of job, by the profile as it is."""
    return cluster.run(tmp_path_factory.mktemp("part"), *PART)


@pytest.fixture(scope="session")
def slow(cluster, copy_of_smoke) -> tuple[Run, Future]:
    """A teacher that is held at work, for Ctrl-C."""
    return begin_teacher(cluster, copy_of_smoke("slow"))


@pytest.fixture(scope="session")
def twin(cluster, copy_of_smoke) -> tuple[Run, Future]:
    """A teacher that is held at work, for a Snakemake that is killed."""
    return begin_teacher(cluster, copy_of_smoke("twin"))


def begin_teacher(cluster: Cluster, directory: Path) -> tuple[Run, Future]:
    """A teacher with the name of its folder; its process, once it is held at work."""
    name = directory.name
    presets = overlay(directory, f"teachers: {{{name}: {LONG}}}")
    run = cluster.run(directory, TEACHER.format(name), *CPU_ONLY, presets=presets)
    return run, WATCHERS.submit(stop_at_work, cluster, directory, (name,))


@pytest.fixture(scope="session")
def troubled(cluster, copy_of_smoke) -> Run:
    """Four teachers that are ended at work, each in its own way, and two jobs with too little memory."""
    directory = copy_of_smoke("troubled")
    run = cluster.run(
        directory,
        *map(TEACHER.format, ENDS),
        STUDENT,
        "--retries",
        "1",
        "--set-resources",
        "select_images:mem_mb=250 if attempt == 1 else 4000",
        "relabel_images:mem_mb=250",
        presets=overlay(directory, TROUBLED),
        jobs=6,
    )
    held = stop_at_work(cluster, directory, ENDS)
    jobs = {name: slurm_job_of(pid) for name, pid in held.items()}
    os.kill(held["killed"], signal.SIGKILL)
    cluster.call("scancel", jobs["cancelled"])
    cluster.call("scontrol", "requeue", jobs["requeued"])
    cluster.call("scontrol", "update", f"JobId={jobs['overdue']}", "TimeLimit=1")
    return run


@pytest.fixture(scope="session")
def changed_lambda(cluster, copy_of_smoke) -> Run:
    """The labels of a set after a change of its method's lambda_bn."""
    directory = copy_of_smoke("lambda")
    presets = overlay(directory, "methods: {sre2l: {lambda_bn: 5}}")
    return cluster.run(directory, LABELS.format("sre2l", 1), *CPU_ONLY, presets=presets)


@pytest.fixture(scope="session")
def hundred(cluster, tmp_path_factory) -> tuple[Run, Run]:
    """100 classes in blocks of 50, and one of them alone."""
    folder = tmp_path_factory.mktemp("hundred")
    return (
        begin_barycenters(cluster, folder / "fifty", 100, blocks_of_fifty(100)),
        begin_barycenters(cluster, folder / "one", 100, [range(99, 100)]),
    )


@pytest.fixture(scope="session")
def restarted(cluster, twin) -> tuple[int, Run]:
    """The process of a job whose Snakemake was killed, and a new Snakemake for the same file."""
    twin, held = twin
    directory, old = twin.directory, held.result()["twin"]
    twin.kill()
    assert states(cluster.active(directory)) == ["RUNNING"]  # nobody has cancelled it
    unlocked = run_snakemake(directory, "--unlock", "--configfile", *map(str, twin.presets), preset="")
    assert unlocked.returncode == 0, unlocked.stdout + unlocked.stderr
    return old, cluster.run(directory, TEACHER.format("twin"), *CPU_ONLY, presets=twin.presets)


@pytest.fixture(scope="session")
def interrupted(cluster, slow) -> Run:
    """The same command again, after Ctrl-C."""
    slow, held = slow
    held.result()
    slow.interrupt()
    assert slow.wait() != 0
    wait_until(lambda: not cluster.active(slow.directory), "the end of the cluster's jobs", 60)
    assert states(slow.jobs()) == ["CANCELLED"]
    return cluster.run(slow.directory, TEACHER.format("slow"), *CPU_ONLY, presets=slow.presets)


BEGUN = ("slow", "twin", "part_of_smoke", "troubled", "changed_lambda", "hundred", "restarted", "interrupted")
"""In the order in which they begin."""


@pytest.fixture(scope="session", autouse=True)
def begun(request):
    """Begin what the chosen tests ask for."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    for name in BEGUN:
        if name in wanted:
            request.getfixturevalue(name)


# ---- how it is looked at ---------------------------------------------------------------------


def overlay(directory: Path, text: str) -> tuple[Path, Path]:
    """The smoke preset and `text` laid over it."""
    path = directory.parent / f"{directory.name}.yaml"
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


def stop_at_work(cluster: Cluster, directory: Path, teachers: tuple[str, ...]) -> dict[str, int]:
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


def test_ctrl_c_cancels_the_jobs_and_a_rerun_goes_on(interrupted):
    assert interrupted.wait() == 0, interrupted.told
    assert states(interrupted.jobs()) == ["COMPLETED"]
    assert "resuming after step" in log_of(interrupted.directory, "slow")


def test_twins_never_work_at_the_same_time(cluster, restarted):
    old, again = restarted
    directory = again.directory
    folder = directory / "results/smoke/checkpoints/pretrain_teacher/dataset-digits"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    wait_until(lambda: "another process is at work" in _text(directory, "twin"), "the twin's wait")
    wait_until(
        lambda: [
            pid
            for pid, command in cluster.processes(directory).items()
            if command[1:3] == ["-m", "workflow_scripts.pretrain_teacher"] and pid != old
        ],
        "the twin",
    )
    assert states(cluster.active(directory)) == ["RUNNING", "RUNNING"]
    time.sleep(6)  # longer than the twin waits between two looks
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (directory / TEACHER.format("twin")).exists()
    os.kill(old, signal.SIGCONT)
    assert again.wait() == 0, again.told
    assert states(cluster.jobs(directory)) == ["COMPLETED", "COMPLETED"]
    log = log_of(directory, "twin")
    assert "another process is at work" in log and "\0" not in log
    assert log.index("waiting for it to end") < log.index("the other process has done the work")


def _text(directory: Path, teacher: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        return log_of(directory, teacher)
    return ""


def test_what_ends_a_job_is_seen_retried_resumed_and_reported(cluster, troubled, copy_of_smoke):
    untroubled = copy_of_smoke("untroubled")
    presets, targets = overlay(untroubled, TROUBLED), [TEACHER.format(name) for name in ENDS]
    told = run_snakemake(untroubled, "--cores", "2", *targets, "--configfile", *map(str, presets), preset="")
    assert told.returncode == 0, told.stdout + told.stderr
    assert troubled.wait() == 1, troubled.told  # what needs relabel_images could not be made
    jobs, directory = troubled.jobs(), troubled.directory
    by_end = {name: of_rule(jobs, "pretrain_teacher", "digits", name) for name in ENDS}
    assert states(by_end["killed"]) == ["FAILED", "COMPLETED"]
    assert states(by_end["cancelled"]) == ["CANCELLED", "COMPLETED"]
    assert states(by_end["overdue"]) == ["TIMEOUT", "COMPLETED"]
    assert states(by_end["requeued"]) == ["COMPLETED"] and by_end["requeued"][0]["Restarts"] == "1"
    # More of what helps: the profile doubles memory and time.
    for end in ("killed", "overdue"):
        assert [job["MinMemoryNode"] for job in by_end[end]] == ["2000M", "4000M"]
    assert [job["TimeLimit"] for job in by_end["killed"]] == ["00:30:00", "01:00:00"]
    assert [job["TimeLimit"] for job in by_end["overdue"]] == ["00:01:00", "01:00:00"]
    out_of_memory = of_rule(jobs, "select_images")
    assert states(out_of_memory)[-1] == "COMPLETED" and len(out_of_memory) == 2
    assert states(out_of_memory)[0] in FAILED

    # A job that is told to stop has time to save its state.
    for end in ("cancelled", "overdue"):
        number = by_end[end][0]["JobId"]
        (log,) = (directory / "results/logs/slurm").rglob(f"{number}.log")
        assert "returned non-zero exit status 75" in log.read_text(), end
    for name in ENDS:
        assert "resuming after step" in log_of(directory, name), name
        target = TEACHER.format(name)
        assert (directory / target).read_bytes() == (untroubled / target).read_bytes(), target

    # Retries are spent: the rule, its wildcards and the log are named.
    assert len(of_rule(jobs, "relabel_images")) == 2
    assert not of_rule(jobs, "evaluate_student")
    ending = troubled.told[troubled.told.rindex("Error in rule relabel_images") :]
    assert "results/smoke/logs/relabel_images/digits/wmdd/random/ipc4.log" in ending
    assert '"wildcards":{"dataset":"digits","ipc":"4","method":"random","recipe":"wmdd"}' in ending

    labels = LABELS.format("random", 4)
    again = cluster.run(directory, *targets, labels, *CPU_ONLY, presets=troubled.presets)
    assert again.wait() == 0, again.told
    assert rules_of(again.jobs()) == ["relabel_images"] and (directory / labels).exists()


# ---- changes ---------------------------------------------------------------------------------


def test_a_changed_lambda_submits_what_depends_on_it(changed_lambda):
    assert changed_lambda.wait() == 0, changed_lambda.told
    jobs = changed_lambda.jobs()
    assert rules_of(jobs) == ["gather_images", "recover_images", "relabel_images"]
    assert all("sre2l" in job["Comment"] for job in jobs)


# ---- the smoke preset by the profile as it is ------------------------------------------------


def assert_gpu_jobs_take_turns(jobs: list[dict]) -> None:
    """Jobs that use the one GPU follow one another; others run beside them."""
    with_gpu = [job for job in jobs if "gres:gpu" in job.get("TresPerJob", "")]
    without = [job for job in jobs if job not in with_gpu]
    assert set(rules_of(with_gpu)) == WITH_GPU and not WITH_GPU & set(rules_of(without))
    spans = sorted(map(span, with_gpu))
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start, f"two GPU jobs at once: one ended at {end}, another began at {start}"
    assert any(overlap(span(job), other) for job in without for other in spans)


def span(job: dict) -> tuple[float, float]:
    """When a job began and ended, in seconds since the epoch."""
    return tuple(
        time.mktime(time.strptime(job[key], "%Y-%m-%dT%H:%M:%S")) for key in ("StartTime", "EndTime")
    )


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_slurm_gives_the_same_bytes_as_two_cores(part_of_smoke, smoke):
    assert part_of_smoke.wait() == 0, part_of_smoke.told
    assert set(states(part_of_smoke.jobs())) == {"COMPLETED"}
    made = fingerprint(part_of_smoke.directory)
    assert {target.removeprefix("results/smoke/") for target in PART} <= made.keys()
    assert made.items() <= fingerprint(smoke).items()


def test_gpu_jobs_never_run_at_once_and_cpu_jobs_fill_in(part_of_smoke):
    assert part_of_smoke.wait() == 0, part_of_smoke.told
    assert_gpu_jobs_take_turns(part_of_smoke.jobs())


@pytest.mark.large
def test_the_whole_smoke_preset(cluster, smoke, tmp_path):
    run = cluster.run(tmp_path / "whole")
    assert run.wait() == 0, run.told
    assert set(states(run.jobs())) == {"COMPLETED"}
    assert fingerprint(run.directory) == fingerprint(smoke)
    assert_gpu_jobs_take_turns(run.jobs())


# ---- many classes ----------------------------------------------------------------------------

MANY = """
datasets: {{many: {{source: imagefolder, root: images, classes: {}, resolution: 8, teacher: convnet}}}}
classes_per_job: {}
"""
BARYCENTERS = "results/smoke/many/barycenters/convnet/learned/ipc2"


def begin_barycenters(cluster: Cluster, directory: Path, classes: int, blocks: list[range]) -> Run:
    """Barycenters of these blocks, of equally many classes, of features of `classes` classes."""
    folder = directory / "results/smoke/many/features/convnet"
    folder.mkdir(parents=True, exist_ok=True)
    features = np.random.default_rng(0).standard_normal((20 * classes, 16), dtype=np.float32)
    np.save(folder / "features.npy", features)
    offsets = list(range(0, len(features) + 1, 20))
    index = {
        "offsets": offsets,
        "dimension": 16,
        "header": {"rule": "extract_features", "lineage": {}},
    }
    (folder / "index.json").write_text(json.dumps(index))
    return cluster.run(
        directory,
        *map(barycenter_of, blocks),
        "--allowed-rules",
        "compute_barycenter",
        *CPU_ONLY,
        presets=overlay(directory, MANY.format(classes, len(blocks[0]))),
    )


def barycenter_of(block: range) -> str:
    """The file of a block of classes."""
    last = f"-{block[-1]}" if len(block) > 1 else ""
    return f"{BARYCENTERS}/class{block[0]}{last}.npz"


def blocks_of_fifty(classes: int) -> list[range]:
    return [range(first, first + 50) for first in range(0, classes, 50)]


def test_blocks_of_classes_give_the_bytes_of_a_job_per_class(hundred):
    fifty, one = hundred
    for run, jobs in ((fifty, 2), (one, 1)):
        assert run.wait() == 0, run.told
        assert rules_of(run.jobs()) == ["compute_barycenter"] * jobs
    alone = np.load(one.directory / barycenter_of(range(99, 100)))
    among = np.load(fifty.directory / barycenter_of(range(50, 100)))
    for name in ("support", "weights"):
        assert np.array_equal(alone[name][0], among[name][49])


@pytest.mark.large
def test_a_thousand_classes(cluster, tmp_path):
    began = time.monotonic()
    run = begin_barycenters(cluster, tmp_path / "thousand", 1000, blocks_of_fifty(1000))
    assert run.wait() == 0, run.told
    wall = time.monotonic() - began
    assert rules_of(run.jobs()) == ["compute_barycenter"] * 20

    # The same without Slurm, in one process on one core.
    whole = barycenter_of(range(1000))
    presets = map(str, overlay(run.directory, MANY.format(1000, 1000)))
    rule = ("--allowed-rules", "compute_barycenter")
    began = time.monotonic()
    told = run_snakemake(run.directory, "--cores", "1", whole, *rule, "--configfile", *presets, preset="")
    plain = time.monotonic() - began
    assert told.returncode == 0, told.stdout + told.stderr
    print(
        f"1,000 classes: {wall:.0f} s in 20 jobs of Slurm on {os.cpu_count()} cores,"
        f" {plain:.0f} s in one process"
    )
    assert wall / 1000 < 0.5  # all of it, so the overhead above computing is less


# ---- timing ----------------------------------------------------------------------------------


@pytest.mark.large
def test_shards_at_once_give_the_same_bytes_and_their_time_is_told(cluster, copy_of_smoke):
    """Strong scaling of recovery: ten shards, one job at a time and two."""
    taken, made = [], []
    for jobs in (1, 2):
        directory = copy_of_smoke(f"shards{jobs}")
        presets = overlay(directory, "methods: {wmdd: {iterations: 2000, batch_size: 2}}")
        shards = "results/smoke/digits/distilled/wmdd/ipc2/shards/shard{}.safetensors"
        run = cluster.run(directory, *map(shards.format, range(10)), *CPU_ONLY, presets=presets, jobs=jobs)
        assert run.wait() == 0, run.told
        assert rules_of(run.jobs()) == ["recover_images"] * 10
        spans = sorted(map(span, run.jobs()))
        assert any(overlap(*pair) for pair in itertools.pairwise(spans)) == (jobs == 2)
        taken.append(max(end for _, end in spans) - spans[0][0])
        made.append([(directory / shards.format(shard)).read_bytes() for shard in range(10)])
    assert made[0] == made[1]
    print(
        f"10 shards: {taken[0]:.0f} s one at a time, {taken[1]:.0f} s two at a time ({os.cpu_count()} cores)"
    )


@pytest.mark.large
def test_timed_methods_have_the_node_to_themselves(cluster, copy_of_smoke):
    done = copy_of_smoke("timed")
    presets = overlay(done, "figures: {efficiency: {iterations: 5, projected_iterations: 10}}")
    table = "results/smoke/report/tables/efficiency.csv"
    others = [f"results/smoke/digits/barycenters/convnet/learned/ipc3/class{c}.npz" for c in range(3)]
    run = cluster.run(done, table, *others, presets=presets)
    assert run.wait() == 0, run.told
    assert rules_of(run.jobs()) == [*["compute_barycenter"] * 3, "measure_efficiency", "tabulate_efficiency"]
    timed = span(*of_rule(run.jobs(), "measure_efficiency"))
    for job in of_rule(run.jobs(), "compute_barycenter"):
        assert not overlap(timed, span(job)), job["Comment"]
