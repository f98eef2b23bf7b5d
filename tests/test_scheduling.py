"""What is repaired of Snakemake and its Slurm plugin (rules/scheduling.py), and of the shell of its jobs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, run_snakemake
from snakemake.persistence import ParamsChange
from snakemake.persistence.file import FilePersistence
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

from rules import scheduling
from rules.scheduling import (
    Answers,
    cancel_running,
    delete_all_locks,
    delete_own_locks,
    look_again_once,
    remember_submission,
    remove_old_outputs,
    settle_answers,
    tell_change,
)
from wmdd_core.digests import digest

WORKFLOW = """
import sys
sys.path.insert(0, {root!r})
from snakemake.scheduling.job_scheduler import JobScheduler
if {repaired}:
    from rules.scheduling import repair_scheduler
    repair_scheduler()
looks = 0
select = JobScheduler.job_selector
def counted(self, jobs):
    global looks
    looks += 1
    return select(self, jobs)
JobScheduler.job_selector = counted
onsuccess:
    print("looks:", looks)
rule all:
    input: expand("done/{{i}}", i=range(24))
rule one:
    output: touch("done/{{i}}")
    shell: "sleep 0.2"
"""


def looks_of(directory: Path, repaired: bool) -> int:
    directory.mkdir()
    (directory / "Snakefile").write_text(WORKFLOW.format(root=str(ROOT), repaired=repaired))
    done = run_snakemake(directory, "--cores", "1", root=directory, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"^looks: (\d+)$", done.stdout + done.stderr, re.MULTILINE)[1])


def test_looks_grow_with_the_jobs_and_not_with_their_square(tmp_path):
    repaired, plain = looks_of(tmp_path / "repaired", True), looks_of(tmp_path / "plain", False)
    assert repaired <= 24 + 10  # one for each job that ends, one for each second
    assert plain > 2 * repaired  # when this fails, Snakemake needs no repair any more


FAILING = """
import sys
sys.path.insert(0, {root!r})
if {repaired}:
    from rules.scheduling import repair_scheduler
    repair_scheduler()
rule all:
    input: "last"
rule first:
    input: "source"
    output: "first"
    shell: "cp {{input}} {{output}}; test ! -e broken"
rule last:
    input: "first"
    output: "last"
    shell: "cp {{input}} {{output}}"
