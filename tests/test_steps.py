"""The steps of the main road hand on what the ones before have made: rows, weights, seeds, splits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from wmdd_core import relabeling
from wmdd_core.artifacts import make_header, read_arrays, read_json, read_tensors, write_tensors
from wmdd_core.augmentation import normalise
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.models import freeze
from wmdd_core.progress import Progress
from wmdd_core.recovery import Recovered
from wmdd_core.relabeling import soft_label_loss
from wmdd_core.seeding import derive_seed, numpy_generator, torch_generator
from wmdd_core.training import Curve, Schedule
from workflow_scripts import (
    compute_barycenter,
    decode_images,
    describe_dataset,
    distil_baseline,
    evaluate_all_real,
    evaluate_student,
    extract_features,
    gather_images,
    import_images,
    pretrain_teacher,
    real_images,
    recover_images,
    relabel_images,
    select_images,
)
from workflow_scripts.distilled_sets import embed_images
from workflow_scripts.job import Job
from workflow_scripts.real_images import draw_random, load_teacher, normalisation, open_images
from workflow_scripts.recover_images import build_shard
from workflow_scripts.select_images import nearest_rows

CPU, IPC = torch.device("cpu"), 12
OUTPUT = {
    describe_dataset: ("description.json",),
    pretrain_teacher: ("checkpoint.safetensors", "metrics.json", "curve.csv"),
    extract_features: ("features.npy", "index.json", "statistics.safetensors"),
    compute_barycenter: ("barycenter.npz",),
    gather_images: ("images.safetensors", "header.json", "losses.csv", "png"),
    relabel_images: ("labels.npy", "header.json"),
    evaluate_student: ("evaluation.json",),
}


class Road:
    def __init__(self, root):
        self.root, self.files = root, {}

    def job(self, rule, output, settings, **place):
        place = {"dataset": "digits", **place}
        state = str(self.root / "state")
        return Job(rule, place, dict(self.files), output, settings, "code", "cpu", 1, state)

    def make(self, module, settings, output=None, **place):
        output = output or {n.split(".")[0]: str(self.root / n) for n in OUTPUT[module]}
        module.main(self.job(module.__name__.split(".")[-1], output, settings, **place))
        return output


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    road = Road(tmp_path_factory.mktemp("road"))
    data = {"source": "digits", "resolution": 8, "test_fraction": 0.2, "classes": 10, "seed": 0}
    road.files |= road.make(describe_dataset, data)
    for split in ("train", "test"):
        output = {"images": str(road.root / f"{split}.npy")}
        road.files[split] = road.make(decode_images, data, output, split=split)["images"]
    teacher = {
        **{"architecture": "convnet", "width": 4, "depth": 2, "flip": False, "seed": 0},
        **{"epochs": 1, "optimizer": "sgd", "learning_rate": 0.1, "batch_size": 100, "crop_scale_min": 0.5},
    }
    road.files["teacher"] = road.make(pretrain_teacher, teacher, teacher="t")["checkpoint"]
    road.files |= road.make(extract_features, {}, teacher="t")
    settings = {"weights": "learned", "max_iterations": 5, "seed": 3}
    place = {"teacher": "t", "barycenter": "learned", "ipc": str(IPC), "block": "2-4"}
    road.files["barycenters"] = [road.make(compute_barycenter, settings, **place)["barycenter"]]
    return road


@pytest.fixture
def labels(road):
    return np.repeat(np.arange(10), read_json(road.files["description"])["train"]["per_class"])


def test_features_are_those_of_the_images_in_their_order(road, labels):
    teacher, _ = load_teacher(road.files["teacher"], CPU)
    description, images = read_json(road.files["description"]), torch.from_numpy(np.load(road.files["train"]))
    wanted = embed_images(freeze(teacher), images, description, CPU)
    np.testing.assert_allclose(np.load(road.files["features"]), wanted, rtol=1e-5, atol=1e-5)
    assert read_json(road.files["index"])["offsets"] == np.searchsorted(labels, range(11)).tolist()


def test_a_barycenter_is_that_of_its_classes_features_by_its_seed(road, labels):
    arrays, _ = read_arrays(road.files["barycenters"][0])
    features = np.load(road.files["features"]).astype(np.float64)
    for row, c in enumerate(arrays["classes"]):
        generator = numpy_generator(3, "digits", "barycenter", int(c), IPC)
        wanted = wasserstein_barycenter(features[labels == c], IPC, generator=generator, max_iterations=5)
        assert np.array_equal(arrays["support"][row], wanted.support)
        assert np.array_equal(arrays["weights"][row], wanted.weights)


@pytest.mark.parametrize(("numbers", "layout"), [(range(IPC), "whole_classes"), ([4, 5], "one_per_class")])
def test_a_shard_pairs_atoms_weights_and_statistics(road, labels, numbers, layout):
    job, settings = road.job("recover_images", {}, {}), {"feature_term": "barycenter", "bn_term": "per_class"}
    shard, _ = build_shard(job, settings, [4, 2], list(numbers), layout)
    assert shard.real_features is None
    arrays, _ = read_arrays(road.files["barycenters"][0])
    for row, (g, i) in enumerate(zip(shard.group.tolist(), shard.index.tolist(), strict=True)):
        place = [2, 3, 4].index([4, 2][g])
        assert np.array_equal(shard.atoms[row], arrays["support"][place, i])
        assert shard.weights[row] == arrays["weights"][place, i]
    statistics, _ = read_tensors(road.files["statistics"])
    for name, layer in shard.statistics.items():
        assert all(torch.equal(v, statistics[f"{name}.{part}"]) for part, v in vars(layer).items())
        assert (layer.var >= 0).all() and (layer.mean < 0).any()
    assert shard.batch is None if layout == "whole_classes" else shard.batch.tolist() == [0, 1, 0, 1]
    settings = {"feature_term": "mmd_rbf", "bn_term": "running"}
    shard, _ = build_shard(job, settings, [4, 2], list(numbers), layout)
    assert shard.atoms is None and not shard.statistics
    drawn = shard.real_features(4, 10, torch.Generator().manual_seed(0))
    own = np.load(road.files["features"])[labels == 4]
    assert len(drawn) == 10 and all((own == row.numpy()).all(1).any() for row in drawn)
    assert not torch.equal(drawn, shard.real_features(4, 10, torch.Generator().manual_seed(1)))


def rows_of(image, images):
    """The rows of `images` that hold just this one."""
    return (images == image).flatten(1).all(1).nonzero().flatten().tolist()


def training_images(road):
    return torch.from_numpy(np.load(road.files["train"]))


@pytest.mark.parametrize("ipc", [1, 3])
def test_kmeans_selects_different_images_of_each_class_near_its_centres(road, labels, tmp_path, ipc):
    output = {"shard": str(tmp_path / "shard.safetensors")}
    settings, place = {"selection": "kmeans", "seed": 0}, {"method": "kmeans_real", "shard": "0"}
    road.make(select_images, settings, output, ipc=str(ipc), **place)
    tensors, _ = read_tensors(output["shard"])
    features = np.load(road.files["features"]).astype(np.float64)
    for c in range(10):
        own, chosen = training_images(road)[labels == c], tensors["images"][tensors["labels"] == c]
        found = [rows_of(image, own)[0] for image in chosen]
        assert len(set(found)) == len(found) == ipc
        if ipc == 1:  # whose one centre is the mean
            points = features[labels == c]
            assert found == [np.linalg.norm(points - points.mean(0), axis=1).argmin()]


def test_what_is_selected_depends_on_seed_dataset_and_class(road, labels, tmp_path):
    output = {"shard": str(tmp_path / "shard.safetensors")}

    def selected(selection, seed, dataset="digits"):
        """The numbers, within their class, of five images of each class."""
        place = {"dataset": dataset, "method": "m", "ipc": "5", "shard": "0"}
        road.make(select_images, {"selection": selection, "seed": seed}, output, **place)
        tensors, _ = read_tensors(output["shard"])
        own = [training_images(road)[labels == c] for c in range(10)]
        pairs = zip(tensors["images"], tensors["labels"].tolist(), strict=True)
        return [rows_of(image, own[c])[0] for image, c in pairs]

    first = selected("random", 0)
    assert first == selected("random", 0)
    assert first != selected("random", 1) and first != selected("random", 0, "other")
    assert len({tuple(first[5 * c : 5 * c + 5]) for c in range(10)}) == 10  # an order for each class
    features = np.load(road.files["features"]).astype(np.float64)
    wanted = [
        nearest_rows(features[labels == c], 5, derive_seed(7, "digits", "kmeans", c)) for c in range(10)
    ]
    assert selected("kmeans", 7) == torch.cat(wanted).tolist()


def test_kmeans_keeps_the_best_of_ten_runs(monkeypatch):
    given = {}

    def recorded(count, **named):
        given.update(named)
        return KMeans(count, **named)

    monkeypatch.setattr("sklearn.cluster.KMeans", recorded)
    nearest_rows(np.random.default_rng(0).normal(size=(30, 2)), 3, 2**32 + 5)
    assert given == {"n_init": 10, "random_state": 5}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_of_equal_images_each_is_selected_once():
    chosen = nearest_rows(np.array([[0.0], [0.0], [0.0], [5.0]]), 3, 0)
    assert len(set(chosen.tolist())) == 3


def test_a_start_from_real_images_takes_different_ones_of_each_class(road, labels):
    description = read_json(road.files["description"])
    store = open_images(road.job("recover_images", {}, {}), description, "train")
    own, index = torch.tensor([4, 2, 4, 2]), torch.tensor([0, 0, 1, 1])
    moments = normalisation(description)
    drawn = draw_random(store, own, index, 0, "digits", *moments)
    images = normalise(training_images(road), *moments)
    found = [rows_of(image, images) for image in drawn]
    assert labels[[rows[0] for rows in found]].tolist() == own.tolist()
    assert len({rows[0] for rows in found}) == 4


@pytest.mark.parametrize("kind", ["dm", "dc"])
def test_baselines_compare_a_class_with_its_own_images(road, labels, monkeypatch, kind):
    given = {}

    def loop(real, initial, own, build_network, _, names, *__):
        given.update(real=real, initial=initial, labels=own, build_network=build_network, names=names)
        return initial, torch.zeros(1, 10)

    monkeypatch.setattr(distil_baseline, f"distil_{kind}", loop)
    description = read_json(road.files["description"])
    store = open_images(road.job("distil_baseline", {}, {}), description, "train")
    settings = {"outer_loops": 1, "inner_steps": 1} if kind == "dc" else {}
    network = {"architecture": "convnet", "classes": 10, "resolution": 8, "width": 4, "depth": 2}
    made = distil_baseline.distil(kind, settings, description, store, 2, network, (0, "digits"), CPU, None)
    images = normalise(training_images(road), *normalisation(description))
    drawn = [given["real"](3, 5, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = [rows_of(image, images)[0] for image in drawn[0]]
    assert set(labels[found]) == {3} and len(set(found)) == 5 and not torch.equal(*drawn)
    assert given["names"] == (0, "digits", kind)
    first, other, again = (given["build_network"](seed).classifier.weight for seed in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert made["labels"].tolist() == given["labels"].tolist() == np.repeat(np.arange(10), 2).tolist()
    if kind == "dm":  # starts from real images
        starts = [rows_of(image, images)[0] for image in given["initial"]]
        assert labels[starts].tolist() == made["labels"].tolist()


def test_recovery_is_given_batches_start_precision_and_progress(road, labels, tmp_path, monkeypatch):
    given = {}

    def recover(model, shard, settings, **named):
        given.update(named, shard=shard)
        return Recovered(named["initial"], {"bn_loss": torch.zeros(1, 1)})

    monkeypatch.setattr(recover_images, "recover_images", recover)
    needed = ("description", "train", "teacher")
    monkeypatch.setattr(road, "files", {name: road.files[name] for name in needed})
    settings = {
        **{"feature_term": "cross_entropy", "bn_term": "running", "loss_form": "released", "lambda_bn": 1},
        **{"iterations": 1, "learning_rate": 0.1, "crop_scale_min": 1, "roll": 0, "flip": False, "seed": 6},
        **{"start": "real", "precision": "bfloat16"},
        "sharding": {"classes": 10, "batch_size": 20, "batch_layout": "one_per_class"},
    }
    output = {"shard": str(tmp_path / "shard.safetensors")}
    road.make(recover_images, settings, output, method="sre2l", ipc=str(IPC), shard="3")
    assert given["shard"].index.tolist() == [6, 7] * 10  # two batches of one image a class
    assert given["shard"].batch.tolist() == [0, 1] * 10
    assert given["seed_names"] == (6, "digits")
    assert isinstance(given["precision"], torch.autocast) and isinstance(given["progress"], Progress)
    images = normalise(training_images(road), *normalisation(read_json(road.files["description"])))
    found = [rows_of(image, images)[0] for image in given["initial"]]
    assert labels[found].tolist() == np.repeat(np.arange(10), 2).tolist() and len(set(found)) == 20
    stored = read_tensors(output["shard"])[0]["images"]
    assert torch.equal(stored, torch.from_numpy(training_images(road).numpy()[found]))


def record_seeds(monkeypatch, module, seeds: list[int]) -> list[dict]:
    """Note the seed and the description of each network that a script builds."""
    networks, build = [], module.build_model

    def build_model(*, seed, **network):
        seeds.append(seed)
        networks.append(network)
        return build(seed=seed, **network)

    monkeypatch.setattr(module, "build_model", build_model)
    return networks


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("module", [pretrain_teacher, evaluate_all_real])
def test_training_on_real_images_is_given_flips_crops_precision_and_progress(
    road, tmp_path, monkeypatch, module, flip
):
    given = {}

    def fit(model, schedule, *_, **named):
        given.update(named, schedule=schedule)
        return Curve([0.5], [None])

    def real_batches(images, labels, size, mean, std, names, **named):
        given.update(named, size=size, names=names)

    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(real_images, "real_batches", real_batches)
    build_model = record_seeds(monkeypatch, module, seeds := [])
    network = {"architecture": "convnet", "width": 4, "depth": 2, "norm": "instance"}
    recipe = {
        "epochs": 1,
        "optimizer": "adam",
        "learning_rate": 0.1,
        "batch_size": 50,
        "crop_scale_min": 0.25,
    }
    recipe |= {"momentum": 0.5, "weight_decay": 0.25, "smoothing": 2}
    common = {"flip": flip, "seed": 2, "precision": "bfloat16"}
    if module is pretrain_teacher:
        settings, place = {**network, **recipe, **common}, {"teacher": "t"}
        output = {n.split(".")[0]: str(tmp_path / n) for n in OUTPUT[module]}
    else:
        settings = {"recipe": recipe, "student": network, **common}
        place = {"method": "all_real", "student": "s", "seed": "1"}
        output = {"evaluation": str(tmp_path / "evaluation.json")}
    road.make(module, settings, output, **place)
    assert (given["flip"], given["crop_scale_min"], given["size"]) == (flip, 0.25, 50)
    assert given["schedule"] == Schedule(1, "adam", 0.1, 0.5, 0.25, smoothing=2)
    part = ("teacher", "t") if module is pretrain_teacher else ("all real", "1")
    assert given["names"] == (2, "digits", *part) and seeds == [derive_seed(2, "digits", *part)]
    assert build_model == [{"classes": 10, "resolution": 8, **network}]
    tested = read_json(output["metrics" if module is pretrain_teacher else "evaluation"])
    assert tested["count"] == read_json(road.files["description"])["test"]["count"]
    assert isinstance(given["precision"], torch.autocast) and isinstance(given["progress"], Progress)
    if module is pretrain_teacher:
        top1 = read_json(output["metrics"])["top1"]
        with open(output["curve"]) as file:
            assert file.read() == f"epoch,train_loss,top1\n1,0.500000,{top1:.4f}\n"


def test_losses_are_summed_over_shards_and_classes_and_counted_from_one(tmp_path):
    shards = [{"bn_loss": np.ones((12, 2))}, {"bn_loss": np.full((12, 3), 2.0)}]
    gather_images.write_losses(str(tmp_path / "losses.csv"), shards)
    assert (tmp_path / "losses.csv").read_text() == "iteration,bn_loss\n1,8\n11,8\n12,8\n"


@pytest.fixture
def gathered(road, tmp_path):
    """Twelve images of each class in two shards, each pixel a number of its image's own, weights unlike."""
    description = read_json(road.files["description"])
    place = torch.randperm(10 * IPC, generator=torch.Generator().manual_seed(0))
    own, index = place // IPC, place % IPC
    stored = place.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    paths = []
    for half in (slice(None, 50), slice(50, None)):
        tensors = {"images": stored[half], "labels": own[half], "index": index[half]}
        tensors["weights"] = 1.0 + index[half].double()
        header = make_header("recover_images", {"dataset": "digits"}, {}, "", [description["header"]])
        paths.append(str(tmp_path / f"{len(paths)}.safetensors"))
        write_tensors(paths[-1], tensors, header)
    road.files["shards"] = paths
    output = {n.split(".")[0]: str(tmp_path / n) for n in OUTPUT[gather_images]}
    return road.make(gather_images, {}, output, method="wmdd", ipc=str(IPC))


