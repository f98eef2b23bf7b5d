"""Exact transport and the simplex projection against closed forms, SciPy and finite differences."""

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from benchmarks.startup import imported_by
from wmdd_core import transport
from wmdd_core.errors import UserError
from wmdd_core.transport import project_onto_simplex, solve_transport, squared_cost


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_squared_cost_is_the_definition():
    x, y = rng(0).normal(size=(7, 5)) + 100, rng(1).normal(size=(9, 5)) + 100
    wanted = ((x[:, None] - y[None]) ** 2).sum(2)
    np.testing.assert_allclose(squared_cost(x - 100, y - 100), wanted, rtol=1e-12)
    assert (squared_cost(x, x) >= 0).all()


def test_uniform_transport_is_an_assignment():
    cost = rng(2).random((12, 12))
    weights = np.full(12, 1 / 12)
    rows, columns = linear_sum_assignment(cost)
    assert solve_transport(weights, weights, cost).value == pytest.approx(
        cost[rows, columns].mean(), rel=1e-12
    )


def test_value_and_marginals_agree_with_linear_programming():
    a, b = rng(3).dirichlet(np.ones(4)), rng(4).dirichlet(np.ones(6))
    cost = rng(5).random((4, 6))
    rows = np.kron(np.eye(4), np.ones(6))
    columns = np.kron(np.ones(4), np.eye(6))
    wanted = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]))
    solved = solve_transport(a, b, cost)
    assert solved.value == pytest.approx(wanted.fun, rel=1e-9)
    np.testing.assert_allclose(solved.plan.sum(1), a, atol=1e-12)
    np.testing.assert_allclose(solved.plan.sum(0), b, atol=1e-12)


def test_potentials_are_feasible_tight_and_equal_finite_differences():
    a, b = rng(6).dirichlet(np.ones(5) * 5), np.full(40, 1 / 40)
    cost = rng(7).random((5, 40))
    solved = solve_transport(a, b, cost)
    slack = cost - solved.potentials_a[:, None] - solved.potentials_b
    assert slack.min() > -1e-12 and abs(slack[solved.plan > 0]).max() < 1e-12
    assert a @ solved.potentials_a + b @ solved.potentials_b == pytest.approx(solved.value, rel=1e-12)
    step = 1e-6  # W₂² is piecewise linear in the weights: a central difference is exact inside a piece
    for j in range(1, 5):
        direction = np.zeros(5)
        direction[j], direction[0] = step, -step
        up, down = (solve_transport(a + s * direction, b, cost).value for s in (1, -1))
        wanted = solved.potentials_a[j] - solved.potentials_a[0]
        assert (up - down) / (2 * step) == pytest.approx(wanted, abs=1e-6)


def test_an_unsolved_problem_is_refused(monkeypatch):
    monkeypatch.setattr(transport, "ITERATION_LIMIT", 1)
    with pytest.raises(UserError, match=r"size \(30, 40\) was not solved"):
        solve_transport(np.full(30, 1 / 30), np.full(40, 1 / 40), rng(9).random((30, 40)))


vectors = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12).map(np.array)


@settings(max_examples=300, deadline=None)
@given(vectors, st.floats(0, 1))
def test_projection_satisfies_the_optimality_conditions(v, share):
    floor = share / len(v)
    w = project_onto_simplex(v, floor)
    assert w.sum() == pytest.approx(1, abs=1e-9) and w.min() >= floor - 1e-12
    # Karush, Kuhn, Tucker: v − w is one number τ above the floor, and at most τ on it.
    gap, free = v - w, w > floor + 1e-9
    if free.any():
        np.testing.assert_allclose(gap[free], gap[free].max(), atol=1e-8)
        assert gap[~free].max(initial=-np.inf) <= gap[free].max() + 1e-8


@settings(max_examples=100, deadline=None)
@given(vectors)
def test_projection_is_idempotent_and_nearer_than_any_other_point(v):
    w = project_onto_simplex(v)
    np.testing.assert_allclose(project_onto_simplex(w), w, atol=1e-12)
    other = rng(8).dirichlet(np.ones(len(v)), 50)
    assert np.linalg.norm(v - w) <= np.linalg.norm(v - other, axis=1).min() + 1e-9


@pytest.mark.parametrize("scale", [1e9, 1e17, 1e200])
def test_projection_of_a_far_vector_still_sums_to_one(scale):
    w = project_onto_simplex(scale * np.array([1.0, -1.0, 0.5]), 0.01)
    np.testing.assert_allclose(w, [0.98, 0.01, 0.01], atol=1e-12)
    tied = project_onto_simplex(np.array([scale, scale, -scale]))
    np.testing.assert_allclose(tied, [0.5, 0.5, 0], atol=1e-12)


def test_projection_refuses_a_floor_that_does_not_fit():
    with pytest.raises(ValueError, match="more than 1"):
        project_onto_simplex(np.zeros(4), 0.3)


def test_one_atom_is_solved_without_the_solver():
    """The only plan and the duals that POT finds, up to a constant; and no import of POT."""
    generator = np.random.default_rng(0)
    b, cost = generator.dirichlet(np.ones(7)), generator.random((1, 7))
    own = solve_transport(np.ones(1), b, cost)
    plan, log = ot.lp.emd(np.ones(1), b, cost, log=True)
    np.testing.assert_allclose(own.plan, plan, atol=1e-12)
    assert own.value == pytest.approx(log["cost"], rel=1e-12)
    np.testing.assert_allclose(own.potentials_b + own.potentials_a, log["v"] + log["u"], atol=1e-12)
    code = (
        "import numpy as np; from wmdd_core.transport import solve_transport;"
        "solve_transport(np.ones(1), np.ones(2) / 2, np.ones((1, 2)))"
    )
    assert "ot" not in imported_by(code)


def test_the_solver_comes_without_the_rest_of_pot_and_is_pots():
    ours = """
import numpy as np
from wmdd_core.transport import _exact_solver, solve_transport

half = np.ones(2) / 2
assert solve_transport(half, half, 1 - np.eye(2)).value == 0
"""
    theirs = """
import ot

assert ot.emd is ot.lp.emd is _exact_solver()
assert ot.bregman.sinkhorn(half, half, 1 - np.eye(2), 1).shape == (2, 2)
"""
    assert not {"pandas", "sklearn", "networkx", "torch", "matplotlib"} & imported_by(ours)
    assert "ot.bregman" in imported_by(ours + theirs)