"""


def plans_after_a_failure(directory: Path, repaired: bool) -> bool:
    """Whether a run plans what an input has outdated, when the run that first saw the input has failed."""
    directory.mkdir()
    (directory / "Snakefile").write_text(FAILING.format(root=str(ROOT), repaired=repaired))
    source, broken = directory / "source", directory / "broken"
    source.write_text("one")
    os.utime(source, (10**9, 10**9))

    def run(*options: str):
        return run_snakemake(directory, *options, root=directory, preset="")

    assert run("--cores", "1").returncode == 0
    source.write_text("two")
    os.utime(source, (time.time() + 2, time.time() + 2))  # newer than `last`, whose time is coarse
    broken.touch()
    assert run("--cores", "1").returncode == 1
    assert not (directory / "first").exists()
    broken.unlink()
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    return "rule last" in done.stdout + done.stderr


def test_what_a_failed_job_should_have_renewed_is_planned_again(tmp_path):
    assert plans_after_a_failure(tmp_path / "repaired", True)
    # When this fails, Snakemake needs no repair any more.
    assert not plans_after_a_failure(tmp_path / "plain", False)


def seen_as_half_made(directory: Path, repaired: bool) -> bool:
    """Whether an output counts as half-made whose job ended where nobody saw it, as in a cluster's job."""
    directory.mkdir()
    (directory / "Snakefile").write_text(FAILING.format(root=str(ROOT), repaired=repaired))
    (directory / "source").touch()

    def run(*options: str):
        return run_snakemake(directory, *options, root=directory, preset="")

    assert run("--cores", "1", "--mode", "remote", "--nolock", "first").returncode == 0
    assert (directory / "first").exists()
    done = run("--dry-run", "--rerun-incomplete", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    return "rule first" in done.stdout + done.stderr


def test_a_job_whose_end_nobody_saw_is_made_again(tmp_path):
    assert seen_as_half_made(tmp_path / "repaired", True)
    # When this fails, Snakemake needs no repair any more.
    assert not seen_as_half_made(tmp_path / "plain", False)


def test_a_run_that_ends_leaves_the_locks_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(FilePersistence, "_delete_locks", delete_own_locks)
    monkeypatch.setattr(FilePersistence, "cleanup_locks", delete_all_locks)
    one, other, third = (FilePersistence(path=tmp_path) for _ in range(3))
    one._write_locks("output", ["a"])
    other._write_locks("output", ["b"])
    one.unlock()
    assert list(third._read_locks()) == [("output", "b")]
    other.unlock()
    third._write_locks("output", ["c"])
    FilePersistence(path=tmp_path).unlock()  # of a run that had nothing to lock
    assert list(other._read_locks()) == [("output", "c")]
    FilePersistence(path=tmp_path).cleanup_locks()  # as --unlock does
    assert list(third._read_locks()) == []


def test_a_reason_names_the_settings_that_differ():
    def recorded(**settings) -> set[str]:  # as Snakemake keeps parameters, a digest among them
        return {repr(json.dumps(settings)), repr(digest(settings))}

    before = recorded(lambda_bn=30, start="noise", sharding={"batch_size": 10, "classes": 10}, old=1)
    now = recorded(lambda_bn=0.5, start="noise", sharding={"batch_size": 5, "classes": 10}, items=["i"] * 20)
    told = "items, lambda_bn: 30 → 0.5, old: 1 → –, sharding.batch_size: 10 → 5"
    assert tell_change(ParamsChange(before, now)) == told
    many = ParamsChange(recorded(**{f"k{i:02}": 0 for i in range(30)}), recorded())
    assert tell_change(many).endswith("k07: 0 → –, 22 more")
    assert tell_change(ParamsChange({repr("aa")}, {repr("12")})).startswith("its code, or the settings")


def test_answers_that_the_plugin_would_wait_for_are_settled():
    answers = Answers()
    answers.submitted.add("3")  # which ends before anybody asks
    told = [
        ({"1": "RUNNING", "2": "PENDING"}, {"1": "RUNNING", "2": "PENDING"}),
        ({"1": "PREEMPTED"}, {"1": "PREEMPTED"}),
        ({"1": "PENDING"}, {"1": "PENDING", "2": "UNKNOWN"}),  # 1 was queued again; 2 is gone twice
        ({"1": "PREEMPTED", "2": "RUNNING"}, {"1": "PREEMPTED", "2": "RUNNING"}),
        ({"1": "PREEMPTED", "2": "CANCELLED by 1000"}, {"1": "FAILED", "2": "CANCELLED"}),
        ({"1": "NODE_FAIL", "2": "NODE_FAIL"}, {"1": "NODE_FAIL", "2": "NODE_FAIL"}),
        ({"1": "PENDING", "2": "NODE_FAIL"}, {"1": "PENDING", "2": "FAILED"}),  # 1 was queued again
    ]
    for given, wanted in told:
        assert answers.settle(given, prompt=False) == wanted
    assert "3" not in answers.settle({}, prompt=True)
    assert answers.settle({}, prompt=True)["3"] == "UNKNOWN"


def test_the_plugin_asks_through_the_settled_answers():
    given = iter([(None, None), ({"1": "PREEMPTED"}, 0.1), ({"1": "PREEMPTED"}, 0.2)])

    async def answer(command, logger):
        return next(given)

    plugin = SimpleNamespace(query_job_status=answer)
    settle_answers(plugin)
    settle_answers(plugin)  # once is enough: twice would count each answer twice
    found = [asyncio.run(plugin.query_job_status("squeue", None)) for _ in range(3)]
    assert found == [(None, None), ({"1": "PREEMPTED"}, 0.1), ({"1": "FAILED"}, 0.2)]
    import snakemake_executor_plugin_slurm

    assert asyncio.iscoroutinefunction(snakemake_executor_plugin_slurm.query_job_status)


def test_what_an_earlier_job_has_made_goes_before_a_job_is_submitted(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduling, "_run_job_pre", lambda executor, job: None)
    (tmp_path / "png").mkdir()
    for name in ("image", "png/0.png", "log"):
        (tmp_path / name).touch()
    job = SimpleNamespace(output=[tmp_path / "image", tmp_path / "png", tmp_path / "missing"])
    remove_old_outputs(SimpleNamespace(workflow=SimpleNamespace(is_main_process=False)), job)
    assert (tmp_path / "image").exists()
    remove_old_outputs(SimpleNamespace(workflow=SimpleNamespace(is_main_process=True)), job)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_ctrl_c_submits_nothing_more():
    cluster, started = Cluster(running=set()), threading.Event()
    cluster._job_submission_executor = ThreadPoolExecutor(1)
    submitted = []

    def submit(number: int) -> None:
        started.set()
        time.sleep(0.2)
        job = Job(number)
        cluster.workflow.scheduler.running.add(job)
        remember_submission(cluster, SimpleNamespace(job=job, external_jobid=number))
        submitted.append(number)

    for number in range(10):
        cluster._job_submission_executor.submit(submit, number)
    assert started.wait(10)
    cluster.wait_thread.start()
    cancel_running(cluster)
    time.sleep(0.5)
    assert submitted == cluster.cancelled == [0]


def terminated(prefix: str, tmp_path: Path) -> tuple[int, bool]:
    """Exit status of a rule's shell whose processes all get SIGTERM, and whether its script could finish."""
    program = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: stop())\n"
    program += "def stop():\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
    program += "pathlib.Path('begun').touch()\ntime.sleep(60)\n"
    (tmp_path / "script.py").write_text(program)
    command = f"{prefix} printf x | {sys.executable} script.py > log 2>&1"
    shell = subprocess.Popen(
        ["bash", "-c", command], cwd=tmp_path, start_new_session=True, env={**os.environ, "WMDD_ROOT": "here"}
    )
    while not (tmp_path / "begun").exists():
        assert shell.poll() is None
        time.sleep(0.02)
    os.killpg(shell.pid, signal.SIGTERM)
    status = shell.wait(10)
    return status, (tmp_path / "saved").exists()


