"""Which images of a set are optimised together. Standard library only: the graph counts shards too."""

from __future__ import annotations

import math

BATCH_LAYOUTS = ("whole_classes", "one_per_class")
"""All images of floor(batch_size / ipc) classes (WMDD), or one image of batch_size classes each (SRe2L)."""


def shard_total(classes: int, ipc: int, batch_size: int, layout: str) -> int:
    """Number of shards of a set of `ipc` images in each of `classes` classes."""
    if layout == "whole_classes":
        return math.ceil(classes / max(1, batch_size // ipc))
    return ipc * math.ceil(classes / batch_size)


def shard_members(
    classes: int, ipc: int, batch_size: int, layout: str, shard: int
) -> tuple[list[int], list[int]]:
    """The classes of a shard, and the numbers of its images within each class.

    >>> shard_members(10, 2, 6, "whole_classes", 3)
    ([9], [0, 1])
    >>> shard_members(10, 2, 6, "one_per_class", 3)
    ([6, 7, 8, 9], [1])
    """
    everything = list(range(classes))
    if layout == "whole_classes":
        size = max(1, batch_size // ipc)
        return everything[shard * size : (shard + 1) * size], list(range(ipc))
    image, block = divmod(shard, math.ceil(classes / batch_size))
    return everything[block * batch_size : (block + 1) * batch_size], [image]
