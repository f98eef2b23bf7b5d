"""Discrepancies against closed forms, scikit-learn, SciPy and POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel

from wmdd_core import discrepancies as d
from wmdd_core import transport
from wmdd_core.errors import UserError
from wmdd_core.seeding import numpy_generator, torch_generator


def points(*names: object, count: int, dimension: int = 4) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch_generator("points", *names), dtype=torch.float64)


def masses(*names: object, count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch_generator("masses", *names), dtype=torch.float64) + 0.1


X, Y = points("x", count=7), points("y", count=5) * 1.5 + 0.3
WX, WY = masses("x", count=7), masses("y", count=5)


# Linear kernel


def test_linear_mmd_is_the_squared_distance_of_means():
    expected = np.sum((X.numpy().mean(0) - Y.numpy().mean(0)) ** 2)
    assert d.mmd_linear(X, Y).item() == pytest.approx(expected, rel=1e-12)


def test_linear_mmd_with_weights_uses_weighted_means():
    expected = np.sum((np.average(X, axis=0, weights=WX) - np.average(Y, axis=0, weights=WY)) ** 2)
    assert d.mmd_linear(X, Y, WX, 3 * WY).item() == pytest.approx(expected, rel=1e-12)


def test_linear_mmd_equals_eq_25_with_the_linear_kernel():
    expected = (X @ X.T).mean() + (Y @ Y.T).mean() - 2 * (X @ Y.T).mean()
    assert d.mmd_linear(X, Y).item() == pytest.approx(expected.item(), rel=1e-10)


# RBF kernel


def test_rbf_mmd_of_three_points_by_hand():
    # x = {0}, y = {1, 3}: squared distances 1, 9 and 4, so h = 14/3 unless it is given.
    x, y = torch.tensor([[0.0]]).double(), torch.tensor([[1.0], [3.0]]).double()

    def kernel(squared: float, h: float) -> float:
        return sum(math.exp(-squared / (h * factor)) for factor in (1 / 4, 1 / 2, 1, 2, 4))

    for h, given_h in ((14 / 3, None), (2.0, 2.0)):
        expected = 5 + (5 + 5 + 2 * kernel(4, h)) / 4 - 2 * (kernel(1, h) + kernel(9, h)) / 2
        assert d.mmd_rbf(x, y, bandwidth=given_h).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_rbf_mmd_against_scikit_learn(weighted):
    joint = np.concatenate([X, Y])
    h = cdist(joint, joint, "sqeuclidean")[np.triu_indices(len(joint), 1)].mean()
    wx = (WX / WX.sum()).numpy() if weighted else np.full(7, 1 / 7)
    wy = (WY / WY.sum()).numpy() if weighted else np.full(5, 1 / 5)
    expected = 0.0
    for i in range(-2, 3):
        gamma = 1 / (h * 2.0**i)
        expected += wx @ rbf_kernel(X, X, gamma) @ wx + wy @ rbf_kernel(Y, Y, gamma) @ wy
        expected -= 2 * wx @ rbf_kernel(X, Y, gamma) @ wy
    actual = d.mmd_rbf(X, Y, WX, WY) if weighted else d.mmd_rbf(X, Y)
    assert actual.item() == pytest.approx(expected, rel=1e-9)


def test_rbf_mmd_treats_its_bandwidth_as_a_constant():
    x = X.clone().requires_grad_()
    joint = np.concatenate([X, Y])
    h = float(cdist(joint, joint, "sqeuclidean")[np.triu_indices(len(joint), 1)].mean())
    (free,) = torch.autograd.grad(d.mmd_rbf(x, Y), x)
    (fixed,) = torch.autograd.grad(d.mmd_rbf(x, Y, bandwidth=h), x)
    torch.testing.assert_close(free, fixed)
    assert torch.autograd.gradcheck(lambda z: d.mmd_rbf(z, Y, bandwidth=h), x)


def test_rbf_mmd_sees_what_the_means_do_not():
    x = torch.tensor([[-1.0], [1.0]])
    y = torch.tensor([[-3.0], [3.0]])
    assert d.mmd_linear(x, y) == 0
    assert d.mmd_rbf(x, y) > 0.1


def test_rbf_mmd_of_coinciding_points_is_zero_with_a_finite_gradient():
    x = torch.ones(3, 2, requires_grad=True)
    value = d.mmd_rbf(x, torch.ones(4, 2))
    value.backward()
    assert abs(value.item()) < 1e-6
    assert torch.equal(x.grad, torch.zeros(3, 2))


def test_rbf_mmd_keeps_its_digits_far_from_the_origin():
    shifted = d.mmd_rbf((X + 1000).float(), (Y + 1000).float())
    assert shifted.item() == pytest.approx(d.mmd_rbf(X, Y).item(), rel=1e-3)


# Sliced Wasserstein


def test_sliced_wasserstein_of_equal_sizes_is_one_dimensional_sorting():
    y = points("other", count=7)
    directions = d.random_directions(4, 16, torch_generator("directions"))
    gaps = np.sort((X @ directions).numpy(), 0) - np.sort((y @ directions).numpy(), 0)
    expected = (gaps**2).mean()
    assert d.sliced_wasserstein(X, y, directions=directions).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_sliced_wasserstein_of_uneven_sizes_against_pot(weighted):
    directions = d.random_directions(4, 8, torch_generator("directions"))
    wx, wy = ((WX / WX.sum()).numpy(), (WY / WY.sum()).numpy()) if weighted else (None, None)
    expected = np.mean(
        [ot.emd2_1d((X @ t).numpy(), (Y @ t).numpy(), wx, wy, metric="sqeuclidean") for t in directions.T]
    )
    weights = (WX, WY) if weighted else (None, None)
    actual = d.sliced_wasserstein(X, Y, *weights, directions=directions)
    assert actual.item() == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_ignores_points_without_mass():
    directions = d.random_directions(4, 8, torch_generator("directions"))
    wx = torch.tensor([0.0, 1, 0, 1, 1, 0, 0])
    expected = d.sliced_wasserstein(X[[1, 3, 4]], Y, directions=directions)
    torch.testing.assert_close(d.sliced_wasserstein(X, Y, wx, directions=directions), expected)


def test_sliced_wasserstein_of_a_shift_along_orthonormal_directions():
    shift = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    value = d.sliced_wasserstein(X, X + shift, directions=torch.eye(4).double())
    assert value.item() == pytest.approx(shift.square().sum().item() / 4, rel=1e-12)


def test_sliced_wasserstein_gradient():
    directions = d.random_directions(4, 3, torch_generator("directions"))
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: d.sliced_wasserstein(a, b, WX, WY, directions=directions), (x, y)
    )


def test_sliced_wasserstein_draws_unit_directions_from_the_generator():
    directions = d.random_directions(4, 32, torch_generator("seed"))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(32).double())
    assert torch.equal(directions, d.random_directions(4, 32, torch_generator("seed")))
    assert not torch.equal(directions, d.random_directions(4, 32, torch_generator("another")))
    assert d.sliced_wasserstein(X, Y, directions=directions) <= d.exact_wasserstein(X, Y, p=2) ** 2


def sliced_along_axes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return d.sliced_wasserstein(x, y, directions=torch.eye(4))


LOSSES = [d.mmd_linear, d.mmd_rbf, sliced_along_axes]


@pytest.mark.parametrize("value", LOSSES)
def test_losses_keep_full_precision_under_autocast(value):
    expected = value(X.float(), Y.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value(X.float(), Y.float()), expected)
        half = value(X.bfloat16(), Y.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, value(X.bfloat16().float(), Y.bfloat16().float()))


@pytest.mark.parametrize("value", LOSSES)
def test_losses_follow_the_inputs_dtype_and_vanish_for_equal_sets(value):
    assert value(X, Y).dtype == torch.float64
    assert value(X.float(), Y.float()).dtype == torch.float32
    assert value(X, Y).item() == pytest.approx(value(X.float(), Y.float()).item(), rel=1e-4)
    assert abs(value(X, X.flip(0)).item()) < 1e-12
    assert value(X, Y) > 1e-3


# Exact Wasserstein


def test_w1_and_w2_of_equal_sizes_are_the_best_assignment():
    y = points("other", count=7).numpy()
    for p, metric in ((1, "euclidean"), (2, "sqeuclidean")):
        cost = cdist(X, y, metric)
        expected = cost[linear_sum_assignment(cost)].mean() ** (1 / p)
        assert d.exact_wasserstein(X, y, p=p) == pytest.approx(expected, rel=1e-10)


def test_w1_in_one_dimension_against_scipy_and_pot():
    x, y, wx, wy = X[:, 0].numpy(), Y[:, 0].numpy(), WX.numpy(), WY.numpy()
    actual = d.exact_wasserstein(x[:, None], y[:, None], wx, wy, p=1)
    assert actual == pytest.approx(wasserstein_distance(x, y, wx, wy), rel=1e-10)
    by_pot = ot.emd2_1d(x, y, wx / wx.sum(), wy / wy.sum(), metric="minkowski", p=1)
    assert actual == pytest.approx(by_pot, rel=1e-10)


def test_weighted_distances_against_a_linear_programme():
    from scipy.optimize import linprog

    wx, wy = (WX / WX.sum()).numpy(), (WY / WY.sum()).numpy()
    rows, columns = np.kron(np.eye(7), np.ones(5)), np.kron(np.ones(7), np.eye(5))
    for p in (1, 2):
        cost = cdist(X, Y) ** p
        solved = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([wx, wy]))
        assert d.exact_wasserstein(X, Y, WX, WY, p=p) == pytest.approx(solved.fun ** (1 / p), rel=1e-8)


def test_two_diracs_are_their_distance_apart():
    for p in (1, 2):
        assert d.exact_wasserstein([[0.0, 0.0]], [[3.0, 4.0]], p=p) == pytest.approx(5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: d.exact_wasserstein(X, Y, p=3), "use 1 or 2"),
        (lambda: d.exact_wasserstein(X, Y[:, :2]), r"\(7, 4\) and \(5, 2\)"),
        (lambda: d.exact_wasserstein(X, Y, -WX), "nonnegative"),
        (lambda: d.exact_wasserstein(X, Y, WX * 0), "positive sum"),
        (lambda: d.exact_wasserstein(X * math.nan, Y), "not finite"),
        (lambda: d.mmd_linear(X[:0], Y), "neither empty"),
        (lambda: d.mmd_rbf(X, Y, WY), "7 points"),
        (lambda: d.mmd_linear(X, Y, -WX), "minimum -"),
        (lambda: d.mmd_rbf(X, Y, WX * 0), "positive sum"),
        (lambda: d.mmd_linear(X, Y, WX * math.nan), "positive sum"),
        (lambda: d.estimate_lipschitz(WY, X), "5 values of g for 7 points"),
    ],
)
def test_mistakes_are_told(call, told):
    with pytest.raises(UserError, match=told):
        call()


def test_an_unsolved_transport_problem_is_refused(monkeypatch):
    monkeypatch.setattr(transport, "ITERATION_LIMIT", 1)
    with pytest.raises(UserError, match=r"size \(40, 30\) was not solved"):
        d.exact_wasserstein(points("many", count=40), points("more", count=30))


# Appendix B


def test_lipschitz_constant_of_known_functions():
    line = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    assert d.estimate_lipschitz(3 * line[:, 0] + 1, line) == pytest.approx(3)
    slope = torch.tensor([1.0, 2.0, -2.0, 0.0]).double()
    assert d.estimate_lipschitz(X @ slope, X) < 3
    assert d.estimate_lipschitz(torch.zeros(7), X) == 0


def test_lipschitz_constant_is_the_largest_slope_whatever_the_chunk():
    values = X.square().sum(1)
    slopes = [
        abs(values[i] - values[j]).item() / np.linalg.norm(X[i] - X[j]) for i in range(7) for j in range(i)
    ]
    for chunk in (1, 3, 7, 100):
        assert d.estimate_lipschitz(values, X, chunk=chunk) == pytest.approx(max(slopes), rel=1e-12)


def test_coinciding_points_count_only_with_different_values():
    x = torch.tensor([[0.0], [0.0], [2.0]])
    assert d.estimate_lipschitz(torch.tensor([1.0, 1.0, 2.0]), x) == pytest.approx(0.5)
    assert d.estimate_lipschitz(torch.tensor([1.0, 1.5, 2.0]), x) == math.inf
    same = d.measure_lipschitz_bound(torch.zeros(1), torch.ones(1), x[:1], x[:1])
    assert (same.w1, same.bound, same.expected_difference) == (0, math.inf, 1)


def test_expected_difference_with_weights():
    gx, gy = X[:, 0], Y[:, 0]
    expected = abs(np.average(gx, weights=WX) - np.average(gy, weights=WY))
    assert d.expected_difference(gx, gy, WX, WY) == pytest.approx(expected, rel=1e-12)


def test_the_bound_is_tight_for_a_shift_along_the_gradient():
    slope = torch.tensor([1.0, 2.0, -2.0, 0.0]).double()
    y = X + slope
    measured = d.measure_lipschitz_bound(X @ slope, y @ slope, X, y)
    assert measured.expected_difference == pytest.approx(9)
    assert measured.bound == pytest.approx(9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), m=st.integers(1, 12), weighted=st.booleans())
def test_eq_20_holds_for_random_functions(seed, n, m, weighted):
    random = numpy_generator("eq20", seed)
    x, y = (torch.from_numpy(random.normal(size=(k, 3)) * random.uniform(0.1, 3)) for k in (n, m))
    inner, outer = torch.from_numpy(random.normal(size=(3, 8))), torch.from_numpy(random.normal(size=8))
    wx, wy = (torch.from_numpy(random.uniform(size=k)) if weighted else None for k in (n, m))
    measured = d.measure_lipschitz_bound(
        torch.tanh(x @ inner) @ outer, torch.tanh(y @ inner) @ outer, x, y, wx, wy
    )
    assert measured.expected_difference <= measured.bound * (1 + 1e-9) + 1e-12
    # tanh has slope one at most, so the measured constant stays below the product of the norms.
    assert measured.lipschitz <= np.linalg.norm(inner, 2) * outer.norm().item() * (1 + 1e-9)
