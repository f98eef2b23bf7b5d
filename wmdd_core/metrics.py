"""Summaries over student seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); the deviation of a single value is None."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def format_mean_sd(mean: float, sd: float | None, digits: int = 1) -> str:
    """As tables print it: "87.3 ± 0.4", or "87.3" for a single seed."""
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
