"""Time and memory of loops, and the machine that they were measured on."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from wmdd_core.machine import DEVICE_MEMORY, RESIDENT_MEMORY, memory_and_system, processor_name

Result = TypeVar("Result")


class IterationTimer:
    """Measures a loop in the place of `Progress`: the loop calls `step` after each iteration.

    The first `warm_up` iterations are left out: they build what is reused later (kernels, memory
    pools, blocks of random views). On a GPU each iteration is timed until its work is done.
    """

    def __init__(self, warm_up: int, device: torch.device | str = "cpu") -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up is {warm_up}; the first iteration has no beginning to be timed from")
        self.warm_up, self.device = warm_up, torch.device(device)
        self.ends: list[float] = []

    def resume(self) -> None:
        """A measurement never goes on from an earlier one."""

    def step(self, *_: object) -> None:
        """An iteration is done."""
        synchronise(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each iteration after the warm-up."""
        ends = self.ends[self.warm_up - 1 :]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def timed(call: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, float]:
    """What `call` returns, and the seconds until its work, on the device too, is done."""
    synchronise(torch.device(device))
    start = time.perf_counter()
    result = call()
    synchronise(torch.device(device))
    return result, time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Largest memory so far in bytes, and of what: `DEVICE_MEMORY` on a GPU, else `RESIDENT_MEMORY`.

    A peak cannot be taken back: measure one thing in a process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), DEVICE_MEMORY
    return peak_resident_bytes(), RESIDENT_MEMORY


def peak_resident_bytes() -> int:
    """Largest resident memory of this process in bytes, PyTorch itself and all other libraries included."""
    # A child's ru_maxrss starts at what its parent held when it forked; VmHWM counts the program alone.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (v for v in status.read_text().splitlines() if v.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_machine(device: torch.device) -> str:
    """What computes, in words: the GPU if there is one, the processor, its threads, the memory."""
    parts = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    threads = torch.get_num_threads()
    parts += [processor_name(), f"{threads} thread{'s' * (threads > 1)}", memory_and_system()]
    return ", ".join(parts)
