"""A repair of Snakemake's scheduler, which would otherwise take more time the more jobs have ended."""

from __future__ import annotations

import threading
import time

from snakemake.scheduling.job_scheduler import JobScheduler


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


def repair_scheduler() -> None:
    """Put `look_again_once` in the place of Snakemake's own method."""
    JobScheduler._schedule_reevalutation = look_again_once
