"""CUDA graphs: a fixed sequence of a GPU's operations, started at once instead of one by one from Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

EAGER_CALLS = 3
"""Calls before the capture: what libraries set up at their first use must not become part of a graph."""


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which work of `device` is captured: PyTorch's own is one of the current GPU.

    One for all graphs, since cuBLAS keeps a workspace of its own for each stream that it has seen.
    """
    return torch.cuda.Stream(device)


def replayed(work: Callable[..., Result], device: torch.device) -> Callable[..., Result]:
    """`work`, which a GPU captures as a CUDA graph at its fourth call and replays from then on.

    `work` takes tensors, and computes on `device` alone: what it does depends on no value that the host
    reads. Calls with other shapes than those of the first run it as it is. A replay gives the same bits,
    and overwrites the tensors that the one before returned. On a CPU this is `work` itself.
    """
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    shapes: list[torch.Size] = []
    static: list[Tensor] = []
    calls, result = 0, None

    def replay(*inputs: Tensor) -> Result:
        nonlocal calls, result
        shapes[:] = shapes or [value.shape for value in inputs]
        if shapes != [value.shape for value in inputs]:
            return work(*inputs)
        calls += 1
        if calls <= EAGER_CALLS:
            return work(*inputs)
        if result is None:
            static.extend(value.clone() for value in inputs)
            # Other threads, which pin images for the next batches, may go on meanwhile.
            stream, mode = _stream(device), "thread_local"
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
                result = work(*static)
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return result

    return replay
