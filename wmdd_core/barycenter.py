"""The Wasserstein barycenter of one class's features: Algorithm 2 of the paper, and its variants.

For points z_i (n, D) of weight 1/n it looks for a support b_j (m, D) and weights w_j that minimise

    W₂² = min_T Σ_ij t_ij ‖b_j − z_i‖²   over plans T with row sums 1/n and column sums w_j    (Eq. 27 to 29)

With one source and free weights this is optimal quantisation, so k-means is the bound up to local optima.
NumPy, SciPy and POT; no PyTorch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from wmdd_core.errors import UserError
from wmdd_core.transport import Transport, project_onto_simplex, solve_transport, squared_cost

WEIGHTS = ("learned", "uniform", "kmeans")
INITIALISATIONS = ("kmeans++", "kmeans", "random_points", "normal")

LLOYD_STEPS = 10
"""Lloyd steps that polish each k-means++ draw before the restarts are compared."""

TRIALS = 6
"""Steps of the weights that are tried from one position; all refused means that the weights stay."""


@dataclass(frozen=True)
class Barycenter:
    """`support` (m, D), `weights` (m,) > 0 with sum 1, `objective` = W₂² at the end (squared distance),
    `history` W₂² before the first and after each iteration, whether it `converged`, and `seconds` taken."""

    support: np.ndarray
    weights: np.ndarray
    objective: float
    history: np.ndarray
    converged: bool
    seconds: float

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return len(self.history) - 1


def wasserstein_barycenter(
    points: np.ndarray,
    size: int,
    *,
    generator: np.random.Generator,
    weights: str = "learned",
    initialisation: str | np.ndarray = "kmeans++",
    restarts: int = 3,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
) -> Barycenter:
    """Compute a barycenter of `size` atoms of `points` (n, D).

    Each iteration of `weights="learned"` is one of Algorithm 2: exact transport; the dual potentials β of the
    atoms are the subgradient of W₂² in the weights, w ← Project(w − η β); Newton's step on the positions,
    which is the barycentric projection b_j ← Σ_i t_ij z_i / w_j (Eq. 38). The paper leaves η open. Here it
    is Polyak's, η = (W₂² − lower) / ‖β − mean β‖², whose lower bound is known in closed form: with free
    weights every point goes to its nearest atom. A step that raises W₂² is never accepted: from the refused
    weights the next Polyak step is tried, and after `TRIALS` the weights stay. Weights stay at or above
    1 / (n m), since every atom becomes an image. `weights="uniform"` moves the positions alone;
    "kmeans" gives k-means centres with their clusters' shares.

    `initialisation`: a k-means++ draw polished by a few Lloyd steps, k-means centres, random points, N(0, 1)
    (or a (size, D) array); the best of `restarts` starts is kept. It stops when two iterations in a row
    lower W₂² by less than the share `tolerance`, or after `max_iterations` (the paper: 10).

    Raises `UserError` for points that are not finite, fewer points than atoms, or unknown choices.
    """
    started = time.perf_counter()
    points = _checked(points, size)
    for name, value, known in (
        ("weights", weights, WEIGHTS),
        ("initialisation", initialisation, INITIALISATIONS),
    ):
        if isinstance(value, str) and value not in known:
            raise UserError(f"{name} is {value!r}; known are {', '.join(known)}")
    centre = points.mean(0)
    points = points - centre  # less cancellation in the cost, and nothing else changes
    if weights == "kmeans":
        support, shares = _kmeans(points, size, restarts, generator)
        value = float(squared_cost(support, points).min(0).mean())
        found = support, shares, [value], True
    else:
        if not isinstance(initialisation, str):
            support = np.array(initialisation, dtype=np.float64) - centre
        else:
            support = _initial_support(points, size, initialisation, restarts, generator)
        found = _alternate(points, support, weights == "learned", max_iterations, tolerance)
    support, shares, history, converged = found
    seconds = time.perf_counter() - started
    return Barycenter(support + centre, shares, history[-1], np.array(history), converged, seconds)


def _checked(points: np.ndarray, size: int) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2:
        raise UserError(f"points have the shape {points.shape}; expected (n, D)")
    if not np.isfinite(points).all():
        raise UserError(f"{int((~np.isfinite(points)).any(1).sum())} of {len(points)} points are not finite")
    if not 1 <= size <= len(points):
        raise UserError(
            f"a barycenter of {size} atoms needs at least as many points; there are {len(points)}"
        )
    return points


def _alternate(
    points: np.ndarray, support: np.ndarray, learn: bool, max_iterations: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, list[float], bool]:
    count, size = len(points), len(support)
    uniform, floor = np.full(count, 1 / count), 1 / (count * size)
    weights = np.full(size, 1 / size)

    def transport(positions: np.ndarray, shares: np.ndarray) -> tuple[Transport, float]:
        cost = squared_cost(positions, points)
        return solve_transport(shares, uniform, cost), float(cost.min(0).mean())

    solved, lower = transport(support, weights)
    history, small = [solved.value], 0
    for _ in range(max_iterations):
        moved = solved.plan @ points / weights[:, None]
        trial, trial_weights, trial_lower = solved, weights, lower
        for _ in range(TRIALS if learn else 0):
            trial_weights = project_onto_simplex(trial_weights - _polyak_step(trial, trial_lower), floor)
            trial, trial_lower = transport(moved, trial_weights)
            if trial.value <= solved.value:
                break
        else:
            trial_weights = weights
            trial, trial_lower = transport(moved, weights)
        if trial.value > solved.value:  # rounding at an optimum: there is nothing left to gain
            history.append(solved.value)
            return support, weights, history, True
        small = small + 1 if solved.value - trial.value <= tolerance * solved.value else 0
        support, weights, solved, lower = moved, trial_weights, trial, trial_lower
        history.append(solved.value)
        if small == 2 or solved.value == 0:
            return support, weights, history, True
    return support, weights, history, False


def _polyak_step(solved: Transport, lower: float) -> np.ndarray:
    """η β for Polyak's η; the mean of β is free, since weights that sum to 1 do not feel it."""
    subgradient = solved.potentials_a - solved.potentials_a.mean()
    squared = subgradient @ subgradient
    return (solved.value - lower) / squared * subgradient if squared > 0 else subgradient


