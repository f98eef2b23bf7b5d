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
from scipy.sparse import csr_array

from wmdd_core.errors import UserError
from wmdd_core.transport import Transport, project_onto_simplex, solve_transport, squared_cost

WEIGHTS = ("learned", "uniform", "kmeans")
INITIALISATIONS = ("kmeans++", "kmeans", "random_points", "normal")

LLOYD_STEPS = 5
"""Lloyd steps that polish every k-means++ draw; the better quarter of the draws gets as many again."""

TRIALS = 10
"""Steps of the weights that are tried from one position; all refused means that the weights stay."""

PAIRS = 4096
"""Points up to which k-means++ may keep all their distances (64 MB); beyond, it computes rows when drawn."""

BLOCK = 2**19
"""Point-atom distances that polishing holds at a time (2 MB)."""


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
    restarts: int = 20,
    max_iterations: int = 100,
    tolerance: float = 3e-4,
) -> Barycenter:
    """Compute a barycenter of `size` atoms of `points` (n, D).

    Each iteration of `weights="learned"` is one of Algorithm 2: exact transport; the dual potentials β of the
    atoms are the subgradient of W₂² in the weights, w ← Project(w − η β); Newton's step on the positions,
    which is the barycentric projection b_j ← Σ_i t_ij z_i / w_j (Eq. 38). The paper leaves η open. Here it
    is Polyak's, η = (W₂² − lower) / ‖d‖², whose lower bound is known in closed form: with free weights every
    point goes to its nearest atom. The direction d is β − mean β, freed of what would undo the last step
    (Camerini, Fratta and Maffioli 1975): the potentials jump from one vertex of the dual to the next, and
    without it the steps zigzag and stall up to 4 % above k-means. An iteration that raises W₂² is never
    accepted, though its weight step may undo a part of what its Newton step gained (refusing that as well
    ends higher): from the refused weights the next step is tried, since Polyak's steps come nearer to the
    best weights even where W₂² rises; after `TRIALS` the weights stay. Weights stay at or above
    1 / (n m), since every atom becomes an image. `weights="uniform"` moves the positions alone;
    "kmeans" gives k-means centres with their clusters' shares.

    `initialisation`: k-means++ draws polished by a few Lloyd steps, k-means centres, random points, N(0, 1)
    (or a (size, D) array); the best of `restarts` starts is kept, and its weights start uniform. It stops
    when two iterations in a row lower W₂² by less than the share `tolerance`, or after `max_iterations`
    (the paper: 10).

    Raises `UserError` for points that are not finite, fewer points than atoms, a start of another shape,
    fewer than one restart, or unknown choices.
    """
    started = time.perf_counter()
    points = _checked(points, size)
    if not isinstance(weights, str) or weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; known are {', '.join(WEIGHTS)}")
    if isinstance(initialisation, str) and initialisation not in INITIALISATIONS:
        raise UserError(f"initialisation is {initialisation!r}; known are {', '.join(INITIALISATIONS)}")
    if restarts < 1:
        raise UserError(f"restarts is {restarts}; at least one start is needed")
    if max_iterations < 0 or not tolerance >= 0:
        raise UserError(
            f"max_iterations is {max_iterations} and tolerance {tolerance}; neither may be negative"
        )
    if not isinstance(initialisation, str):
        initialisation = _checked_start(initialisation, size, points.shape[1])
    centre = points.mean(0)
    points = points - centre  # less cancellation in the cost, and nothing else changes
    if weights == "kmeans":
        support, shares = _kmeans(points, size, restarts, generator)
        uniform = np.full(len(points), 1 / len(points))
        found = support, shares, [solve_transport(shares, uniform, squared_cost(support, points)).value], True
    else:
        if not isinstance(initialisation, str):
            support = initialisation - centre
        else:
            support = _initial_support(points, centre, size, initialisation, restarts, generator)
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
    if size < 1:
        raise UserError(f"size is {size}; a barycenter has at least one atom")
    if size > len(points):
        raise UserError(
            f"a barycenter of {size} atoms needs at least as many points; there are {len(points)}"
        )
    return points


def _checked_start(start: np.ndarray, size: int, dimension: int) -> np.ndarray:
    start = np.array(start, dtype=np.float64)
    if start.shape != (size, dimension):
        raise UserError(f"initialisation has the shape {start.shape}; expected ({size}, {dimension})")
    if not np.isfinite(start).all():
        raise UserError("initialisation is not finite; give the atoms finite positions")
    return start


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
    history, small, direction = [solved.value], 0, None
    for _ in range(max_iterations):
        moved = csr_array(solved.plan) @ points / weights[:, None]  # a plan has n + m − 1 entries at most
        trial, trial_weights, trial_lower = solved, weights, lower
        for _ in range(TRIALS if learn else 0):
            direction = _direction(trial.potentials_a, direction)
            step = _polyak_step(trial.value - trial_lower, direction)
            trial_weights = project_onto_simplex(trial_weights - step * direction, floor)
            trial, trial_lower = transport(moved, trial_weights)
            if trial.value <= solved.value:
                break
        else:
            trial_weights, direction = weights, None
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


