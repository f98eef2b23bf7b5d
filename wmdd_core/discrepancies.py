"""Discrepancies between two sets of features: MMD, sliced and exact Wasserstein distances.

The equation numbers are those of Appendix B of the paper's supplement. A set is an (N, D) matrix
of features with optional weights (N,), nonnegative and divided by their sum here; without weights
each point counts 1/N. The MMD and sliced distances are squared, differentiable in the features
and, without weights, free of host synchronisation, so that they serve as feature losses; the exact
distances are not squared and go through POT, in float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from wmdd_core.errors import UserError
from wmdd_core.transport import solve_transport

Weights = TypeVar("Weights", Tensor, np.ndarray)

RBF_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The factors 2^i, i = −2 … 2, that M3D puts on the kernel's bandwidth."""

EXACT = "donot_use_mm_for_euclid_dist"
"""cdist by differences: the steepest pairs are the closest, where a matrix product loses the digits."""


def _in_full_precision(discrepancy: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check the sets, and compute in float32 or better even under autocast and from half-precision features.

    Eight bits of mantissa do not carry the difference of two nearly equal sets.
    """

    @wraps(discrepancy)
    def computed(x: Tensor, y: Tensor, *arguments: object, **settings: object) -> Tensor:
        _check_sets(x, y)
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return discrepancy(x.to(dtype), y.to(dtype), *arguments, **settings)

    return computed


@_in_full_precision
def mmd_linear(
    x: Tensor, y: Tensor, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> Tensor:
    """Squared MMD with the linear kernel, ‖E_P[x] − E_Q[y]‖² (eq. 24).

    x: (N, D), y: (M, D), weights (N,) and (M,). Returns a scalar in squared feature units.
    """
    return (weighted_mean(x, weights_x) - weighted_mean(y, weights_y)).square().sum()


def weighted_mean(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the rows of x (N, D) under `weights` (N,), equal if not given; returns (D,)."""
    return x.mean(0) if weights is None else _masses(weights, x) @ x


@_in_full_precision
def mmd_rbf(
    x: Tensor,
    y: Tensor,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    *,
    bandwidth: float | Tensor | None = None,
) -> Tensor:
    """Squared MMD with M3D's kernel, E[k(x, x′)] + E[k(y, y′)] − 2 E[k(x, y)] (eq. 25, 26).

    k(a, b) = Σ_i exp(−‖a − b‖² / (h·2^i)) for i = −2 … 2, with h = `bandwidth` in squared feature
    units, by default the mean squared distance over the pairs of different points of x and y
    together, unweighted and taken as a constant by the gradient. The estimator is the biased one:
    a point's pair with itself counts.

    x: (N, D), y: (M, D), weights (N,) and (M,). Returns a scalar without unit, between 0 and 10 up
    to rounding. Memory grows with (N + M)².
    """
    distances = _squared_distances(torch.cat([x, y]))
    if bandwidth is None:
        bandwidth = _mean_off_diagonal(distances)
    kernel = sum(torch.exp(distances / (-scale * bandwidth)) for scale in RBF_SCALES)
    signed = torch.cat([_masses(weights_x, x), -_masses(weights_y, y)])
    return signed @ kernel @ signed


@_in_full_precision
def rbf_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """The default bandwidth of `mmd_rbf`, a scalar in squared feature units without a gradient."""
    return _mean_off_diagonal(_squared_distances(torch.cat([x, y]).detach()))


def _mean_off_diagonal(distances: Tensor) -> Tensor:
    count = len(distances)
    # The floor keeps the kernel at one, and its gradient at zero, where all points coincide.
    return (distances.detach().sum() / (count * (count - 1))).clamp_min(1e-30)


def random_directions(dimension: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` directions, uniform on the unit sphere, as columns: (dimension, count) float64 on the CPU."""
    normal = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    return normal / normal.norm(dim=0)


@_in_full_precision
def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    *,
    directions: Tensor,
) -> Tensor:
    """Squared sliced 2-Wasserstein distance, the mean over directions θ of W₂²(θᵀx, θᵀy).

    x: (N, D), y: (M, D), weights (N,) and (M,), `directions` (D, L) with unit columns (`random_directions`).
    Each W₂² is exact for sets of any sizes and weights, by coupling equal quantiles. Returns a scalar in
    squared feature units, at most W₂² (for two single points W₂²/D in expectation). The gradient flows to
    x and y, not to the weights.
    """
    directions = directions.to(x.dtype).to(x.device)
    sorted_x, order_x = (x @ directions).sort(0)
    sorted_y, order_y = (y @ directions).sort(0)
    index_x, index_y, mass = _couple_quantiles(_masses(weights_x, x)[order_x], _masses(weights_y, y)[order_y])
    gaps = sorted_x.gather(0, index_x) - sorted_y.gather(0, index_y)
    return (mass.to(x.dtype) * gaps.square()).sum(0).mean()


def _couple_quantiles(masses_x: Tensor, masses_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Couple sorted points by equal quantiles, column by column: (N, L), (M, L) → three (N + M, L).

    Between two neighbouring levels of either cumulative mass both quantile functions are constant:
    the k-th piece carries `mass[k]` from point `index_x[k]` to point `index_y[k]`.
    """
    # Columns become contiguous rows, since that is what searchsorted wants; float64, since rounding adds up.
    levels_x, levels_y = (m.detach().double().cumsum(0).T.contiguous() for m in (masses_x, masses_y))
    levels = torch.cat([levels_x, levels_y], 1).sort(1).values
    mass = levels.diff(dim=1, prepend=torch.zeros_like(levels[:, :1]))
    index_x, index_y = (
        torch.searchsorted(own, levels).clamp_max(own.shape[1] - 1) for own in (levels_x, levels_y)
    )
    return index_x.T, index_y.T, mass.T


def exact_wasserstein(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    weights_x: ArrayLike | Tensor | None = None,
    weights_y: ArrayLike | Tensor | None = None,
    *,
    p: int = 1,
) -> float:
    """The p-Wasserstein distance with Euclidean ground distance, not squared: W₁ (eq. 18) or W₂.

    W_p = (min over couplings γ of E_γ ‖x − y‖^p)^(1/p), in feature units, for x (N, D), y (M, D) and
    weights (N,), (M,); computed exactly by POT's network simplex in float64, with memory N·M.

    Raises `UserError` for p other than 1 and 2, sets that do not fit together, values that are
    not finite, weights that are no masses, and a transport problem that was not solved to the end.
    """
    if p not in (1, 2):
        raise UserError(f"exact Wasserstein distance: p = {p!r} is not supported; use 1 or 2")
    x, y = _finite_array(x), _finite_array(y)
    _check_sets(x, y)
    mass_x, mass_y = _mass_array(weights_x, len(x)), _mass_array(weights_y, len(y))
    # Imported here, since a recovery job that uses the losses above has no use for SciPy.
    from scipy.spatial.distance import cdist

    # Differences, not the expanded square, which loses the digits of small distances.
    cost = cdist(x, y, "euclidean" if p == 1 else "sqeuclidean")
    return max(solve_transport(mass_x, mass_y, cost).value, 0.0) ** (1 / p)


@dataclass(frozen=True)
class LipschitzBound:
    """Both sides of |E_P g − E_Q g| ≤ L·W₁(P, Q) (eq. 20), measured on samples."""

    expected_difference: float
    """|E_P g − E_Q g|, in units of g."""
    lipschitz: float
    """L, the largest slope of g between any two of the samples, in units of g per feature unit."""
    w1: float
    """W₁(P, Q), not squared, in feature units."""

    @property
    def bound(self) -> float:
        """L·W₁, in units of g; infinite if two coinciding samples have different values."""
        return math.inf if math.isinf(self.lipschitz) else self.lipschitz * self.w1


def measure_lipschitz_bound(
    values_x: Tensor,
    values_y: Tensor,
    x: Tensor,
    y: Tensor,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
) -> LipschitzBound:
    """Measure eq. 20 for a function g known by its values (N,) at x (N, D) and (M,) at y (M, D).

    L is taken over all pairs of the two sets together; every coupling uses such pairs only, so the
    inequality holds for the samples exactly, whatever g does elsewhere.
    """
    return LipschitzBound(
        expected_difference(values_x, values_y, weights_x, weights_y),
        estimate_lipschitz(torch.cat([values_x, values_y]), torch.cat([x, y])),
        exact_wasserstein(x, y, weights_x, weights_y, p=1),
    )


def expected_difference(
    values_x: Tensor, values_y: Tensor, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> float:
    """|E_P g − E_Q g| (eq. 17) of values (N,) and (M,) with weights (N,) and (M,), in units of g."""
    means = [
        weighted_mean(values.double()[:, None], None if weights is None else weights.double())
        for values, weights in ((values_x, weights_x), (values_y, weights_y))
    ]
    return float((means[0] - means[1]).abs())


def estimate_lipschitz(values: Tensor, x: Tensor, *, chunk: int = 1024) -> float:
    """The largest |g_i − g_j| / ‖x_i − x_j‖ over all pairs of samples (A1, eq. 16).

    values: (N,), x: (N, D); computed in float64, `chunk`² pairs at a time. A lower bound of g's
    Lipschitz constant. Coinciding points with equal values do not count; with different values
    they make it infinite. One point alone gives 0.
    """
    if len(values) != len(x):
        raise UserError(f"received {len(values)} values of g for {len(x)} points; give one for each")
    values, x = values.detach().double(), x.detach().double()
    largest = torch.zeros((), dtype=torch.float64, device=x.device)
    starts = range(0, len(x), chunk)
    for i, j in ((i, j) for i in starts for j in starts if i <= j):
        rise = (values[i : i + chunk, None] - values[None, j : j + chunk]).abs()
        run = torch.cdist(x[i : i + chunk], x[j : j + chunk], compute_mode=EXACT)
        largest = torch.maximum(largest, torch.where(rise > 0, rise / run, 0).max())
    return float(largest)


def _squared_distances(points: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs, (N, D) → (N, N).

    As a matrix product, ten times as fast as differences; centred first, so that a common offset
    costs no digits.
    """
    points = points - points.detach().mean(0)
    norms = points.square().sum(1)
    return (norms[:, None] + norms[None, :] - 2 * points @ points.T).clamp_min(0)


def _masses(weights: Tensor | None, x: Tensor) -> Tensor:
    if weights is None:
        return torch.full((len(x),), 1 / len(x), dtype=x.dtype, device=x.device)
    return _shares(weights.to(x), len(x))


def _mass_array(weights: ArrayLike | Tensor | None, count: int) -> np.ndarray:
    return np.full(count, 1 / count) if weights is None else _shares(_finite_array(weights), count)


def _shares(weights: Weights, count: int) -> Weights:
    """Weights divided by their sum; raises `UserError` unless they are `count` that can be."""
    if tuple(weights.shape) != (count,):
        raise UserError(f"received weights {tuple(weights.shape)} for {count} points; give one for each")
    least, total = float(weights.min()), float(weights.sum())
    if not (least >= 0 and total > 0):
        raise UserError(
            f"received weights with sum {total:g} and minimum {least:g}; give nonnegative weights with a"
            " positive sum"
        )
    return weights / total


def _finite_array(values: ArrayLike | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        broken = np.count_nonzero(~np.isfinite(array))
        raise UserError(f"received {broken} of {array.size} values that are not finite; remove them")
    return array


def _check_sets(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> None:
    a, b = tuple(x.shape), tuple(y.shape)
    if len(a) != 2 or len(b) != 2 or a[1] != b[1] or 0 in (a[0], b[0]):
        raise UserError(f"received sets of shape {a} and {b}; give (N, D) and (M, D), neither empty")
