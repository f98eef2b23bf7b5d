"""Exact optimal transport between small discrete distributions, and the projection onto the simplex.

NumPy and POT, without PyTorch: a barycenter job lives for less time than PyTorch's import takes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wmdd_core.errors import UserError

os.environ.setdefault("POT_BACKEND_DISABLE_PYTORCH", "1")  # before POT's import, which would load it

ITERATION_LIMIT = 10_000_000
"""Pivots of the network simplex; 1,300 × 100 problems take some 10,000."""


@dataclass(frozen=True)
class Transport:
    """An optimal plan between weights a (m,) and b (n,) for a cost (m, n).

    `plan` (m, n) ≥ 0 has the marginals a and b; `value` = ⟨cost, plan⟩; `potentials_a` (m,) and
    `potentials_b` (n,) solve the dual (Eq. 30 and 31): potentials_a[j] + potentials_b[i] ≤ cost[j, i].
    """

    plan: np.ndarray
    value: float
    potentials_a: np.ndarray
    potentials_b: np.ndarray


def squared_cost(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, (m, D) and (n, D) → (m, n), by one matrix product."""
    cost = x @ y.T
    cost *= -2
    cost += np.einsum("ij,ij->i", x, x)[:, None]
    cost += np.einsum("ij,ij->i", y, y)
    return np.maximum(cost, 0, out=cost)


def solve_transport(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> Transport:
    """Solve the linear programme of Eq. 27 to 29 exactly by the network simplex.

    Raises `UserError` if the solver stops before the optimum.
    """
    if len(a) == 1:  # one plan is possible; importing POT would take longer than the rest of such a job
        return Transport(b[None], float(cost[0] @ b), np.zeros(1), cost[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # told below, as an error
        plan, log = _exact_solver()(a, b, cost, numItermax=ITERATION_LIMIT, log=True)
    if log["warning"]:
        raise UserError(f"optimal transport of size {cost.shape} was not solved: {log['warning']}")
    return Transport(plan, float(log["cost"]), np.asarray(log["u"]), np.asarray(log["v"]))


@functools.cache
def _exact_solver() -> Callable:
    """`ot.lp.emd`, imported without POT's other solvers.

    With them come scikit-learn, pandas and networkx: 1.3 s and 180 MB instead of 0.25 s and 65 MB, in jobs
    that compute for less.
    """
    if "ot" in sys.modules:
        return sys.modules["ot"].lp.emd
    # A package that has been found but not run: its subpackages are imported as from any other.
    sys.modules["ot"] = importlib.util.module_from_spec(importlib.util.find_spec("ot"))
    try:
        from ot.lp import emd
    finally:
        del sys.modules["ot"]
    return emd


def project_onto_simplex(v: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The nearest point to `v` (m,) in {w : w_j ≥ floor, Σ_j w_j = 1}, in Euclidean distance.

    By sorting (Held, Wolfe and Crowder 1974): the projection is max(v − τ, floor) for one τ.
    """
    if floor * len(v) > 1:
        raise ValueError(f"{len(v)} weights of at least {floor} add up to more than 1")
    budget = 1 - floor * len(v)
    v = v - v.max()  # the projection does not feel it, and far steps would round the sum away from 1
    shifted = np.sort(v - floor)[::-1]
    thresholds = (np.cumsum(shifted) - budget) / np.arange(1, len(v) + 1)
    active = np.flatnonzero(shifted > thresholds)
    threshold = thresholds[active[-1]] if len(active) else thresholds[0]
    return np.maximum(v - floor - threshold, 0) + floor
