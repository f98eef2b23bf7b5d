"""Which images of a set a job optimises. Standard library only: the graph counts shards too."""

from __future__ import annotations

import math


def shard_total(classes: int, ipc: int, batch_size: int, batch_layout: str) -> int:
    """Number of shards of a set of `ipc` images in each of `classes` classes.

    `batch_layout`: whole_classes, all images of floor(batch_size / ipc) classes (WMDD), or one_per_class,
    batches of one image of each of batch_size classes (SRe2L).
    """
    size, numbers = _extent(classes, ipc, batch_size, batch_layout)
    return math.ceil(ipc / numbers) * math.ceil(classes / size)


def shard_members(
    classes: int, ipc: int, batch_size: int, batch_layout: str, shard: int
) -> tuple[list[int], list[int]]:
    """The classes of a shard, and the numbers of its images within each class.

    A shard of `one_per_class` has one batch for each of the numbers: as many as make `batch_size` images.

    >>> shard_members(10, 2, 6, "whole_classes", 3)
    ([9], [0, 1])
    >>> shard_members(10, 2, 6, "one_per_class", 3)
    ([6, 7, 8, 9], [1])
    >>> shard_members(3, 5, 6, "one_per_class", 1)
    ([0, 1, 2], [2, 3])
    """
    size, numbers = _extent(classes, ipc, batch_size, batch_layout)
    row, column = divmod(shard, math.ceil(classes / size))
    return (
        list(range(column * size, min((column + 1) * size, classes))),
        list(range(row * numbers, min((row + 1) * numbers, ipc))),
    )


def _extent(classes: int, ipc: int, batch_size: int, batch_layout: str) -> tuple[int, int]:
    """Classes of a shard, and its images in each of them."""
    if batch_layout == "whole_classes":
        return max(1, batch_size // ipc), ipc
    size = min(classes, batch_size)
    return size, batch_size // size
