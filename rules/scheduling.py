"""Repairs of Snakemake and its Slurm plugin: looks that multiply, jobs that are left or waited for without
end, failures and unseen ends that look done, locks of others, reasons that nobody can read.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from snakemake.jobs import Job
from snakemake.persistence import ParamsChange, PersistenceBase
from snakemake.persistence.file import FilePersistence
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

_report_submission = RemoteExecutor.report_job_submission
_postprocess = Job.postprocess
_finished = PersistenceBase.finished
_run_job_pre = RemoteExecutor.run_job_pre


TOLD, TOLD_LENGTH = 8, 40
"""Most differences that a reason names, and the longest value that it shows."""


def look_again_once(scheduler: JobScheduler, delay: float) -> None:
    """Wake the scheduler after `delay` seconds, unless a timer that will is already set.

    Snakemake 9 sets a timer after every look at the ready jobs, because of its limit of jobs per
    timespan, and each timer causes another look: every job that ends adds one look per timespan for as
    long as jobs are ready. After 150 jobs the main process took a quarter of a core, after thousands
    it would be busy with nothing else.
    """
    now = time.monotonic()
    if now < getattr(scheduler, "_look_due", 0.0):
        return
    scheduler._look_due = now + delay
    timer = threading.Timer(delay, scheduler._open_jobs.release)
    timer.daemon = True  # a finished run does not wait for it
    timer.start()


def remember_submission(executor: RemoteExecutor, info: object, *args: object, **options: object) -> None:
    """Report a submission as Snakemake does, and keep the last one of each job."""
    executor.__dict__.setdefault("_last_submissions", {})[info.job] = info
    plugin = sys.modules[type(executor).__module__]
    if hasattr(plugin, "query_job_status"):
        settle_answers(plugin).submitted.add(info.external_jobid)
    _report_submission(executor, info, *args, **options)


def remove_old_outputs(executor: RemoteExecutor, job: Job) -> None:
    """Announce a job that is to be submitted as Snakemake does, and remove what an earlier one has made.

    Snakemake removes it where the job runs. If that is cancelled before, and nobody sees it, the old outputs
    would be taken for the new ones.
    """
    _run_job_pre(executor, job)
    if not executor.workflow.is_main_process:
        return
    for path in map(str, job.output):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


def cancel_running(executor: RemoteExecutor) -> None:
    """Cancel every job that was submitted and has not ended, and those that are about to be.

    Snakemake's own method cancels those on the executor's list, from which a check of their states takes
    all of them until it has their answers. Ctrl-C meanwhile left them running. The Slurm plugin submits in
    threads, and would submit all that wait there after the others had been cancelled.
    """
    if waiting := getattr(executor, "_job_submission_executor", None):
        waiting.shutdown(wait=True, cancel_futures=True)
    running = executor.workflow.scheduler.running
    submissions = getattr(executor, "_last_submissions", {})
    executor.cancel_jobs([info for job, info in submissions.items() if job in running])
    executor.shutdown()


async def forget_failed(job: Job, *args: object, error: bool = False, **options: object) -> None:
    """Clean up after a job as Snakemake does, and forget one that failed.

    Snakemake records a failed job as if it had succeeded: with its settings, and the checksums of its inputs.
    An input that had changed then counts as one that the job has seen, its output, which is gone, as not
    needed while what was made of it is there: the next run would leave all that as it is. The mark of a job
    that has begun stays: an output that a slow file system shows only now counts as half-made.
    """
    await _postprocess(job, *args, error=error, **options)
    workflow = job.dag.workflow
    if error and workflow.is_main_process and not workflow.execution_settings.keep_incomplete:
        workflow.persistence.cleanup(job)
        workflow.persistence.started(job)


async def record_where_it_is_seen(persistence: PersistenceBase, job: Job) -> None:
    """Record the end of a job in the process that runs the workflow, and nowhere else.

    A Snakemake inside a cluster's job would take away the mark that the job has begun, and record nothing.
    Had the run been ended meanwhile, the job's outputs would count as made, by whatever was on record.
    """
    workflow = persistence.dag.workflow
    if workflow.is_main_process or workflow.remote_execution_settings.immediate_submit:
        await _finished(persistence, job)


def delete_own_locks(persistence: FilePersistence) -> None:
    """Give back what this run has locked.

    Snakemake removes the whole folder: the first of two runs to end would unlock the files of the other.
    """
    for path in persistence._lockfile.values():
        Path(path).unlink(missing_ok=True)
    persistence._lockfile.clear()


def delete_all_locks(persistence: FilePersistence) -> None:
    """Give back what any run has locked, for `--unlock`."""
    for path in Path(persistence._lockdir).glob("*.lock"):
        path.unlink(missing_ok=True)


def tell_change(change: ParamsChange) -> str:
    """What differs between a job's settings before and now.

    Snakemake prints both as they are, those of a page with the whole configuration twice.
    """
    before, now = (_settings_among(values) for values in (change.only_old, change.only_new))
    told = []
    for key in sorted({*before, *now}):
        old, new = (json.dumps(s[key], ensure_ascii=False) if key in s else "–" for s in (before, now))
        if old != new:
            told.append(f"{key}: {old} → {new}" if max(len(old), len(new)) <= TOLD_LENGTH else key)
    if len(told) > TOLD:
        told[TOLD:] = [f"{len(told) - TOLD} more"]
    return ", ".join(told) or "its code, or the settings or the code of a step before it"


def _settings_among(values: Iterable[str]) -> dict[str, object]:
    """The settings among a job's parameters as Snakemake records them, by key, nested ones as `a.b`."""
    found = {}
    for value in values:
        with contextlib.suppress(ValueError, SyntaxError):  # a digest is no JSON
            settings = json.loads(ast.literal_eval(value))
            found |= _flat(settings) if isinstance(settings, dict) else {}
    return found


