"""The machine in words. Standard library only: what builds the page imports no PyTorch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

DEVICE_MEMORY = "device memory allocated by PyTorch"
RESIDENT_MEMORY = "resident memory of the process"
"""What a peak of memory is of."""


def processor_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = [v for v in info.read_text().splitlines() if v.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def memory_and_system() -> str:
    """Memory and operating system: "24 GiB memory, Linux 6.18"."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{memory:.0f} GiB memory, {platform.system()} {platform.release()}"
