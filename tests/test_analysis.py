"""Distances and the bound, t-SNE and its numbers, the barycenter's trace: against closed forms."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance
from sklearn.cluster import KMeans
from torch import nn

from benchmarks.startup import imported_by
from wmdd_core.artifacts import make_header, read_json, read_tensors, write_json, write_tensors
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.metrics import (
    coverage,
    cross_entropy_lipschitz,
    mean_between_distance,
    mean_pairwise_distance,
    mean_squared_distance,
    mean_within_distance,
)
from wmdd_core.models import Classifier, build_model
from wmdd_core.relabeling import ViewSettings
from wmdd_core.seeding import numpy_generator
from workflow_scripts import embed_tsne, measure_distances, plot_distances, plot_tsne, trace_barycenters
from workflow_scripts.distilled_sets import DistilledSet, embed_images
from workflow_scripts.drawing import arranged, new_figure
from workflow_scripts.job import Job
from workflow_scripts.measure_distances import both_sides, distances, with_means
from workflow_scripts.real_images import load_teacher

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


# ---- metrics ---------------------------------------------------------------------------------


def test_mean_pairwise_distance_of_a_right_triangle():
    assert mean_pairwise_distance(np.array([[0, 0], [3, 0], [0, 4]])) == pytest.approx((3 + 4 + 5) / 3)
    assert math.isnan(mean_pairwise_distance(np.zeros((1, 2))))


def test_within_averages_over_classes_and_skips_a_class_of_one():
    points = np.array([[0.0], [2.0], [10.0], [14.0], [99.0]])
    labels = np.array([0, 0, 1, 1, 2])
    assert mean_within_distance(points, labels) == pytest.approx((2 + 4) / 2)
    assert math.isnan(mean_within_distance(points[[0, 2]], labels[[0, 2]]))


def test_between_is_the_distance_of_centroids():
    points = np.array([[0.0, 0], [2, 0], [4, 3], [4, 5], [1, 8]])
    labels = np.array([0, 0, 1, 1, 2])
    expected = (5 + 8 + 5) / 3  # centroids (1, 0), (4, 4), (1, 8)
    assert mean_between_distance(points, labels) == pytest.approx(expected)


def test_coverage_by_hand():
    real = np.array([[0.0], [1], [2], [10], [13]])  # nearest neighbours at 1, 1, 1, 3, 3
    assert coverage(real, np.array([[1.0]]), 1) == 3 / 5
    assert coverage(real, np.array([[2.5]]), 1) == 1 / 5
    assert coverage(real, np.array([[11.5]]), 1) == 2 / 5
    assert coverage(real, np.array([[1.0], [11.5]]), 1) == 1
    assert coverage(real, np.array([[-5.0]]), 1) == 0
    assert coverage(real, np.array([[5.0]]), 2) == 2 / 5  # second neighbours at 2, 1, 2, 8, 11
    with pytest.raises(UserError, match="5 real points"):
        coverage(real, real, 5)


def test_coverage_of_a_set_by_itself_is_whole_and_a_collapsed_set_covers_little():
    real = RNG.normal(size=(60, 4))
    assert coverage(real, real) == 1
    assert coverage(real, np.repeat(real[:1], 10, 0)) < coverage(real, real[:10])


def test_mean_squared_distance_is_that_of_all_pairs():
    points = RNG.normal(size=(23, 5)) + 100
    assert mean_squared_distance(points) == pytest.approx(np.square(pdist(points)).mean(), rel=1e-12)


# ---- distances and the bound -------------------------------------------------------------------


def linear_network(weight: np.ndarray, bias: np.ndarray) -> Classifier:
    """Features are the inputs; the last layer is given."""
    network = Classifier(nn.Identity(), weight.shape[1], len(weight)).double()
    network.classifier.weight.data = torch.from_numpy(weight)
    network.classifier.bias.data = torch.from_numpy(bias)
    return network


def gradient_norm(weight: np.ndarray, label: int, features: np.ndarray) -> float:
    f = torch.from_numpy(features).requires_grad_()
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(weight) @ f, torch.tensor(label))
    return float(torch.autograd.grad(loss, f)[0].norm())


@pytest.mark.parametrize("label", range(4))
def test_closed_form_lipschitz_constant_is_the_supremum_of_gradient_norms(label):
    weight = np.random.default_rng(3).normal(size=(4, 6))
    constant = cross_entropy_lipschitz(weight, label)
    samples = 10 * np.random.default_rng(4).normal(size=(200, 6))
    assert max(gradient_norm(weight, label, f) for f in samples) <= constant * (1 + 1e-12)
    farthest = np.linalg.norm(weight - weight[label], axis=1).argmax()
    along = 1e3 * (weight[farthest] - weight[label])
    assert gradient_norm(weight, label, along) == pytest.approx(constant, rel=1e-6)


def test_distances_of_two_points_are_their_distance():
    x, y = torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[3.0, 4.0]]).double()
    found = distances(x, y, torch.ones(1).double())
    assert (found["w2"], found["mmd_linear"]) == (pytest.approx(5), pytest.approx(5))


def test_distances_weigh_the_distilled_points():
    x = torch.tensor([[0.0], [4.0], [4.0], [4.0]]).double()
    y, weights = torch.tensor([[0.0], [4.0]]).double(), torch.tensor([0.25, 0.75]).double()
    assert max(distances(x, y, weights).values()) == pytest.approx(0, abs=1e-7)
    equal = distances(x, y, torch.tensor([0.5, 0.5]).double())
    assert equal["w2"] == pytest.approx(math.sqrt(0.25 * 4**2))


def test_rbf_bandwidth_comes_from_the_real_features():
    """Against the kernel written out: the real points' one pair has squared distance 4."""
    x, y = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[1.0]]).double()

    def kernel(squared):
        return sum(math.exp(-squared / (4 * 2.0**i)) for i in range(-2, 3))

    expected = (2 * kernel(0) + 2 * kernel(4)) / 4 + kernel(0) - 2 * kernel(1)
    assert distances(x, y, torch.ones(1).double())["mmd_rbf"] == pytest.approx(math.sqrt(expected))