def _flat(settings: object, place: str = "") -> dict[str, object]:
    if not isinstance(settings, dict):
        return {place: settings}
    found = {}
    for key, value in settings.items():
        found |= _flat(value, f"{place}.{key}" if place else key)
    return found


class Answers:
    """What Slurm says of jobs, with the ends that its plugin would wait for without end told in its words."""

    def __init__(self) -> None:
        self.submitted: set[str] = set()
        self.counts: dict[str, tuple[str, int]] = {}

    def settle(self, states: dict[str, str], prompt: bool) -> dict[str, str]:
        """States by job. A job that two answers in a row leave out is `UNKNOWN`: Snakemake then looks for its
        outputs. One that two call preempted or ended by its node was not queued again: `FAILED`. Only a
        `prompt` source knows every job from its submission on. "CANCELLED by 1000" loses the user.
        """
        states = {job: state.split()[0] if state else state for job, state in states.items()}
        for job in {*self.counts, *states, *(self.submitted if prompt else ())}:
            state = states.get(job, "")
            last, count = self.counts.get(job, ("", 0))
            self.counts[job] = state, count + 1 if state == last else 1
        twice = {job: state for job, (state, count) in self.counts.items() if count > 1}
        ends = {"": "UNKNOWN", "PREEMPTED": "FAILED", "NODE_FAIL": "FAILED"}
        return {**states, **{job: ends[state] for job, state in twice.items() if state in ends}}


def settle_answers(plugin: ModuleType) -> Answers:
    """Let the Slurm plugin see states as `Answers` settles them, from the first call on."""
    query = plugin.query_job_status
    if hasattr(query, "answers"):
        return query.answers
    answers = Answers()

    async def settled(command: str, logger: object) -> tuple:
        states, seconds = await query(command, logger)
        prompt = command.startswith("squeue")  # sacct's database may be behind, or away
        return (states if states is None else answers.settle(states, prompt)), seconds

    settled.answers = answers
    plugin.query_job_status = settled
    return answers


def repair_scheduler() -> None:
    """Put the functions of this module in the place of Snakemake's own and its plugin's."""
    JobScheduler._schedule_reevalutation = look_again_once
    RemoteExecutor.report_job_submission = remember_submission
    RemoteExecutor.cancel = cancel_running
    Job.postprocess = forget_failed
    PersistenceBase.finished = record_where_it_is_seen
    RemoteExecutor.run_job_pre = remove_old_outputs
    FilePersistence._delete_locks = delete_own_locks
    FilePersistence.cleanup_locks = delete_all_locks
    ParamsChange.__str__ = tell_change