def test_a_set_is_sorted_by_class_and_number_with_its_weights_and_pngs(gathered):
    from torchvision.datasets import ImageFolder

    tensors, _ = read_tensors(gathered["images"])
    assert tensors["images"][:, 0, 0, 0].tolist() == list(range(10 * IPC))
    assert tensors["labels"].tolist() == np.repeat(np.arange(10), IPC).tolist()
    torch.testing.assert_close(tensors["weights"].view(10, IPC)[3], torch.arange(1.0, 13) / 78)
    exported = [np.asarray(image)[0, 0, 0] for image, _ in ImageFolder(gathered["png"])]
    assert exported == list(range(10 * IPC))


@pytest.mark.parametrize("shards", [[0], [0, 0, 1]])
def test_shards_that_lack_an_image_or_hold_one_twice_are_refused(road, gathered, tmp_path, shards):
    paths = road.files["shards"]
    output = {n.split(".")[0]: str(tmp_path / "other" / n) for n in OUTPUT[gather_images]}
    try:
        road.files["shards"] = [paths[n] for n in shards]
        with pytest.raises(UserError, match="the shards of wmdd do not hold 12 images of each class"):
            road.make(gather_images, {}, output, method="wmdd", ipc=str(IPC))
    finally:
        road.files["shards"] = paths