def test_bound_is_met_with_equality_by_a_loss_on_its_steepest_line():
    """Far along W_k − W_c the loss is affine with slope L, so both sides of eq. 20 agree."""
    network = linear_network(np.array([[1.0, 0.0], [0.0, 0.0]]), np.zeros(2))
    x, y = torch.tensor([[50.0, 0.0]]).double(), torch.tensor([[80.0, 0.0]]).double()
    found = both_sides(network, x, y, torch.ones(1).double(), 1)
    assert found["w1"] == pytest.approx(30) and found["lipschitz"] == pytest.approx(1)
    assert found["difference"] == pytest.approx(found["bound"]) == pytest.approx(30)
    assert found["bound_estimate"] == pytest.approx(30)


def test_both_sides_by_hand_with_a_bias_and_unequal_weights():
    """On a line, where SciPy knows W₁, and L is the largest |W_k − W_c|."""
    weight, bias = np.array([[0.5], [-1.0], [2.0]]), np.array([0.3, -2.0, 1.5])
    x, y, weights = np.array([0.0, 1.0, 2.5]), np.array([-1.0, 3.0]), np.array([0.2, 0.8])

    def loss(f: float) -> float:
        logits = weight[:, 0] * f + bias
        return math.log(np.exp(logits).sum()) - logits[1]

    points = [*x, *y]
    slopes = [abs(loss(a) - loss(b)) / abs(a - b) for a, b in itertools.combinations(points, 2)]
    by_hand = {
        "w1": wasserstein_distance(x, y, None, weights),
        "difference": abs(np.mean([*map(loss, x)]) - 0.2 * loss(-1) - 0.8 * loss(3)),
        "lipschitz_estimate": max(slopes),
        "lipschitz": 3,
    }
    by_hand |= {
        "bound_estimate": max(slopes) * by_hand["w1"],
        "bound": 3 * by_hand["w1"],
    }
    x, y = (torch.from_numpy(points)[:, None] for points in (x, y))
    found = both_sides(linear_network(weight, bias), x, y, torch.from_numpy(weights), 1)
    assert found == pytest.approx(by_hand, rel=1e-9)


def test_bound_holds_and_mean_matching_is_below_w1():
    generator = torch.Generator().manual_seed(1)
    for trial in range(5):
        weight = torch.randn(5, 7, generator=generator).double().numpy()
        network = linear_network(weight, np.arange(5.0))
        x = torch.randn(30, 7, generator=generator).double()
        y = 2 * torch.randn(6, 7, generator=generator).double() + 1
        weights = torch.rand(6, generator=generator).double()
        found = both_sides(network, x, y, weights, trial)
        assert found["difference"] <= found["bound_estimate"] * (1 + 1e-9) <= found["bound"] * (1 + 2e-9)
        assert distances(x, y, weights)["mmd_linear"] <= found["w1"] <= distances(x, y, weights)["w2"]


def test_means_follow_the_classes_of_each_method_and_size():
    lines = [
        {"method": m, "ipc": i, "class": str(c), "w1": value + c}
        for i, m, value in ((1, "wmdd", 2.0), (1, "dm", 4.0), (10, "wmdd", 8.0))
        for c in range(2)
    ]
    table = with_means(lines)
    assert list(table["class"]) == ["0", "1", "mean"] * 3
    assert list(table[table["class"] == "mean"].w1) == [2.5, 4.5, 8.5]


# ---- a small world of files --------------------------------------------------------------------