def _initial_support(
    points: np.ndarray, size: int, initialisation: str, restarts: int, generator: np.random.Generator
) -> np.ndarray:
    if initialisation == "kmeans":
        return _kmeans(points, size, restarts, generator)[0]
    starts = []
    for _ in range(restarts):
        if initialisation == "kmeans++":
            start = _lloyd(points, _plus_plus(points, size, generator))
        elif initialisation == "random_points":
            start = points[generator.choice(len(points), size, replace=False)]
        else:
            start = generator.standard_normal((size, points.shape[1]))
        starts.append((float(squared_cost(start, points).min(0).mean()), start))
    return min(starts, key=lambda pair: pair[0])[1]


def _plus_plus(points: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Greedy k-means++: each atom is the best of 2 + log(size) draws with odds ∝ squared distance."""
    chosen = [int(generator.integers(len(points)))]
    nearest = squared_cost(points[chosen], points)[0]
    for _ in range(size - 1):
        total = nearest.sum()
        if total > 0:
            drawn = generator.random(2 + int(math.log(size))) * total
            candidates = np.minimum(np.searchsorted(np.cumsum(nearest), drawn), len(points) - 1)
        else:  # fewer distinct points than atoms: take what has not been taken
            candidates = np.setdiff1d(np.arange(len(points)), chosen)[:1]
        distances = np.minimum(nearest, squared_cost(points[candidates], points))
        best = int(distances.sum(1).argmin())
        chosen.append(int(candidates[best]))
        nearest = distances[best]
    return points[chosen]


def _lloyd(points: np.ndarray, support: np.ndarray) -> np.ndarray:
    from scipy.sparse import csr_matrix

    for _ in range(LLOYD_STEPS):
        nearest = squared_cost(support, points).argmin(0)
        counts = np.bincount(nearest, minlength=len(support))
        member = csr_matrix(
            (np.ones(len(points)), (nearest, np.arange(len(points)))), (len(support), len(points))
        )
        moved = np.where(counts[:, None] > 0, member @ points / np.maximum(counts, 1)[:, None], support)
        if np.array_equal(moved, support):
            break
        support = moved
    return support


def _kmeans(
    points: np.ndarray, size: int, restarts: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans

    fitted = KMeans(size, n_init=restarts, random_state=int(generator.integers(2**31))).fit(points)
    shares = np.bincount(fitted.labels_, minlength=size) / len(points)
    return fitted.cluster_centers_, project_onto_simplex(shares, 1 / (len(points) * size))
