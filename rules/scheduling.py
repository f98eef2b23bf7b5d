"""Three repairs of Snakemake: looks that multiply, jobs that Ctrl-C leaves, failures that look done."""

from __future__ import annotations

import threading
import time

from snakemake.jobs import Job
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

_report_submission = RemoteExecutor.report_job_submission
_postprocess = Job.postprocess


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
    _report_submission(executor, info, *args, **options)


def cancel_running(executor: RemoteExecutor) -> None:
    """Cancel every job that was submitted and has not ended.

    Snakemake's own method cancels those on the executor's list, from which a check of their states takes
    all of them until it has their answers. Ctrl-C meanwhile left them running.
    """
    running = executor.workflow.scheduler.running
    submissions = getattr(executor, "_last_submissions", {})
    executor.cancel_jobs([info for job, info in submissions.items() if job in running])
    executor.shutdown()


async def forget_failed(job: Job, *args: object, error: bool = False, **options: object) -> None:
    """Clean up after a job as Snakemake does, and forget one that failed.

    Snakemake records a failed job as if it had succeeded: with its settings, and the checksums of its inputs.
    An input that had changed then counts as one that the job has seen, its output, which is gone, as not
    needed while what was made of it is there: the next run would leave all that as it is.
    """
    await _postprocess(job, *args, error=error, **options)
    workflow = job.dag.workflow
    if error and workflow.is_main_process and not workflow.execution_settings.keep_incomplete:
        workflow.persistence.cleanup(job)


def repair_scheduler() -> None:
    """Put the functions of this module in the place of Snakemake's own."""
    JobScheduler._schedule_reevalutation = look_again_once
    RemoteExecutor.report_job_submission = remember_submission
    RemoteExecutor.cancel = cancel_running
    Job.postprocess = forget_failed
