"""The barycenter against what is known of it: means, k-means, POT's solver, two Diracs."""

import numpy as np
import ot
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from benchmarks.startup import imported_by
from wmdd_core import barycenter
from wmdd_core.barycenter import Barycenter, wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.transport import solve_transport, squared_cost


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def digits(label: int) -> np.ndarray:
    data = load_digits()
    return data.data[data.target == label]


def relu_features(count: int = 1300, dimension: int = 512) -> np.ndarray:
    """What a network's features look like: noisy clusters behind a ReLU."""
    centres = rng(1).normal(size=(30, dimension))
    return np.maximum(
        centres[rng(2).integers(30, size=count)] + 1.5 * rng(3).normal(size=(count, dimension)), 0
    )


def best_of_ten(points: np.ndarray, size: int) -> float:
    return KMeans(size, n_init=10, random_state=0).fit(points).inertia_ / len(points)


def solved_apart(found: Barycenter, points: np.ndarray) -> float:
    """W₂² between a barycenter and `points` (n, D) of equal weight: POT's, of SciPy's distances."""
    cost = cdist(found.support, points, "sqeuclidean")
    return ot.emd2(found.weights, np.full(len(points), 1 / len(points)), cost)


def test_draws_take_a_point_of_each_cluster_and_none_twice():
    centres = 100 * np.eye(8)
    points = (centres[np.arange(80) % 8] + rng().normal(size=(80, 8))).astype(np.float32)
    for row in barycenter._plus_plus(points, 8, 20, rng()):
        assert sorted(row % 8) == list(range(8))
    repeated = np.repeat(points[:6], 5, axis=0)  # fewer distinct points than are drawn
    for row in barycenter._plus_plus(repeated, 10, 20, rng()):
        assert len(set(row)) == 10


def test_weights_reach_what_is_recorded():
    """Recorded: 157.4, a mean of nine seeds. It is 158.6 if one small gain ends it, 163.8 if directions are
    not deflected, 165.2 if the worst of the candidates is drawn."""
    found = [wasserstein_barycenter(digits(3), 50, generator=rng(s)).objective for s in range(9)]
    assert np.mean(found) < 158


def test_it_ends_with_the_second_small_gain_in_a_row():
    """Not with the first, nor with two that a larger one parts: Polyak's steps gain little now and then."""
    parted = 0
    for seed in range(4):
        found = wasserstein_barycenter(digits(3), 50, generator=rng(seed))
        small = -np.diff(found.history) <= 3e-4 * found.history[:-1]
        second = np.flatnonzero(small[1:] & small[:-1]) + 1
        assert found.converged and second.tolist() == [found.iterations - 1]
        parted += small[:-2].any()
    assert parted >= 2  # otherwise there was nothing to ignore


