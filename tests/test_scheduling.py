"""What is repaired of Snakemake: looks at the ready jobs, Ctrl-C while jobs are asked after, failed jobs."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, run_snakemake
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

from rules.scheduling import cancel_running, look_again_once, remember_submission

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