CLASSES, RESOLUTION, PER_CLASS, IPC = 3, 8, 12, 3
SIZES = {"sre2l": [4, 3, 2], "wmdd": [IPC] * CLASSES}
WEIGHTS = {
    "sre2l": [0.4, 0.3, 0.2, 0.1, 0.5, 0.3, 0.2, 0.6, 0.4],
    "wmdd": [0.5, 0.3, 0.2, 0.1, 0.15, 0.75, 0.2, 0.6, 0.2],
}
MEAN, STD = [0.4, 0.5, 0.7], [0.2, 0.25, 0.35]
VIEWS = {"seed": 0, "crop_scale_min": 0.5, "flip": False, "cutmix": True}
RECIPE = {
    "labels": "soft",
    "epochs": 3,
    "batch_size": 4,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "temperature": 4,
    "weighted": True,
}
STUDENT = {"architecture": "convnet", "width": 4, "depth": 2}
NETWORK = {**STUDENT, "classes": CLASSES, "resolution": RESOLUTION}
SCHEDULE = {
    "epochs": 2,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "momentum": 0.9,
    "weight_decay": 0,
    "batch_size": 8,
    "crop_scale_min": 0.5,
}


@torch.no_grad()
def features_by_hand(network: Classifier, images: np.ndarray) -> torch.Tensor:
    """Of whole images uint8 (N, 3, R, R), normalised without the library."""
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (MEAN, STD))
    return network.features(torch.from_numpy((images / 255 - mean) / std).float()).double()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """Files of a dataset of three classes: description, images, teacher, features, two sets with labels."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(5)
    data = make_header("describe_dataset", {"dataset": "toy"}, {"resolution": RESOLUTION}, "")
    per_class = [PER_CLASS] * CLASSES
    description = {
        "classes": ["one", "two", "three"],
        "resolution": RESOLUTION,
        "mean": MEAN,
        "std": STD,
        **{split: {"count": sum(per_class), "per_class": per_class} for split in ("train", "test")},
    }
    write_json(root / "description.json", description, data)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    images = rng.integers(0, 120, (len(labels), 3, RESOLUTION, RESOLUTION)) + 60 * labels[:, None, None, None]
    for split in ("train", "test"):
        np.save(root / f"{split}.npy", images.astype(np.uint8))

    teacher = build_model(**NETWORK, seed=1).eval()
    place = {"dataset": "toy", "teacher": "small"}
    made = make_header("pretrain_teacher", place, {}, "", [data], network=NETWORK)
    write_tensors(root / "teacher.safetensors", teacher.state_dict(), made)
    np.save(root / "features.npy", features_by_hand(teacher, images).float().numpy())
    extracted = make_header("extract_features", place, {}, "", [made])
    write_json(root / "index.json", {"offsets": [0, 12, 24, 36]}, extracted)

    lineage = {**extracted["lineage"]}
    for method in ("sre2l", "wmdd"):
        place = {"dataset": "toy", "method": method, "ipc": str(IPC)}
        header = make_header("gather_images", place, {}, "", [data, extracted])
        own = np.repeat(np.arange(CLASSES), SIZES[method])
        if method == "sre2l":  # one image several times: collapsed
            chosen = own * PER_CLASS
        else:
            chosen = (np.arange(CLASSES)[:, None] * PER_CLASS + np.arange(IPC)).ravel()
        tensors = {
            "images": torch.from_numpy(images[chosen].astype(np.uint8)),
            "labels": torch.from_numpy(own),
            "weights": torch.tensor(WEIGHTS[method]),
        }
        write_tensors(root / f"{method}.safetensors", tensors, header)
        relabelled = make_header("relabel_images", {**place, "recipe": "soft"}, {}, "", [header])
        views = ViewSettings(**VIEWS).sample(len(own), RESOLUTION)
        write_json(root / f"{method}.json", {"views": views}, relabelled)
        soft = rng.normal(size=(RECIPE["epochs"], len(own), CLASSES)).astype(np.float16)
        np.save(root / f"{method}-labels.npy", soft)
        lineage |= relabelled["lineage"]
    expected = {rule: [made] for rule, made in lineage.items() if rule != "describe_dataset"}
    return {"root": root, "description": read_json(root / "description.json"), "expected": expected}


def small_job(world: dict, rule: str, output, settings: dict, **files) -> Job:
    root = world["root"]
    found = {"description": "description.json", "train": "train.npy", **files}
    found = {
        name: [str(root / f) for f in file] if isinstance(file, list) else str(root / file)
        for name, file in found.items()
    }
    kinds = {k: str(output / f"{rule}.{k}") for k in ("png", "pdf", "csv", "points", "evaluation")}
    settings = {"expected": world["expected"], **settings}
    return Job(rule, {"figure": rule}, found, kinds, settings, "code", "cpu", 1, str(output / "checkpoints"))


def drawn(measured: Job, main) -> dict[str, bytes]:
    """What the drawing rule makes of a measurement's files."""
    files = {**measured.input, "csv": measured.output["csv"], "points": measured.output["points"]}
    table = pd.read_csv(files["csv"])
    orders = {name: table[name].unique().tolist() for name in ("method", "ipc")}
    settings = {"labels": {"wmdd": "WMDD"}, "methods": orders["method"], "ipc": orders["ipc"]}
    main(replace(measured, input=files, settings=settings))
    return {kind: Path(measured.output[kind]).read_bytes() for kind in ("png", "pdf")}


