"""What the C library's allocator is told, so that a step finds its memory where the last one left it.

Taking it anew from the kernel costs page faults, a third of a training step on a CPU. C libraries other
than glibc have no such knobs; there nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from itertools import repeat

M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_MAX = 1, -1, -4
"""Of <malloc.h>."""

ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""What a process must find when it starts: no caches of small blocks in its threads."""

SMALL, PLACES = range(24, 120, 16), 1000
"""Bytes that a small block can hold, and places for blocks of each size."""


def keep_freed_memory() -> None:
    """Let this process reuse what it frees instead of giving it back to the kernel after each operation."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MXFAST, 0)  # no lists of small freed blocks that do not become one with what is beside them


@contextlib.contextmanager
def small_blocks_apart() -> Iterator[None]:
    """Meanwhile small blocks have places of their own, away from large ones.

    PyTorch asks for a block and 64 bytes more, aligns it and frees the rest: so a block that is freed holds
    one of its own size again only if the rest beside it is still free. The nodes of a graph, made between
    the activations, would settle in those rests and stay until the backward pass ends.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [block for size in SMALL for block in map(libc.malloc, repeat(size, 2 * PLACES))]
    places, fences = blocks[::2], blocks[1::2]  # free places side by side would become one
    for place in places:
        libc.free(place)
    try:
        yield
    finally:
        for fence in fences:
            libc.free(fence)