def test_a_quarter_of_the_draws_is_polished_to_the_end():
    """The best after five Lloyd steps need not be the best after ten; k-means by hand says which is."""
    points, overtaken = relu_features(200, 8).astype(np.float32), 0

    def polished(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(5):
            distances = [cdist(points, start, "sqeuclidean") for start in starts]
            starts = np.stack([[points[d.argmin(1) == k].mean(0) for k in range(20)] for d in distances])
        return starts, np.array([d.min(1).mean() for d in distances])  # before the last step

    for seed in range(6):
        starts, after_five = polished(points[barycenter._plus_plus(points, 20, 20, rng(seed))])
        starts, after_ten = polished(starts[after_five.argsort()[:5]])
        found = barycenter._polished_draw(points, 20, 20, rng(seed))
        np.testing.assert_allclose(found, starts[after_ten.argmin()], rtol=1e-4, atol=1e-5)
        overtaken += after_ten.argmin() > 0
    assert overtaken > 0  # otherwise one would have been enough


@pytest.mark.parametrize("weights", ["learned", "uniform", "kmeans"])
def test_one_atom_is_the_mean(weights):
    points = digits(3)
    found = wasserstein_barycenter(points, 1, generator=rng(), weights=weights)
    np.testing.assert_allclose(found.support[0], points.mean(0), atol=1e-9)
    assert found.objective == pytest.approx(points.var(0).sum(), rel=1e-9)
    assert found.weights == pytest.approx([1])


@pytest.mark.parametrize("weights", ["learned", "uniform"])
def test_as_many_atoms_as_points_are_the_points(weights):
    points = rng().normal(size=(9, 4))
    found = wasserstein_barycenter(points, 9, generator=rng(), weights=weights)
    assert found.objective == pytest.approx(0, abs=1e-12)
    assert squared_cost(points, found.support).min(1).max() < 1e-12
    np.testing.assert_allclose(found.weights, 1 / 9, atol=1e-9)


def test_two_diracs_of_unequal_mass():
    points = np.array([[0.0, 0.0]] * 3 + [[4.0, 0.0]])
    one = wasserstein_barycenter(points, 1, generator=rng())
    np.testing.assert_allclose(one.support, [[1, 0]], atol=1e-12)
    two = wasserstein_barycenter(points, 2, generator=rng(), max_iterations=200, tolerance=0)
    order = two.support[:, 0].argsort()
    np.testing.assert_allclose(two.support[order], [[0, 0], [4, 0]], atol=1e-6)
    np.testing.assert_allclose(two.weights[order], [0.75, 0.25], atol=1e-6)
    even = wasserstein_barycenter(points, 2, generator=rng(), weights="uniform")
    np.testing.assert_allclose(even.weights, 0.5)
    # Half of the mass has to share an atom: 2/4 at 0, and (0, 4) meet in the middle.
    assert even.objective == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("size", [1, 5, 10, 20])
def test_within_two_percent_of_kmeans_on_digits(size):
    for label in range(10):
        points = digits(label)
        found = wasserstein_barycenter(points, size, generator=rng(label))
        assert found.converged
        assert found.objective <= 1.02 * best_of_ten(points, size), label


@pytest.mark.parametrize("size", [10, 50, 100])
def test_within_two_percent_of_kmeans_on_network_like_features(size):
    points = relu_features()
    found = wasserstein_barycenter(points, size, generator=rng(7))
    assert found.converged
    assert found.objective <= 1.02 * best_of_ten(points, size)
    assert found.objective == pytest.approx(solved_apart(found, points), rel=1e-9)


def test_kmeans_mode_is_as_good_as_kmeans_and_weighs_clusters_by_their_shares():
    for label in range(10):
        points = digits(label)
        found = wasserstein_barycenter(points, 10, generator=rng(label), weights="kmeans")
        assert found.objective <= 1.02 * best_of_ten(points, 10), label
        nearest = squared_cost(found.support, points).argmin(0)
        np.testing.assert_allclose(found.weights, np.bincount(nearest, minlength=10) / len(points), atol=1e-9)


@pytest.mark.parametrize(("count", "size"), [(144, 50), (500, 100)])
def test_learned_weights_are_no_worse_than_uniform_ones_after_the_papers_ten_iterations(count, size):
    points = relu_features(count, 32)
    learned, uniform = (
        wasserstein_barycenter(points, size, generator=rng(7), weights=w, max_iterations=10).objective
        for w in ("learned", "uniform")
    )
    assert learned <= uniform


def test_uniform_mode_is_pots_free_support_solver():
    points = digits(5)
    start = points[rng(4).choice(len(points), 6, replace=False)]
    theirs = ot.lp.free_support_barycenter(
        [points], [np.full(len(points), 1 / len(points))], start.copy(), numItermax=40, stopThr=0
    )
    ours = wasserstein_barycenter(
        points, 6, generator=rng(), weights="uniform", initialisation=start, max_iterations=40, tolerance=0
    )
    np.testing.assert_allclose(ours.support, theirs, atol=1e-8)


def test_learned_weights_beat_uniform_ones_on_average():
    excess = []
    for label in range(10):
        points = digits(label)
        learned, uniform = (
            wasserstein_barycenter(points, 10, generator=rng(label), weights=w).objective
            for w in ("learned", "uniform")
        )
        excess.append(uniform / learned - 1)
    assert np.mean(excess) > 0.005  # uniform weights are a constraint, and balanced clusters cost something


@pytest.mark.parametrize("weights", ["learned", "uniform"])
@pytest.mark.parametrize("initialisation", ["kmeans++", "kmeans", "random_points", "normal"])
def test_no_iteration_raises_the_distance_and_every_atom_keeps_weight(weights, initialisation):
    points = digits(2)
    found = wasserstein_barycenter(
        points, 15, generator=rng(6), weights=weights, initialisation=initialisation
    )
    assert (np.diff(found.history) <= 0).all()
    assert found.weights.min() > 0 and found.weights.sum() == pytest.approx(1)
    assert np.isfinite(found.support).all()
    assert found.objective == pytest.approx(solved_apart(found, points), rel=1e-9)


def test_first_iteration_is_algorithm_two_written_out():
    points = digits(6)[:40]
    start, count = points[:4] + 0.1, 40
    cost = squared_cost(start, points)
    solved = solve_transport(np.full(4, 1 / 4), np.full(count, 1 / count), cost)
    newton = np.stack([(solved.plan[j][:, None] * points).sum(0) / 0.25 for j in range(4)])
    found = wasserstein_barycenter(
        points, 4, generator=rng(), initialisation=start, max_iterations=1, tolerance=0
    )
    assert found.iterations == 1 and not found.converged
    np.testing.assert_allclose(found.support, newton, atol=1e-9)
    beta = solved.potentials_a - solved.potentials_a.mean()
    step = (solved.value - cost.min(0).mean()) / (beta @ beta)
    projected = np.full(4, 1 / 4) - step * beta
    assert projected.min() > 1 / (4 * count)  # so that the projection leaves it as it is
    np.testing.assert_allclose(found.weights, projected, atol=1e-9)


def test_ten_iterations_as_in_the_paper_leave_a_full_trace():
    """An entry for each iteration: where a run that was stopped after it ends."""
    points = relu_features(200, 32)
    runs = [
        wasserstein_barycenter(points, 10, generator=rng(), max_iterations=k, tolerance=0) for k in range(11)
    ]
    whole = runs[-1]
    assert whole.iterations == 10 or whole.converged
    assert whole.history[-1] < whole.history[0]
    for k, run in enumerate(runs):
        assert np.array_equal(run.history, whole.history[: k + 1])
        assert run.objective == pytest.approx(solved_apart(run, points), rel=1e-7)


def test_many_starts_end_within_two_percent_of_kmeans():
    # Each ends 2.7 to 7 % above with three restarts, undamped steps or a tolerance of 1e-3.
    for label, size, seed in [(9, 5, 100), (3, 10, 104), (7, 20, 105), (1, 20, 105), (2, 5, 2)]:
        points = digits(label)
        found = wasserstein_barycenter(points, size, generator=rng(seed))
        assert found.objective <= 1.02 * best_of_ten(points, size), (label, size, seed)


def test_two_atoms_whose_potentials_can_only_point_back():
    for seed in range(20):
        points = rng(seed).normal(size=(12, 3))
        found = wasserstein_barycenter(points, 2, generator=rng(seed), max_iterations=30, tolerance=0)
        assert found.weights.sum() == pytest.approx(1, abs=1e-12)
        assert found.weights.min() >= (1 / 24) * (1 - 1e-9)
        assert (np.diff(found.history) <= 0).all()


@pytest.mark.parametrize("weights", ["learned", "uniform", "kmeans"])
def test_objective_is_the_exact_distance_even_with_fewer_distinct_points_than_atoms(weights):
    points = np.concatenate([np.repeat(rng().normal(size=(3, 5)), 10, axis=0), rng(1).normal(size=(2, 5))])
    found = wasserstein_barycenter(points, 8, generator=rng(), weights=weights)
    assert found.objective == pytest.approx(solved_apart(found, points), rel=1e-9, abs=1e-12)
    assert found.weights.min() > 0


def test_same_generator_same_bits():
    first, second = (wasserstein_barycenter(digits(1), 10, generator=rng(9)) for _ in range(2))
    assert np.array_equal(first.support, second.support) and np.array_equal(first.weights, second.weights)
    other = wasserstein_barycenter(digits(1), 10, generator=rng(10))
    assert not np.array_equal(first.support, other.support)


def test_another_generator_starts_kmeans_elsewhere():
    first, again, other = (
        wasserstein_barycenter(digits(1), 10, generator=rng(seed), weights="kmeans", restarts=1)
        for seed in (9, 9, 10)
    )
    assert np.array_equal(first.support, again.support)
    assert first.objective != pytest.approx(other.objective, rel=1e-6)


@pytest.mark.parametrize("initialisation", ["random_points", "normal"])
def test_the_best_of_the_starts_is_kept(initialisation):
    points, given = digits(4), {"weights": "uniform", "initialisation": initialisation, "max_iterations": 0}

    def cost(restarts: int) -> float:  # equal generators: the first starts are shared
        found = wasserstein_barycenter(points, 5, generator=rng(3), restarts=restarts, **given)
        return squared_cost(found.support, points).min(0).mean()

    costs = [cost(restarts) for restarts in range(1, 17)]
    assert (np.diff(costs) <= 1e-9).all() and costs[-1] < costs[0]


def test_a_normal_start_is_about_the_origin():
    given = {"initialisation": "normal", "restarts": 1, "max_iterations": 0}
    found = wasserstein_barycenter(digits(2) + 100, 5, generator=rng(3), **given)
    np.testing.assert_allclose(found.support, rng(3).standard_normal((5, 64)), atol=1e-9)


def test_duplicates_constants_and_single_points():
    repeated = np.repeat(rng().normal(size=(3, 5)), 10, axis=0)
    found = wasserstein_barycenter(repeated, 6, generator=rng())
    assert found.objective == pytest.approx(0, abs=1e-9) and found.weights.min() > 0
    constant = wasserstein_barycenter(np.ones((8, 3)), 2, generator=rng())
    np.testing.assert_allclose(constant.support, 1)
    single = wasserstein_barycenter(np.array([[2.0, 3.0]]), 1, generator=rng())
    np.testing.assert_allclose(single.support, [[2, 3]])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 11}, "at least as many points; there are 10"),
        ({"points": np.full((10, 2), np.nan)}, "10 of 10 points are not finite"),
        ({"weights": "learnt"}, "known are learned, uniform, kmeans"),
        ({"initialisation": "zeros"}, "known are kmeans"),
        ({"points": np.ones(10)}, "expected"),
        ({"restarts": 0}, "at least one start"),
        ({"size": 0}, "size is 0; a barycenter has at least one atom"),
        ({"weights": np.full(3, 1 / 3)}, "known are learned, uniform, kmeans"),
        ({"max_iterations": -1}, "neither may be negative"),
        ({"tolerance": np.nan}, "neither may be negative"),
        ({"initialisation": np.zeros((4, 2))}, r"expected \(3, 2\)"),
        ({"initialisation": np.full((3, 2), np.inf)}, "initialisation is not finite"),
    ],
)
def test_mistakes_are_told(change, told):
    given = {"points": rng().normal(size=(10, 2)), "size": 3, "generator": rng(), **change}
    points, size = given.pop("points"), given.pop("size")
    with pytest.raises(UserError, match=told):
        wasserstein_barycenter(points, size, **given)


def test_no_torch_in_a_barycenter_job():
    code = """
import numpy as np, workflow_scripts.compute_barycenter
from wmdd_core.barycenter import wasserstein_barycenter
wasserstein_barycenter(np.random.rand(30, 4), 3, generator=np.random.default_rng(0))
"""
    assert "torch" not in imported_by(code)


def test_a_weight_falls_to_its_floor_and_no_further():
    """Every atom becomes an image: none may weigh nothing."""
    points = np.random.default_rng(0).normal(size=(40, 2))
    start = points[:4].copy()
    start[3] = 100
    found = wasserstein_barycenter(
        points, 4, generator=np.random.default_rng(0), initialisation=start, max_iterations=1
    )
    assert found.weights.min() == pytest.approx(1 / (4 * 40))