def distances_job(world: dict, output, **settings) -> Job:
    return small_job(
        world,
        "measure_distances",
        output,
        {"recipe": RECIPE, "views": VIEWS, "student": STUDENT, **settings},
        teacher="teacher.safetensors",
        features="features.npy",
        index="index.json",
        images=["wmdd.safetensors", "sre2l.safetensors"],
        labels=["wmdd-labels.npy", "sre2l-labels.npy"],
        labels_header=["wmdd.json", "sre2l.json"],
    )


def test_distances_of_both_sets_from_files(world, tmp_path):
    job = distances_job(world, tmp_path)
    measure_distances.main(job)
    table = pd.read_csv(job.output["csv"]).set_index(["method", "class"])
    assert len(table) == 2 * (CLASSES + 1) and not table.isna().any(axis=None)
    for network in ("teacher", "student"):
        assert (table[f"{network}_difference"] <= table[f"{network}_bound"]).all()
    # By hand: the collapsed set is one point, so W₁ is the mean distance of the real features to it.
    features = np.load(job.input["features"])[:PER_CLASS].astype(np.float64)
    by_hand = np.linalg.norm(features - features[0], axis=1).mean()
    assert table.loc[("sre2l", "0"), "w1"] == pytest.approx(by_hand, rel=1e-3)
    assert (table.xs("sre2l").w2 > table.xs("wmdd").w2).all()
    # The other set's images are the first of each class, each with a weight of its own.
    features = torch.from_numpy(np.load(job.input["features"])).double()
    teacher, _ = load_teacher(job.input["teacher"], CPU)
    for c in range(CLASSES):
        x = features[c * PER_CLASS : (c + 1) * PER_CLASS]
        weights = torch.tensor(WEIGHTS["wmdd"][c * IPC : (c + 1) * IPC]).double()
        sides = both_sides(teacher, x, x[:IPC], weights, c)
        by_hand = {"w1": sides.pop("w1"), **distances(x, x[:IPC], weights)}
        by_hand |= {f"teacher_{key}": sides[key] for key in ("difference", "lipschitz", "bound")}
        assert table.loc[("wmdd", str(c)), list(by_hand)].to_dict() == pytest.approx(by_hand, rel=1e-3)
    assert not Path(job.output["png"]).exists()
    first = drawn(job, plot_distances.main)
    assert first["png"].startswith(b"\x89PNG") and first == drawn(job, plot_distances.main)


def test_rows_are_drawn_in_the_figures_order_not_the_measurements():
    table = pd.DataFrame({"method": [*"aabb"], "ipc": [10, 1, 10, 1], "number": range(4)})
    assert arranged(table, method=["b", "a"], ipc=[1, 10]).number.tolist() == [3, 2, 1, 0]
    assert arranged(table, ipc=[1, 10], method=["b", "a"]).number.tolist() == [3, 1, 2, 0]


def points_of(axes) -> dict[tuple[str, int], float]:
    """(marker, row of the figure) → where it stands on the horizontal axis."""
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return {(p.get_marker(), round(p.get_ydata()[0])): p.get_xdata()[0] for p in points}


def test_the_figure_draws_distances_relative_to_the_first_method_and_both_sides_of_the_bound():
    table = pd.DataFrame(
        {
            "method": ["sre2l", "sre2l", "wmdd", "wmdd"],
            "ipc": [1, 1, 1, 1],
            "class": ["0", "mean", "0", "mean"],
            "w1": [77.0, 2.0, 99.0, 1.0],
            "w2": [77.0, 4.0, 99.0, 1.0],
            "mmd_linear": [77.0, 8.0, 99.0, 16.0],
            "mmd_rbf": [77.0, 1.0, 99.0, 0.125],
            "teacher_difference": [77.0, 0.5, 99.0, 0.25],
            "teacher_bound_estimate": [77.0, 3.0, 99.0, 2.0],
            "teacher_bound": [77.0, 16.0, 99.0, 8.0],
        }
    )
    relative, bound = map(points_of, plot_distances.draw(table, {}).axes)
    ratios = {"w1": 0.5, "w2": 0.25, "mmd_linear": 2, "mmd_rbf": 0.125}
    for metric, marker in plot_distances.MARKERS.items():
        assert (relative[marker, 0], relative[marker, 1]) == (1, ratios[metric])
    assert [bound[marker, 0] for marker in "o|>"] == [0.5, 3, 16]
    assert [bound[marker, 1] for marker in "o|>"] == [0.25, 2, 8]


def test_without_a_student_the_teachers_loss_alone_is_measured(world, tmp_path):
    job = distances_job(world, tmp_path)
    for key in ("recipe", "views", "student"):
        del job.settings[key]
    for key in ("labels", "labels_header", "train"):
        del job.input[key]
    measure_distances.main(job)
    columns = pd.read_csv(job.output["csv"]).columns
    assert "teacher_bound" in columns and not [c for c in columns if c.startswith("student")]


