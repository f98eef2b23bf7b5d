"""One pass over the real images: every row of the features, exact statistics, and resuming in the middle."""

import numpy as np
import pytest
import torch

from wmdd_core.errors import UserError
from wmdd_core.features import extract_features
from wmdd_core.models import build_model, freeze
from wmdd_core.progress import Progress
from wmdd_core.seeding import torch_generator

COUNT, CLASSES, RESOLUTION = 23, 3, 8
IMAGES = torch.randn(COUNT, 3, RESOLUTION, RESOLUTION, generator=torch_generator("real"))
LABELS = torch.tensor([0] * 4 + [1] * 12 + [2] * 7)


@pytest.fixture(scope="module")
def model():
    return freeze(build_model("convnet", CLASSES, RESOLUTION, seed=0, width=6, depth=2))


class Killed(Exception):
    pass


def batches(size: int, stop_at: int = COUNT):
    """As the library asks for them; `stop_at` is the image at which the job is killed."""

    def from_image(start: int):
        for position in range(start, COUNT, size):
            if position >= stop_at:
                raise Killed
            rows = slice(position, min(position + size, COUNT))
            yield position, IMAGES[rows], LABELS[rows]

    return from_image


def filled(dimension: int) -> np.ndarray:
    return np.full((COUNT, dimension), np.nan, dtype=np.float32)


@pytest.mark.parametrize("size", [1, 7, 22, 23, 100])
def test_features_are_the_models_for_each_image_in_batches_of_any_size(model, size):
    features = filled(model.classifier.in_features)
    extract_features(model, batches(size), features, CLASSES)
    with torch.no_grad():
        wanted = torch.cat([model.features(image[None]) for image in IMAGES]).numpy()
    np.testing.assert_allclose(features, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 23])
def test_statistics_are_those_of_all_images_of_each_class(model, size):
    found = extract_features(model, batches(size), filled(model.classifier.in_features), CLASSES)
    assert found.counts.tolist() == [4, 12, 7]
    inputs = {"trunk.1": model.trunk[0](IMAGES)}  # the first BatchNorm sees the first convolution's output
    for name, x in inputs.items():
        layer = found.statistics()[name]
        for c in range(CLASSES):
            pixels = x[c == LABELS].double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(layer.mean[c], pixels.mean(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.var[c], pixels.var(1, correction=0), rtol=1e-5, atol=1e-6)
        pixels = x.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.global_var, pixels.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_no_observers_and_no_change_of_the_model_are_left(model):
    before = {n: v.clone() for n, v in model.state_dict().items()}

    def observed() -> bool:  # as `record_input_moments` does it, on a layer of its own
        return any("forward" in vars(m) for m in model.modules())

    extract_features(model, batches(5), filled(model.classifier.in_features), CLASSES)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not observed()
    with pytest.raises(Killed):
        extract_features(model, batches(5, stop_at=10), filled(model.classifier.in_features), CLASSES)
    assert not observed()


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((COUNT + 1, 96), np.float32, f"there were {COUNT} images for {COUNT + 1} rows"),
        ((COUNT, 96), np.int32, "give floating point"),
        ((COUNT,), np.float32, "give floating point"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(model, shape, dtype, told):
    shape = (shape[0], model.classifier.in_features)[: len(shape)]
    with pytest.raises(UserError, match=told):
        extract_features(model, batches(5), np.zeros(shape, dtype), CLASSES)


def memory_map(path, dimension: int, mode: str) -> np.memmap:
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=(COUNT, dimension))


def test_a_resumed_pass_ends_bit_identical(model, tmp_path):
    dimension = model.classifier.in_features
    whole = memory_map(tmp_path / "whole.npy", dimension, "w+")
    wanted = extract_features(model, batches(4), whole, CLASSES).statistics()
    whole.flush()

    path = tmp_path / "parts.npy"
    for stop_at in (8, 9, 16, COUNT):  # killed twice in the same place, then once more
        parts = memory_map(path, dimension, "r+" if path.exists() else "w+")
        progress = Progress("features", tmp_path / "state.pt", "stamp", save_every=0)
        try:
            found = extract_features(
                model, batches(4, stop_at), parts, CLASSES, progress=progress
            ).statistics()
        except Killed:
            found = None
        del parts
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    for name, layer in wanted.items():
        for part, value in vars(layer).items():
            assert torch.equal(getattr(found[name], part), value)


def test_a_pass_that_was_complete_when_it_was_killed_has_its_statistics(model, tmp_path):
    """Killed between the last batch and the writing of the outputs."""
    features = filled(model.classifier.in_features)
    wanted = extract_features(model, batches(4), features, CLASSES)
    progress = Progress("features", tmp_path / "state.pt", "stamp", save_every=0)
    extract_features(model, batches(4), features, CLASSES, progress=progress)
    again = Progress("features", tmp_path / "state.pt", "stamp", save_every=0)
    found = extract_features(model, batches(4), features.copy(), CLASSES, progress=again)
    assert torch.equal(found.counts, wanted.counts)
    assert all(torch.equal(found.sums[n], s) for n, s in wanted.sums.items())


def test_progress_reaches_the_total(model, capsys):
    progress = Progress("features", report_every=0)
    extract_features(model, batches(10), filled(model.classifier.in_features), CLASSES, progress=progress)
    lines = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["features: 1/3", "images 10"],
        ["features: 2/3", "images 20"],
        ["features: 3/3", "images 23"],
    ]
