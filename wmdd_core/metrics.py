"""Summaries over student seeds, and of how sets of features lie: spread, coverage, slopes of a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from wmdd_core.errors import UserError


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); the deviation of a single value is None."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def format_mean_sd(mean: float, sd: float | None, digits: int = 1) -> str:
    """As tables print it: "87.3 ± 0.4", or "87.3" for a single seed."""
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


# ---- sets of features ------------------------------------------------------------------------


def mean_pairwise_distance(points: np.ndarray) -> float:
    """Mean Euclidean distance over the pairs of different rows of `points` (N, D); NaN for a single row."""
    from scipy.spatial.distance import pdist

    return float(pdist(np.asarray(points, dtype=np.float64)).mean()) if len(points) > 1 else math.nan


def mean_within_distance(points: np.ndarray, labels: np.ndarray) -> float:
    """Diversity: the mean pairwise distance within a class, averaged over the classes in `labels` (N,).

    NaN where no class has two points; a class of one point has no pairs and does not count.
    """
    within = [mean_pairwise_distance(points[labels == c]) for c in np.unique(labels)]
    known = [d for d in within if not math.isnan(d)]
    return sum(known) / len(known) if known else math.nan


def mean_between_distance(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between the centroids of the classes in `labels` (N,), over pairs of classes."""
    return mean_pairwise_distance(np.stack([points[labels == c].mean(0) for c in np.unique(labels)]))


def coverage(real: np.ndarray, distilled: np.ndarray, neighbours: int = 5) -> float:
    """Share of real points that have a distilled point no farther than their k-th nearest real neighbour.

    coverage = (1/N) Σ_i 1[min_j ‖x_i − y_j‖ ≤ ‖x_i − NN_k(x_i)‖], for x = `real` (N, D), y = `distilled`
    (M, D) and k = `neighbours`; a point is no neighbour of itself, another at the same place is one
    (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", Eq. 9).
    Between 0 and 1; it grows with M, and central points cover more than outlying ones.

    Raises `UserError` unless there are more real points than neighbours.
    """
    from scipy.spatial.distance import cdist

    if len(real) <= neighbours:
        raise UserError(
            f"received {len(real)} real points for coverage with {neighbours} neighbours; give more points"
        )
    # The nearest to each point in its own set is the point itself, at distance 0.
    radius = np.partition(cdist(real, real), neighbours, axis=1)[:, neighbours]
    return float((cdist(real, distilled).min(1) <= radius).mean())


def mean_squared_distance(points: np.ndarray) -> float:
    """Mean squared Euclidean distance over the pairs of different rows of `points` (N, D), N > 1.

    Twice the total sample variance, (2/(N−1)) Σ_i ‖x_i − x̄‖², so that no pair is formed.
    """
    centred = np.asarray(points, dtype=np.float64)
    centred = centred - centred.mean(0)
    return float(2 * np.square(centred).sum() / (len(points) - 1))


def cross_entropy_lipschitz(weight: np.ndarray, label: int) -> float:
    """The Lipschitz constant of g(f) = CE(softmax(W f + b), c) in the features f, max_k ‖W_k − W_c‖.

    ∇g = Σ_k p_k W_k − W_c = Σ_k p_k (W_k − W_c) is a mean of these differences under the predicted
    probabilities p, so no longer than the longest; and as f runs off along W_k* − W_c, with k* the
    farthest row, p goes to e_k*, so no smaller constant will do. `weight`: (classes, D), `label`: c.
    """
    return float(np.linalg.norm(weight - weight[label], axis=1).max())