@pytest.mark.parametrize("rule", ["gather_images", "relabel_images", "extract_features (small)"])
def test_artefacts_of_another_configuration_are_refused_by_name(world, tmp_path, rule):
    job = distances_job(world, tmp_path, expected={**world["expected"], rule: ["another"]})
    with pytest.raises(UserError, match=r"(safetensors|json) was made by other settings"):
        measure_distances.main(job)


def tampered(job: Job, folder: Path, file: str, part: str, changes: dict) -> Job:
    """The job with a copy of `file` in which `part` of the header, or the views, are changed."""
    copy, original = str(folder / file), str(Path(job.input["description"]).parent / file)
    if file.endswith("json"):
        content = read_json(original)
        header = content.pop("header")
        {**content, **header}[part].update(changes)
        write_json(copy, content, header)
    else:
        tensors, header = read_tensors(original)
        header[part].update(changes)
        write_tensors(copy, tensors, header)
    files = json.loads(json.dumps(job.input).replace(json.dumps(original), json.dumps(copy)))
    return replace(job, input=files)


CHECKED = ("teacher.safetensors", "index.json", "wmdd.safetensors", "sre2l.safetensors")
LABELLED = ("wmdd.json", "sre2l.json")
PARTS = {  # part → files, what is changed, what is said of it
    "dataset": (CHECKED, "wildcards", {"dataset": "9"}, "was made for dataset '9'"),
    "version": (CHECKED, "lineage", {"describe_dataset": "9"}, "and .* different versions of the dataset"),
    "settings": (CHECKED + LABELLED, "lineage", {"a_step": "9"}, "was made by other settings .* of a_step"),
    "method": (LABELLED, "wildcards", {"method": "9"}, "was made for method '9'"),
    "ipc": (LABELLED, "wildcards", {"ipc": "9"}, "was made for ipc '9'"),
    "views": (LABELLED, "views", {"box": [[9, 9, 9, 9]]}, ": these labels are of other views"),
}


@pytest.mark.parametrize(("name", "file"), [(n, file) for n, (files, *_) in PARTS.items() for file in files])
def test_each_file_of_another_place_version_or_setting_is_refused_by_name(world, tmp_path, name, file):
    _, part, changes, told = PARTS[name]
    job = tampered(distances_job(world, tmp_path), tmp_path, file, part, changes)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / file))} ?{told}"):
        measure_distances.main(job)


def test_features_are_of_normalised_images(world):
    images, network = np.load(world["root"] / "train.npy")[::5], build_model(**NETWORK, seed=3).eval()
    found = embed_images(network, torch.from_numpy(images), world["description"], CPU)
    assert torch.allclose(found, features_by_hand(network, images), rtol=1e-4, atol=1e-5)


# ---- t-SNE -------------------------------------------------------------------------------------


def tsne_job(world: dict, output, **figure) -> Job:
    settings = {"figure": figure, "schedule": SCHEDULE, "student": STUDENT, "flip": False, "seed": 0}
    images = ["sre2l.safetensors", "wmdd.safetensors"]
    return small_job(world, "embed_tsne", output, settings, images=images)


def test_maps_are_the_same_for_a_seed_and_count_what_is_there(world, tmp_path):
    made = []
    for name in ("first", "second"):
        job = tsne_job(world, tmp_path / name, images=8)
        embed_tsne.main(job)
        made.append({k: Path(job.output[k]).read_bytes() for k in ("csv", "points")})
        made[-1] |= drawn(job, plot_tsne.main)
    assert made[0] == made[1]
    points = pd.read_csv(job.output["points"])
    counts = points.groupby(["method", "kind", "class"]).size()
    assert set(counts.xs("real", level="kind")) == {8}
    assert {m: counts[m, "distilled"].tolist() for m in SIZES} == SIZES
    assert list(dict.fromkeys(points.method)) == ["sre2l", "wmdd"]
    numbers = pd.read_csv(job.output["csv"]).set_index("method")
    assert numbers.loc["sre2l", "within"] < 1e-6 < 1e-3 < numbers.loc["wmdd", "within"]
    assert numbers.loc["sre2l", "coverage"] < numbers.loc["wmdd", "coverage"]
    # Both are copies of real images, one or three of a class's twelve: shares of the other eleven or nine.
    for method, others in (("sre2l", 11), ("wmdd", 9)):
        count = numbers.loc[method, "coverage"] * CLASSES * others
        assert count == pytest.approx(round(count), abs=1e-3)