def test_a_script_that_is_told_to_stop_ends_before_its_shell(tmp_path):
    rules = (ROOT / "rules/common.smk").read_text(encoding="utf-8")
    (prefix,) = re.findall(r"^shell\.prefix\('(.*)'\)$", rules, re.MULTILINE)
    assert terminated(prefix.format(), tmp_path) == (75, True)


def test_a_script_is_found_where_conda_has_taken_pythonpath_away(tmp_path):
    rules = (ROOT / "rules/common.smk").read_text(encoding="utf-8")
    (prefix,) = re.findall(r"^shell\.prefix\('(.*)'\)$", rules, re.MULTILINE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"WMDD_ROOT": str(ROOT)}
    command = f"{prefix.format()} {sys.executable} -m workflow_scripts.gather_images --help"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_timer_is_set_only_where_none_is_due():
    woken = threading.Semaphore(0)
    scheduler = SimpleNamespace(_open_jobs=woken)
    for _ in range(100):
        look_again_once(scheduler, 0.05)
    assert woken.acquire(timeout=5)
    time.sleep(0.1)
    assert not woken.acquire(blocking=False)
    look_again_once(scheduler, 0.01)
    assert woken.acquire(timeout=5)


def test_snakemake_still_has_what_is_repaired():
    assert callable(JobScheduler._schedule_reevalutation)


OWN_CANCEL = RemoteExecutor.cancel


class Job(str):
    def register(self, external_jobid: int) -> None:
        """Snakemake keeps the number."""


class Cluster(RemoteExecutor):
    """An executor whose check of the jobs' states waits until it may answer."""

    def __init__(self, running: set[str]) -> None:
        settings = SimpleNamespace(init_seconds_before_status_checks=0)
        self.workflow = SimpleNamespace(
            scheduler=SimpleNamespace(running=running, submit_callback=lambda job: None),
            executor_plugin=SimpleNamespace(common_settings=settings),
            remote_execution_settings=SimpleNamespace(immediate_submit=True),
        )
        self.active_jobs, self.lock, self.wait = [], threading.Lock(), True
        self.asked, self.answer, self.cancelled = threading.Event(), threading.Event(), []
        self.wait_thread = threading.Thread(target=self._wait_thread, daemon=True)

    async def check_active_jobs(self, active_jobs):
        self.asked.set()
        self.answer.wait(10)
        for info in active_jobs:
            yield info

    async def sleep(self):
        pass

    def cancel_jobs(self, active_jobs):
        self.cancelled += [info.external_jobid for info in active_jobs]
        self.answer.set()

    def run_job(self, job):
        raise NotImplementedError


def cancelled_during_a_check(cancel, report) -> list[int]:
    cluster = Cluster(running={Job("a"), Job("b")})
    for number, job in enumerate(["a", "ended", "b", "a"]):  # the first try of a has failed
        report(cluster, SimpleNamespace(job=Job(job), external_jobid=number))
    cluster.wait_thread.start()
    assert cluster.asked.wait(10)
    cancel(cluster)
    return sorted(cluster.cancelled)


def test_ctrl_c_cancels_jobs_that_are_being_asked_after():
    assert cancelled_during_a_check(cancel_running, remember_submission) == [2, 3]


def test_snakemake_alone_leaves_them_running():
    """When this fails, Snakemake needs no repair any more."""
    assert cancelled_during_a_check(OWN_CANCEL, RemoteExecutor.report_job_submission) == []