def _direction(potentials: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """The potentials without their mean, which weights that sum to 1 do not feel, and without the part
    that points back along the previous direction."""
    subgradient = potentials - potentials.mean()
    if previous is None or subgradient @ previous >= 0:
        return subgradient
    direction = subgradient - (subgradient @ previous) / (previous @ previous) * previous
    # Straight back, as always with two atoms: what is left is rounding, and no direction.
    return direction if direction @ direction > 1e-3 * (subgradient @ subgradient) else subgradient


def _polyak_step(gap: float, direction: np.ndarray) -> float:
    squared = direction @ direction
    return gap / squared if squared > 0 else 0.0


def _initial_support(
    points: np.ndarray,
    centre: np.ndarray,
    size: int,
    initialisation: str,
    restarts: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """A start (size, D) for `points` from which their `centre` has been taken."""
    if initialisation == "kmeans++":
        return _polished_draw(points, size, restarts, generator)
    if initialisation == "kmeans":
        return _kmeans(points, size, restarts, generator)[0]
    starts = []
    for _ in range(restarts):
        if initialisation == "random_points":
            start = points[generator.choice(len(points), size, replace=False)]
        else:
            start = generator.standard_normal((size, points.shape[1])) - centre
        starts.append((float(squared_cost(start, points).min(0).mean()), start))
    return min(starts, key=lambda pair: pair[0])[1]


def _polished_draw(
    points: np.ndarray, size: int, restarts: int, generator: np.random.Generator
) -> np.ndarray:
    """The best of `restarts` k-means++ draws after Lloyd steps, (size, D).

    In float32, all draws at once: it is only a start, and half the price.
    """
    if size == len(points):
        return points
    scale = math.sqrt(np.mean(points**2)) or 1.0
    light = np.divide(points, scale, out=np.empty(points.shape, np.float32), casting="same_kind")
    starts = light[_plus_plus(light, size, restarts, generator)]
    starts, costs = _lloyd(light, starts)
    better = np.argsort(costs, kind="stable")[: math.ceil(restarts / 4)]
    starts, costs = _lloyd(light, starts[better])
    return starts[costs.argmin()] * scale


def _plus_plus(points: np.ndarray, size: int, restarts: int, generator: np.random.Generator) -> np.ndarray:
    """Indices (restarts, size) of greedy k-means++ draws (Arthur and Vassilvitskii 2007).

    Each atom is the best of 2 + log(size) candidates, drawn with odds ∝ squared distance to the atoms so far.
    """
    count, trials, each = len(points), 2 + int(math.log(size)), np.arange(restarts)
    pairs = squared_cost(points, points) if count <= min(PAIRS, restarts * trials * size) else None

    def distances(rows: np.ndarray) -> np.ndarray:
        if pairs is not None:
            return pairs[rows]
        return squared_cost(points[rows.ravel()], points).reshape(*rows.shape, count)

    chosen = np.empty((restarts, size), dtype=np.intp)
    free = np.ones((restarts, count), dtype=bool)
    nearest = np.full((restarts, count), np.inf, dtype=np.float32)
    for k in range(size):
        if k == 0:
            candidates = generator.integers(count, size=(restarts, 1))
        else:
            odds = nearest * free  # a point taken is at distance 0, and rounding shall not say otherwise
            spent = odds.max(1) == 0  # fewer distinct points than atoms: take what has not been taken
            odds[spent] = free[spent]
            ladder = odds.cumsum(1, dtype=np.float64)
            drawn = generator.random((restarts, trials)) * ladder[:, -1:]
            pairs_of = zip(ladder, drawn, strict=True)
            candidates = np.stack([np.searchsorted(rungs, heights, "right") for rungs, heights in pairs_of])
        closer = np.minimum(nearest[:, None], distances(candidates))
        best = closer.sum(2).argmin(1)
        chosen[:, k], nearest = candidates[each, best], closer[each, best]
        free[each, chosen[:, k]] = False
    return chosen


def _lloyd(points: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move starts (r, m, D) by `LLOYD_STEPS` of k-means, in place → them, and their costs before the last."""
    rows, costs = max(1, BLOCK // (len(points) * starts.shape[1])), np.empty(len(starts), starts.dtype)
    for k in range(0, len(starts), rows):
        starts[k : k + rows], costs[k : k + rows] = _lloyd_block(points, starts[k : k + rows])
    return starts, costs


def _lloyd_block(points: np.ndarray, supports: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, (runs, size, dimension) = len(points), supports.shape
    supports, costs = supports.reshape(-1, dimension), np.empty(0)
    column, source = np.arange(runs) * size, np.repeat(np.arange(count), runs)
    ones = np.ones(count * runs, dtype=points.dtype)
    for _ in range(LLOYD_STEPS):
        cost = squared_cost(points, supports).reshape(count, runs, size)
        nearest = cost.argmin(2)
        costs = np.take_along_axis(cost, nearest[:, :, None], 2)[:, :, 0].mean(0)
        del cost  # before the next is made
        member = csr_array((ones, ((nearest + column).ravel(), source)), shape=(len(supports), count))
        masses = member.sum(1)[:, None]
        supports = np.where(masses > 0, member @ points / np.maximum(masses, 1), supports)
    return supports.reshape(runs, size, dimension), costs


def _kmeans(
    points: np.ndarray, size: int, restarts: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans

    fitted = KMeans(size, n_init=restarts, random_state=int(generator.integers(2**31))).fit(points)
    shares = np.bincount(fitted.labels_, minlength=size) / len(points)
    return fitted.cluster_centers_, project_onto_simplex(shares, 1 / (len(points) * size))