def test_the_network_of_a_map_is_trained_on_every_real_and_every_distilled_image(world, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (18, 3, RESOLUTION, RESOLUTION), generator=generator).to(torch.uint8)
    labels = torch.arange(CLASSES).repeat(6)
    own = DistilledSet("wmdd", "2", images[12:], labels[12:], torch.full((6,), 0.5), {})
    seen = []

    def record(model, schedule, batches, *_, **__):
        seen.extend(batches(0))

    monkeypatch.setattr(embed_tsne, "fit", record)
    settings = {"schedule": {**SCHEDULE, "crop_scale_min": 1}, "student": STUDENT, "flip": False, "seed": 0}
    embed_tsne.train_on_mixture(settings, own, images[:12], labels[:12], world["description"])

    def listed(labels, pixels):
        return sorted(torch.cat([labels[:, None], pixels.flatten(1).long()], 1).tolist())

    views, shown = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # Neither cropped nor mirrored, a view is the image itself, but normalised.
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert listed(shown, (255 * (std * views + mean)).round()) == listed(labels, images)


def test_the_networks_of_all_methods_have_one_seed_and_crops_and_flips_as_in_the_settings(
    world, tmp_path, monkeypatch
):
    given = []

    def record(function, *chosen):
        def call(*arguments, **named):
            given.append({key: named[key] for key in chosen})
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(embed_tsne, "real_batches", record(embed_tsne.real_batches, "crop_scale_min", "flip"))
    monkeypatch.setattr(embed_tsne, "build_model", record(build_model, "seed"))
    monkeypatch.setattr(embed_tsne, "fit", lambda *_, **__: None)
    for flip in (False, True):
        job = tsne_job(world, tmp_path)
        job.settings["flip"] = flip
        given.clear()
        embed_tsne.main(job)
        assert given[0] == given[2] == {"crop_scale_min": SCHEDULE["crop_scale_min"], "flip": flip}
        assert given[1] == given[3] and len(given) == 4


@pytest.mark.parametrize(("count", "perplexity"), [(10, 3), (40, 13), (91, 30), (200, 30)])
def test_perplexity_is_thirty_or_less_for_few_points(monkeypatch, count, perplexity):
    given = []

    def record(**settings):
        given.append(settings["perplexity"])
        return SimpleNamespace(fit_transform=lambda points: points)

    monkeypatch.setattr("sklearn.manifold.TSNE", record)
    embed_tsne.flatten(np.zeros((count, 2)), 0)
    assert given == [perplexity]


def test_tsne_is_deterministic():
    points = RNG.normal(size=(40, 6))
    first = embed_tsne.flatten(points, 2**62)
    assert np.array_equal(first, embed_tsne.flatten(points, 2**62))
    assert first.shape == (40, 2)


def test_tsne_keeps_two_far_groups_apart():
    points = np.concatenate([RNG.normal(size=(25, 5)), RNG.normal(size=(25, 5)) + 50])
    places = embed_tsne.flatten(points, 1)
    group = np.repeat([0, 1], 25)
    nearest = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(50)
    assert (group[nearest.argmin(1)] == group).all()


def test_real_points_are_drawn_evenly_by_seed():
    labels = np.repeat([0, 1, 2], [5, 30, 12])
    drawn = embed_tsne.drawn_evenly(labels, 10, (0, "toy"))
    assert np.bincount(labels[drawn]).tolist() == [5, 10, 10] and len(set(drawn)) == 25
    assert np.array_equal(drawn, embed_tsne.drawn_evenly(labels, 10, (0, "toy")))
    assert not np.array_equal(drawn, embed_tsne.drawn_evenly(labels, 10, (1, "toy")))


def test_summary_compares_a_class_with_as_many_random_real_ones():
    real = np.concatenate([RNG.normal(size=(40, 3)), RNG.normal(size=(40, 3)) + 20])
    labels = np.repeat([0, 1], 40)
    collapsed, spread = real[[0, 0, 0, 0, 40, 40, 40, 40]], real[[0, 1, 2, 3, 40, 41, 42, 43]]
    own = np.repeat([0, 1], 4)
    found = [
        embed_tsne.summarise(embed_tsne.Embedded("m", real, labels, np.zeros(80, bool), d, own), (0,))
        for d in (collapsed, spread)
    ]
    assert found[0]["within"] == 0 and found[1]["within"] > 1
    assert found[0]["coverage"] < found[1]["coverage"] <= 1 and 0 < found[0]["coverage_random"] < 1
    assert found[0]["within_real"] == pytest.approx((pdist(real[:40]).mean() + pdist(real[40:]).mean()) / 2)
    assert found[0]["between"] == pytest.approx(np.linalg.norm(real[0] - real[40]))


def test_coverage_by_chance_is_of_the_other_images_and_averaged_over_classes(monkeypatch):
    """By hand as in `test_coverage_by_hand`, the first image of each class drawn."""
    monkeypatch.setattr(embed_tsne, "NEIGHBOURS", 1)
    unshuffled = SimpleNamespace(permutation=lambda rows: rows)
    monkeypatch.setattr(embed_tsne, "numpy_generator", lambda *_: unshuffled)
    others = [0.0, 1, 2, 10, 13]
    real = np.array([11.5, *others, 101, *(100 + np.array(others))])[:, None]
    labels, distilled = np.repeat([0, 1], 6), np.array([[1.5], [102.5]])
    embedded = embed_tsne.Embedded("m", real, labels, np.zeros(12, bool), distilled, np.array([0, 1]))
    found = embed_tsne.summarise(embedded, (0,))
    assert found["coverage_random"] == pytest.approx((2 / 5 + 3 / 5) / 2)
    assert found["coverage"] == pytest.approx((2 / 6 + 1 / 6) / 2)


