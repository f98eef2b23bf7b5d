"""Long loops: a line now and then, a checkpoint now and then, and going on after a kill."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import numpy as np

from wmdd_core.artifacts import replacing, temporary_path

STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals that a loop is told to stop by."""

RESUMABLE_EXIT = 75
"""Exit status of a job that was told to stop and has saved its state (EX_TEMPFAIL)."""


class Progress:
    """Reports the progress of one loop and saves its state.

    A loop asks `resume` for a state to go on from and calls `step` after each step. `checkpoint`
    is where states go (None: nowhere); `stamp` identifies the exact settings and inputs, and a
    checkpoint with another stamp is ignored and removed. On SIGTERM or Ctrl-C the state is saved
    at the end of the step and the process exits with status 75; a second Ctrl-C ends it at once.
    """

    def __init__(
        self,
        label: str,
        checkpoint: Path | None = None,
        stamp: str = "",
        *,
        report_every: float = 10.0,
        save_every: float = 60.0,
    ) -> None:
        self.label, self.checkpoint, self.stamp = label, checkpoint, stamp
        self.report_every, self.save_every = report_every, save_every
        self.started = self.reported = self.saved = time.monotonic()
        self.first: int | None = None
        self.terminated = False
        self.filled: np.memmap | None = None
        for number in STOPS if checkpoint is not None else ():
            if signal.getsignal(number) != signal.SIG_IGN:  # as Ctrl-C is for what runs in the background
                signal.signal(number, self._terminate)

    def _terminate(self, number: int, _frame: object) -> None:
        self.terminated = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def resume(self) -> dict | None:
        """The saved state of these very settings, or None to start afresh."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        import torch

        try:
            # On the CPU: the GPU that it was saved from may be another one, or gone.
            saved = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (EOFError, RuntimeError, UnpicklingError) as error:  # by a power cut or a full disk
            self._say(f"the checkpoint is damaged ({type(error).__name__}) and is ignored; starting afresh")
            self.checkpoint.unlink()
            return None
        if saved["stamp"] != self.stamp:
            self._say("a checkpoint of other settings or inputs was found and is ignored; starting afresh")
            # Arrays beside it are overwritten from now on: going back to those settings must not find it.
            self.checkpoint.unlink()
            return None
        self._say(f"resuming after step {saved['index'] + 1}")
        return saved["state"]

    def step(
        self,
        index: int,
        total: int,
        state: Callable[[], dict],
        figures: Callable[[], dict[str, float]],
    ) -> None:
        """Step `index` (from 0) of `total` is done; the callables are called only when they are needed."""
        now = time.monotonic()
        self.first = index if self.first is None else self.first
        if now - self.reported >= self.report_every or index + 1 == total:
            self.reported = now
            left = (now - self.started) / max(1, index + 1 - self.first) * (total - index - 1)
            told = "  ".join(f"{k} {v:.4g}" for k, v in figures().items())
            self._say(f"{index + 1}/{total}  {told}  {now - self.started:.0f} s, {left:.0f} s left")
        if self.checkpoint is not None and (self.terminated or now - self.saved >= self.save_every):
            self._save(index, state())
            self.saved = time.monotonic()
        if self.terminated:
            self._say("told to stop; the state is saved and the next run goes on from it")
            sys.exit(RESUMABLE_EXIT)

    def array(self, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
        """A memory-mapped array for the loop to fill, kept beside the checkpoint so that it survives a kill.

        Ask for it before `resume`: where it is missing or of another shape, what the checkpoint says of
        it is void and the loop starts afresh. Raises `OSError`, with its name, on a full disk.
        """
        self.filled = self._opened_array(self.partial, dtype, shape)
        return self.filled

    def _opened_array(self, path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and self.checkpoint.exists():
            try:
                found = np.lib.format.open_memmap(path, mode="r+")
                if found.shape == shape and found.dtype == dtype:
                    return found
            except ValueError:
                self._say("the array beside the checkpoint is damaged; starting afresh")
        self.checkpoint.unlink(missing_ok=True)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        try:
            # A map of a file without its blocks ends by a signal where the disk turns out to be full.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
        return array

    @property
    def partial(self) -> Path:
        """Where `array` lies until the job is done."""
        return self.checkpoint.with_suffix(".npy")

    def finish(self, array: str | None = None) -> None:
        """The outputs are in place: the checkpoint has done its work, and `array` is where its array belongs.

        The array moves first: a kill in between leaves a checkpoint without one, which counts for nothing.
        """
        if self.checkpoint is None:
            return
        if array is not None:
            Path(array).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.partial, array)
            except OSError as error:
                if error.errno != errno.EXDEV:  # one of the two folders lies on another disk
                    raise
                with replacing(array) as temporary:
                    shutil.copyfile(self.partial, temporary)
                self.partial.unlink()
        self.checkpoint.unlink(missing_ok=True)
        temporary_path(self.checkpoint).unlink(missing_ok=True)

    def _save(self, index: int, state: dict) -> None:
        import torch

        if self.filled is not None:  # a checkpoint must not say more than the disk holds
            self.filled.flush()
        with replacing(self.checkpoint) as temporary:
            try:
                torch.save({"stamp": self.stamp, "index": index, "state": state}, temporary)
            except RuntimeError as error:  # closing the file fails as well, and hides what failed first
                said = f"{error} {error.__context__}"
                if "PytorchStreamWriter" not in said and "unexpected pos" not in said:
                    raise
                told = "writing failed, as on a full disk"  # PyTorch does not say of what kind the error was
                raise OSError(errno.ENOSPC, told, str(self.checkpoint)) from error

    def _say(self, text: str) -> None:
        print(f"{self.label}: {text}", flush=True)