def test_students_differ_by_seed_weigh_images_and_are_tested_on_the_test_set(
    road, gathered, tmp_path, monkeypatch
):
    views = {"seed": 4, "crop_scale_min": 0.5, "flip": False, "cutmix": True}
    recipe = {
        **{"labels": "online", "temperature": 7, "epochs": 1, "batch_size": 50},
        **{"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.5},
    }
    student = {"architecture": "convnet", "width": 4, "depth": 2}
    settings = {"recipe": recipe, "views": views, "student": student}
    monkeypatch.setattr(road, "files", {**road.files, "images": gathered["images"]})
    seen = []
    fit = evaluate_student.fit
    monkeypatch.setattr(evaluate_student, "fit", lambda *a, **k: (seen.append((*a, k)), fit(*a, **k))[1])
    record_seeds(monkeypatch, evaluate_student, seeds := [])
    contexts, batches = [], evaluate_student.soft_label_batches

    def soft_label_batches(*given, **named):
        contexts.append(named["precision"])
        return batches(*given, **named)

    monkeypatch.setattr(evaluate_student, "soft_label_batches", soft_label_batches)
    accuracy = evaluate_student.accuracy

    def tested(*given, **named):
        contexts.append(named["precision"])
        return accuracy(*given, **named)

    monkeypatch.setattr(evaluate_student, "accuracy", tested)

    def evaluate(seed, **more):
        output = {"evaluation": str(tmp_path / "evaluation.json")}
        place = {"method": "wmdd", "ipc": str(IPC), "recipe": "r", "student": "s", "seed": seed}
        road.make(evaluate_student, {**settings, "recipe": {**recipe, **more}}, output, **place)
        return read_json(output["evaluation"])

    first, second, alike = evaluate("0"), evaluate("1"), evaluate("0", weighted=False)
    assert first["count"] == read_json(road.files["description"])["test"]["count"]
    assert len({e["train_loss"] for e in (first, second, alike)}) == 3
    assert seeds == [derive_seed(4, "digits", "student", seed) for seed in "010"]
    assert [len(batch[0]) for batch in seen[0][2](0)] == [50, 50, 20]
    logits = torch.randn(2, 5, 10)
    assert seen[0][3](*logits, torch.ones(5)) == soft_label_loss(7)(*logits, torch.ones(5))
    weights = torch.cat([batch[-1] for batch in seen[0][2](0)])
    torch.testing.assert_close(weights.sort().values[-10:], torch.full((10,), 12 * 12 / 78))
    assert seen[0][1].decay_matrices_only
    settings["precision"] = "bfloat16"
    evaluate("0")
    assert [isinstance(call[-1]["precision"], torch.autocast) for call in seen] == [False] * 3 + [True]
    # Online labels and the test compute as training does.
    assert [isinstance(context, torch.autocast) for context in contexts] == [False] * 6 + [True] * 2
    assert all(isinstance(call[-1]["progress"], Progress) for call in seen)
    del road.files["teacher"]
    assert evaluate("0", labels="hard")["labels"] == "hard"


def test_labelling_is_given_mode_batch_precision_and_progress(road, gathered, tmp_path, monkeypatch):
    given = []

    def label_views(teacher, images, views, mean, std, labels, **named):
        labels[:] = 0
        given.append({**named, "views": views, "shape": labels.shape})

    monkeypatch.setattr(relabel_images, "label_views", label_views)
    monkeypatch.setattr(road, "files", {**road.files, "images": gathered["images"]})
    output = {n.split(".")[0]: str(tmp_path / n) for n in OUTPUT[relabel_images]}
    views = {"seed": 4, "crop_scale_min": 0.5, "flip": False, "cutmix": True}
    settings = {
        "views": views,
        "epochs": 3,
        "teacher_mode": "batch",
        "batch_size": 7,
        "precision": "bfloat16",
    }
    road.make(relabel_images, settings, output, method="wmdd", ipc=str(IPC), recipe="r")
    (one,) = given
    assert (one["teacher_mode"], one["batch_size"], one["shape"]) == ("batch", 7, (3, 10 * IPC, 10))
    assert one["views"] == relabeling.ViewSettings(**views)
    assert isinstance(one["precision"], torch.autocast) and isinstance(one["progress"], Progress)


def test_labels_of_other_views_than_are_drawn_here_are_refused(road, gathered, tmp_path, monkeypatch):
    views = {"seed": 0, "crop_scale_min": 0.5, "flip": False, "cutmix": True}
    output = {n.split(".")[0]: str(tmp_path / n) for n in OUTPUT[relabel_images]}
    place = {"method": "wmdd", "ipc": str(IPC), "recipe": "r"}
    needed = {n: road.files[n] for n in ("description", "teacher", "test")} | {"images": gathered["images"]}
    monkeypatch.setattr(road, "files", needed)
    road.make(relabel_images, {"views": views, "epochs": 1, "teacher_mode": "eval"}, output, **place)
    del road.files["teacher"]
    road.files |= {"labels": output["labels"], "labels_header": output["header"]}
    recipe = {"labels": "soft", "temperature": 7, "epochs": 1, "batch_size": 50, "optimizer": "adamw"}
    recipe |= {"learning_rate": 1e-3, "weight_decay": 0.5}
    student = {"architecture": "convnet", "width": 4, "depth": 2}
    settings = {"recipe": recipe, "views": views, "student": student}
    evaluation = {"evaluation": str(tmp_path / "evaluation.json")}

    def evaluate():
        road.make(evaluate_student, settings, evaluation, **place, student="s", seed="0")

    def change(field, image, by):
        labelled = json.loads(Path(output["header"]).read_text())
        labelled["views"][field][image] = (np.array(labelled["views"][field][image]) + by).tolist()
        Path(output["header"]).write_text(json.dumps(labelled))

    evaluate()
    change("box", 3, [0, 1, 0, -1])  # a processor that rounds otherwise
    evaluate()
    change("partner", 0, 1)
    with pytest.raises(UserError, match=r"header.json: these labels are of other views .* \(partner\)"):
        evaluate()
    change("partner", 0, -1)
    generator = torch_generator("of another PyTorch")
    monkeypatch.setattr(relabeling, "torch_generator", lambda *_: generator)
    with pytest.raises(UserError, match=r"header.json: these labels are of other views .* \(box\)"):
        evaluate()


def test_students_on_all_real_images_differ_by_seed_and_are_tested_on_the_test_set(road, tmp_path):
    recipe = {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.1, "batch_size": 100, "crop_scale_min": 0.5}
    settings = {"recipe": recipe, "flip": False, "seed": 0}
    settings["student"] = {"architecture": "convnet", "width": 4, "depth": 2}
    output, found = {"evaluation": str(tmp_path / "evaluation.json")}, []
    for seed in "01":
        road.make(evaluate_all_real, settings, output, method="all_real", student="s", seed=seed)
        found.append(read_json(output["evaluation"]))
    assert found[0]["count"] == read_json(road.files["description"])["test"]["count"]
    assert found[0]["train_loss"] != found[1]["train_loss"]


def test_an_imported_set_is_known_by_its_pixels_and_weights(road, tmp_path):
    """Its lineage, which everything made of it carries, tells one version from another."""
    generator = np.random.default_rng(0)
    arrays = {
        "images": generator.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8),
        "labels": np.arange(20) // 2,
    }
    arrays["weights"] = np.tile([1.0, 3.0], 10)
    lineages, file = [], tmp_path / "theirs.npz"
    for change in (None, "images", "weights"):
        if change:
            arrays[change][7] += 1
        np.savez(file, **arrays)
        output = {"shard": str(tmp_path / "shard.safetensors")}
        road.make(import_images, {"external": str(file)}, output, method="theirs", ipc="2", shard="0")
        tensors, header = read_tensors(output["shard"])
        lineages.append(header["lineage"]["import_images"])
        assert tensors["index"].tolist() == [0, 1] * 10
        assert tensors["weights"][:2].tolist() == [0.25, 0.75]
    assert len(set(lineages)) == 3
