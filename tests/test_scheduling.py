"""The repaired scheduler looks at the ready jobs when something ends, and otherwise once per timespan."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, run_snakemake
from snakemake.scheduling.job_scheduler import JobScheduler

from rules.scheduling import look_again_once

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
