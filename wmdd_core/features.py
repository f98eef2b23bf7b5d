"""One pass over the real images: penultimate-layer features and exact per-class BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from wmdd_core.batchnorm import StatisticsAccumulator, record_input_moments
from wmdd_core.errors import UserError
from wmdd_core.models import Classifier
from wmdd_core.progress import Progress


@torch.no_grad()
def extract_features(
    model: Classifier,
    batches: Callable[[int], Iterable[tuple[int, Tensor, Tensor]]],
    features: np.ndarray,
    classes: int,
    *,
    progress: Progress | None = None,
) -> StatisticsAccumulator:
    """Fill `features` (N, D) and return the BatchNorm statistics of the same forward passes.

    `batches(start)` yields (position of the first image, normalised images, labels) from image `start`
    on, in order. `features` may be a memory map; memory then does not grow with the dataset.
    `model` is expected frozen (`models.freeze`), so that batches of any size give the same numbers.

    Raises `UserError` if `features` are no floating-point numbers, or of another N than the images are.
    """
    if features.ndim != 2 or features.dtype.kind != "f":
        raise UserError(f"features are {features.dtype} {features.shape}; give floating point, (N, D)")
    accumulator, start = StatisticsAccumulator(classes), 0
    if progress and (state := progress.resume()):
        accumulator.restore(state["statistics"])
        start = state["images"]
    done = start
    with record_input_moments(model) as moments:
        for step, (position, images, labels) in enumerate(batches(start)):
            done = position + len(images)
            features[position:done] = model.features(images).float().cpu().numpy()
            accumulator.add(moments, labels)
            if progress:
                progress.step(
                    step,
                    step + -(-(len(features) - done) // len(images)) + 1,
                    lambda: {"images": done, "statistics": accumulator.state()},  # noqa: B023
                    lambda: {"images": done},  # noqa: B023
                )
    if done != len(features):
        raise UserError(f"there were {done} images for {len(features)} rows of features; give as many")
    return accumulator