def test_an_image_that_a_set_copies_does_not_cover_itself():
    real = np.concatenate([RNG.normal(size=(30, 3)), RNG.normal(size=(10, 3)) / 100 + 20])
    copied = np.arange(40) >= 30  # a tight group apart from all others
    own = np.zeros(10, int)
    embedded = embed_tsne.Embedded("m", real, np.zeros(40, int), copied, real[30:], own)
    assert embed_tsne.summarise(embedded, (0,))["coverage"] == 0


def test_a_class_with_too_few_real_images_has_no_coverage_but_a_place_on_the_map():
    real, labels = RNG.normal(size=(45, 3)), np.repeat([0, 1], [40, 5])
    fresh = np.zeros(45, bool)
    embedded = embed_tsne.Embedded("m", real, labels, fresh, real[[0, 1, 40, 41]], np.repeat([0, 1], 2))
    found = embed_tsne.summarise(embedded, (0,))
    assert np.isnan(found["coverage"]) and np.isnan(found["coverage_random"]) and found["within"] > 0


def test_each_map_fills_its_panel():
    """Few points may fly apart: a common scale would show the other methods' maps as dots."""
    place = {"kind": "real", "class": 0, "x": [-1.0, 1.0], "y": [0.0, 0.5]}
    near = pd.DataFrame({"method": "near", **place})
    far = near.assign(method="far", x=200 * near.x, y=200 * near.y)
    panels = plot_tsne.draw(pd.concat([near, far]), {}, ["0"]).axes
    assert [axes.get_xlim() for axes in panels] == [pytest.approx((-s, s)) for s in (1.06, 212)]
    assert [axes.get_ylim() for axes in panels] == [axes.get_xlim() for axes in panels]


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.08), (0.3, 4.5), (0.013, 0.7), (0.01, 30)])
def test_labels_of_a_logarithmic_axis_stand_apart(low, high):
    figure = new_figure(2.75, 1)
    axes = figure.subplots()
    axes.plot([low, high], [0, 1])
    plot_distances.set_log_axis(axes)
    figure.draw_without_rendering()
    ticks = axes.xaxis.get_major_ticks() + axes.xaxis.get_minor_ticks()
    labels = [t.label1 for t in ticks if t.label1.get_text()]
    boxes = sorted(label.get_window_extent().extents[[0, 2]].tolist() for label in labels)
    inside = [b for b in boxes if axes.bbox.x0 - 20 < b[0] and b[1] < axes.bbox.x1 + 20]
    assert len(inside) >= 2 and all(a[1] < b[0] for a, b in itertools.pairwise(inside))


def test_a_map_shows_the_first_classes_or_those_named():
    assert embed_tsne.shown_classes({}, 1000) == list(range(len(plot_tsne.CLASS_COLOURS)))
    assert embed_tsne.shown_classes({}, 3) == [0, 1, 2]
    assert embed_tsne.shown_classes({"classes": [7, 2]}, 1000) == [2, 7]


# ---- the trace ---------------------------------------------------------------------------------


def test_kmeans_bound_on_points_whose_optimum_is_known():
    points = np.array([[0.0], [2.0], [100.0], [104.0]])
    assert trace_barycenters.kmeans_bound(points, 2, 0) == pytest.approx((1 + 1 + 4 + 4) / 4)
    assert trace_barycenters.kmeans_bound(points, 1, 0) == pytest.approx(points.var())
    assert trace_barycenters.kmeans_bound(points, 4, 0) == 0


def test_the_bound_is_the_best_of_ten_runs_to_convergence(monkeypatch):
    given = []

    def record(size, **settings):
        given.append((size, settings))
        return KMeans(size, **settings)

    monkeypatch.setattr("sklearn.cluster.KMeans", record)
    trace_barycenters.kmeans_bound(RNG.normal(size=(9, 2)), 3, 2**32 + 5)
    assert given == [(3, {"n_init": 10, "tol": 0, "random_state": 5})]


def test_every_trace_runs_on_until_an_iteration_gains_nothing(monkeypatch):
    given = []

    def record(points, size, *, generator, **settings):
        given.append((generator.integers(2**62), settings))
        return wasserstein_barycenter(points, size, generator=generator, **settings)

    monkeypatch.setattr(trace_barycenters, "wasserstein_barycenter", record)
    own = {"weights": "uniform", "restarts": 3, "max_iterations": 2, "tolerance": 0.5}
    settings, names = {"barycenters": {"b": own}, "iterations": 7}, (1, "toy", "barycenter", 2, 4)
    trace_barycenters.trace_class(RNG.normal(size=(20, 3)), 4, settings, names)
    drawn, (first, random) = {draw for draw, _ in given}, [settings for _, settings in given]
    assert drawn == {numpy_generator(*names).integers(2**62)}
    until = {"max_iterations": 7, "tolerance": 0}
    assert first == {"weights": "uniform", "restarts": 3, **until}
    assert random == {"weights": "uniform", "initialisation": "random_points", "restarts": 1, **until}


def trace_lines(points: np.ndarray, size: int, iterations: int = 15) -> pd.DataFrame:
    barycenters = {"learned": {"weights": "learned"}, "uniform": {"weights": "uniform"}}
    settings = {"barycenters": barycenters, "iterations": iterations}
    lines = trace_barycenters.trace_class(points, size, settings, (0, "toy", "barycenter", 0, size))
    return pd.DataFrame(lines).assign(**{"class": 0, "ipc": size})


def test_traces_fall_and_stay_above_the_bound_but_for_local_optima():
    points = np.random.default_rng(7).normal(size=(80, 6))
    table = trace_lines(points, 5)
    optimum = KMeans(5, n_init=2000, random_state=1).fit(points).inertia_ / len(points)
    bound = table.w2_squared[table.barycenter == "kmeans"].item()
    assert optimum * (1 - 1e-9) <= bound <= optimum * 1.05
    for place, own in table.dropna(subset="start").groupby(["barycenter", "start"]):
        history = own.w2_squared.to_numpy()
        assert own.iteration.tolist() == list(range(len(own))), place
        assert (np.diff(history) <= 1e-9 * history[0]).all(), place
        assert history.min() >= optimum * (1 - 1e-9), place
        assert np.allclose(own.excess_percent, 100 * (history / bound - 1)), place
    assert set(table.start.dropna()) == {"kmeans++", "random_points"}


def test_one_atom_is_the_mean_after_one_step():
    points = np.random.default_rng(8).normal(size=(30, 4))
    table = trace_lines(points, 1, 3)
    after = table[table.iteration == 1]
    assert len(after) == 4 and np.allclose(after.w2_squared, points.var(0).sum())


def test_an_entrys_own_start_is_kept_and_not_traced_twice():
    given = {"weights": "uniform", "initialisation": "normal", "restarts": 2}
    starts = trace_barycenters.starts_of(given)
    assert list(starts) == ["normal", "random_points"] and starts["normal"] == given
    random = trace_barycenters.starts_of({**given, "initialisation": "random_points"})
    assert list(random) == ["random_points"]


def test_trace_from_files(world, tmp_path):
    figure = {"ipc": [2, 4], "iterations": 6, "classes": [0, 2]}
    barycenters = {n: {"weights": n, "max_iterations": 100} for n in ("learned", "uniform")}
    barycenters["random"] = {"weights": "uniform", "initialisation": "random_points"}
    settings = {"figure": figure, "barycenters": barycenters, "dataset": "toy", "seed": 0}
    files = {"features": "features.npy", "index": "index.json"}
    job = small_job(world, "trace_barycenters", tmp_path, settings, **files)
    trace_barycenters.main(job)
    table = pd.read_csv(job.output["csv"])
    assert set(table["class"]) == {0, 2} and set(table.ipc) == {2, 4}
    assert table[table.barycenter == "learned"].iteration.max() <= 6
    assert (table.seconds >= 0).all() and (table[table.barycenter == "kmeans"].excess_percent == 0).all()
    features = np.load(job.input["features"]).astype(np.float64)
    for place, own in table[table.barycenter == "learned"].groupby(["class", "ipc", "start"]):
        c, size, start = place
        points, generator = features[12 * c : 12 * c + 12], numpy_generator(0, "toy", "barycenter", c, size)
        chosen = {"weights": "learned", "initialisation": start, "max_iterations": 6, "tolerance": 0}
        chosen["restarts"] = 1 if start == "random_points" else 20
        by_hand = wasserstein_barycenter(points, size, generator=generator, **chosen).history
        assert own.w2_squared.to_numpy() == pytest.approx(by_hand, rel=1e-6), place
    with pytest.raises(UserError, match="fewer than 99"):
        trace_barycenters.traced_classes({"ipc": [99]}, read_json(job.input["index"])["offsets"])
    job.settings["expected"]["extract_features (small)"] = ["another"]
    with pytest.raises(UserError, match="index.json was made by other settings"):
        trace_barycenters.main(job)


def test_a_trace_that_ended_early_stays_where_it_is():
    own = pd.DataFrame({"class": [0, 0, 1], "iteration": [0, 1, 0], "excess_percent": [9.0, 3.0, 4.0]})
    assert trace_barycenters.curves(own, 3).to_numpy().tolist() == [[9, 4], [3, 4], [3, 4], [3, 4]]


def test_tracing_needs_no_torch():
    assert "torch" not in imported_by("import workflow_scripts.trace_barycenters")
