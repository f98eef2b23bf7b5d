"""What only a GPU can show: a CPU's results but for rounding, and equal bits each time, replayed or not."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_core import augmentation, graphs, recovery, relabeling, training
from wmdd_core.baselines import DcSettings, DmSettings, distil_dc, distil_dm, noise_images
from wmdd_core.batchnorm import (
    StatisticsAccumulator,
    _FrozenBatchNorm,
    group_moments,
    image_moments,
    record_input_moments,
)
from wmdd_core.device import compute_reproducibly, precision
from wmdd_core.features import extract_features
from wmdd_core.models import build_model, freeze
from wmdd_core.recovery import RecoverySettings, Shard, recover_images
from wmdd_core.relabeling import (
    ViewSettings,
    hard_label_batches,
    label_views,
    mixed_label_loss,
    soft_label_batches,
)
from wmdd_core.seeding import torch_generator
from wmdd_core.training import FileCrops, Schedule, file_batches, fit, hard_label_loss, real_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CLASSES, RESOLUTION, IPC = 4, 32, 3
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
SET = torch.randint(0, 256, (11, 3, 32, 32), generator=torch_generator("set"), dtype=torch.uint8)
VIEWS = ViewSettings(seed=0, crop_scale_min=0.3, flip=True, cutmix=True)


@pytest.fixture(autouse=True, scope="module")
def reproducible():
    compute_reproducibly()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def eager(monkeypatch):
    """A switch: from now on nothing is replayed."""

    def switch():
        for module in (augmentation, recovery, relabeling, training):
            monkeypatch.setattr(module, "replayed", lambda work, _device: work)

    return switch


def network(architecture: str = "resnet18", resolution: int = RESOLUTION) -> nn.Module:
    """A frozen network whose BatchNorm has seen a batch."""
    model = build_model(architecture, CLASSES, resolution, seed=1)
    for layer in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        layer.momentum = None
    with torch.no_grad():
        model(torch.randn(16, 3, resolution, resolution, generator=torch_generator("batch")))
    return freeze(model)


def shard_of(model: nn.Module, resolution: int = RESOLUTION) -> Shard:
    images = torch.randn(5 * CLASSES, 3, resolution, resolution, generator=torch_generator("real"))
    labels = torch.arange(5 * CLASSES) % CLASSES
    accumulator = StatisticsAccumulator(CLASSES)
    with torch.no_grad(), record_input_moments(model) as moments:
        features = model.features(images)
        accumulator.add(moments, labels)
    group = torch.arange(CLASSES).repeat_interleave(IPC)
    return Shard(
        torch.arange(CLASSES),
        group,
        torch.arange(IPC).repeat(CLASSES),
        torch.rand(CLASSES * IPC, generator=torch_generator("weights")).double(),
        accumulator.statistics(),
        features[group],
        lambda c, count, generator: features[labels == c],
    )


def recover(device: torch.device, name: str, resolution: int = RESOLUTION, **changes: object):
    model = network(resolution=resolution)
    settings = {"iterations": 12, "learning_rate": 0.05, "lambda_bn": 3.0, "crop_scale_min": 0.5, "roll": 4}
    return recover_images(
        copy.deepcopy(model).to(device),
        shard_of(model, resolution),
        RecoverySettings(**{**settings, **changes}),
        resolution=resolution,
        mean=MEAN,
        std=STD,
        seed_names=(0, "gpu"),
        device=device,
        precision=precision({"precision": name}, device),
    )


SETTINGS = {
    "paper": {},
    "released": {"loss_form": "released", "ce_weight": 1.0},
    "global": {"bn_term": "global"},
    "sre2l": {"feature_term": "cross_entropy", "bn_term": "running", "first_bn_multiplier": 10.0},
    "sets": {"feature_term": "mmd_rbf"},
}


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_replayed_recovery_gives_the_bits_of_one_that_is_not(changes, name, eager):
    replayed, again = recover(GPU, name, **changes), recover(GPU, name, **changes)
    eager()
    wanted = recover(GPU, name, **changes)
    for found in (replayed, again):
        assert torch.equal(found.images, wanted.images)
        assert all(torch.equal(found.losses[n], v) for n, v in wanted.losses.items())
    assert not torch.equal(wanted.losses["bn_loss"][3], wanted.losses["bn_loss"][11])


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 0.003), ("bfloat16", 0.02)])
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("resolution", [RESOLUTION, 80])  # with the large stem and its pooling, too
def test_a_recovery_begins_as_on_a_cpu_and_goes_on_alike(changes, name, tolerance, resolution):
    """Adam's first steps go by a gradient's sign, where rounding decides: later losses are only alike."""
    found, wanted = recover(GPU, name, resolution, **changes), recover(CPU, "float32", resolution, **changes)
    for term, losses in wanted.losses.items():
        own, losses = found.losses[term].sum(1), losses.sum(1)
        assert own[0].item() == pytest.approx(losses[0].item(), rel=tolerance)
        torch.testing.assert_close(own, losses, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_recovery_through_the_large_stem_gives_equal_bits_each_time(name):
    first, second = (recover(GPU, name, 96) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert all(torch.equal(first.losses[n], v) for n, v in second.losses.items())


@pytest.mark.parametrize(
    ("distil", "kind", "more"),
    [(distil_dm, DmSettings, {}), (distil_dc, DcSettings, {"outer_loops": 2, "inner_steps": 2})],
    ids=["dm", "dc"],
)
def test_a_baseline_distils_as_on_a_cpu(distil, kind, more):
    real = torch.randn(CLASSES, 8, 3, RESOLUTION, RESOLUTION, generator=torch_generator("real"))
    start, labels = noise_images(2 * CLASSES, RESOLUTION, (0,)), torch.arange(CLASSES).repeat_interleave(2)

    def build(seed: int) -> nn.Module:
        return build_model("convnet", CLASSES, RESOLUTION, seed=seed, width=16, norm="instance")

    def run(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
            return distil(
                lambda c, count, generator: real[c, torch.randperm(8, generator=generator)[:count]],
                start.to(device),
                labels,
                build,
                kind(iterations=3, real_batch=5, **more),
                (0, "gpu"),
            )

    (images, losses), (wanted, exact) = run(GPU), run(CPU)
    torch.testing.assert_close(losses, exact, rtol=0.01, atol=0)
    assert (images - wanted).norm() < 0.05 * (wanted - start).norm()


def test_moments_of_half_precision_are_summed_in_float32():
    generator = torch_generator("moments")
    x = (3 + 0.5 * torch.randn(4, 6, 50, 40, generator=generator)).bfloat16().double()
    weights = torch.full((1, 4), 0.25)
    with torch.no_grad():
        half = x.to(GPU, torch.bfloat16).contiguous(memory_format=torch.channels_last)
        found = group_moments(image_moments(half), weights.to(GPU))
    wanted = group_moments(image_moments(x), weights.double())
    for value, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double().cpu(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=["float32", "bfloat16"]
)
def test_the_gradients_of_a_frozen_layer_and_of_moments_are_autograds(dtype, tolerance):
    """Those of PyTorch's own functions in float64; a gradient in bfloat16 is rounded twice, by up to 2⁻⁸."""
    generator, shape, eps = torch_generator("frozen"), (4, 6, 9, 7), 1e-5
    x = (2 + torch.randn(shape, generator=generator)).to(dtype)
    mean, scales = torch.randn(6, generator=generator), 0.5 + torch.rand(3, 6, generator=generator)
    statistics = [mean, *scales]  # and the variance, the weight and the bias
    # Pulled times the pixels, the moments have as large a part in the gradient as the layer's output.
    pulls = [
        torch.randn(shape, generator=generator).to(dtype),
        *(9 * 7 * torch.randn(2, 4, 6, generator=generator)),
    ]

    def frozen(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _FrozenBatchNorm.apply(v, *(s.to(GPU) for s in statistics), eps)

    def direct(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        var, mean = torch.var_mean(v, (2, 3), correction=0)
        return F.batch_norm(v, *(s.double() for s in statistics), eps=eps), mean, var

    for first, work in enumerate([frozen, image_moments]):  # the layer and the moments; the moments alone
        ours = x.to(GPU).contiguous(memory_format=torch.channels_last).requires_grad_(True)
        found = work(ours)
        torch.autograd.backward(found, [p.to(GPU) for p in pulls[first:]])
        exact = x.double().requires_grad_(True)
        wanted = direct(exact)[first:]
        torch.autograd.backward(wanted, [p.double() for p in pulls[first:]])
        assert ours.grad.dtype == dtype and ours.grad.is_contiguous(memory_format=torch.channels_last)
        for value, true in zip((*found, ours.grad), (*wanted, exact.grad), strict=True):
            bound = tolerance if value.ndim == 4 else 1e-5  # moments are float32 always
            assert (value.detach().cpu().double() - true).norm() < bound * true.norm()


def test_features_and_statistics_are_those_of_a_cpu():
    model, images = network(), torch.randn(30, 3, 32, 32, generator=torch_generator("images"))
    labels, found = torch.arange(30) % CLASSES, {}
    for device in (CPU, GPU):
        features = np.empty((30, 512), np.float32)
        batches = [(i, images[i : i + 8].to(device), labels[i : i + 8]) for i in range(0, 30, 8)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
            statistics = extract_features(
                copy.deepcopy(model).to(device), lambda _, b=batches: b, features, CLASSES
            ).statistics()
        found[device] = [
            torch.from_numpy(features),
            *(v for s in statistics.values() for v in (s.mean, s.var)),
        ]
    for value, wanted in zip(found[GPU], found[CPU], strict=True):
        assert (value - wanted).norm() < 1e-4 * wanted.norm()


def labels_of(
    device: torch.device, name: str = "float32", cutmix: bool = True, mode: str = "eval"
) -> np.ndarray:
    labels = np.full((7, len(SET), CLASSES), np.nan, np.float16)
    label_views(
        network().to(device),
        SET.to(device),
        replace(VIEWS, cutmix=cutmix),
        MEAN,
        STD,
        labels,
        teacher_mode=mode,
        batch_size=4,
        precision=precision({"precision": name}, device),
    )
    return labels


@pytest.mark.parametrize(
    ("cutmix", "mode", "tolerance"), [(False, "eval", 0.01), (True, "eval", 0.01), (True, "batch", 0.03)]
)
def test_labels_are_those_of_a_cpu_and_replayed_to_the_bit(cutmix, mode, tolerance, eager):
    found, wanted = (labels_of(device, cutmix=cutmix, mode=mode) for device in (GPU, CPU))
    assert np.linalg.norm(np.float32(found) - wanted) < tolerance * np.linalg.norm(np.float32(wanted))
    eager()
    assert np.array_equal(found, labels_of(GPU, cutmix=cutmix, mode=mode))


def test_labels_made_online_are_the_stored_ones_of_the_same_views():
    def shown(labels: np.ndarray | nn.Module) -> list[list[torch.Tensor]]:
        batches = soft_label_batches(SET.to(GPU), torch.ones(11), labels, VIEWS, 4, MEAN, STD, (0,))
        return [[value.clone() for value in batch] for epoch in range(7) for batch in batches(epoch)]

    for stored, online in zip(shown(labels_of(GPU)), shown(network().to(GPU)), strict=True):
        assert torch.equal(stored[0], online[0]) and torch.equal(stored[2], online[2])
        assert (stored[1] - online[1]).norm() < 0.01 * stored[1].norm()


def train(device: torch.device, kind: str, optimizer: str, name: str = "bfloat16"):
    """A student of 11 images in batches of 4, the last of 3, for five epochs: state and curve."""
    images, labels = SET.to(device), (torch.arange(11) % CLASSES).to(device)
    if kind == "real":
        loss = hard_label_loss
        batches = real_batches(images, labels, 4, MEAN, STD, (0,), crop_scale_min=0.3, flip=True)
    else:
        loss = mixed_label_loss
        batches = hard_label_batches(images, torch.ones(11), labels.cpu(), VIEWS, 4, MEAN, STD, (0,))
    model = build_model("resnet18", CLASSES, RESOLUTION, seed=2).to(device)
    curve = fit(
        model,
        Schedule(5, optimizer, 0.01),
        batches,
        loss,
        precision=precision({"precision": name}, device),
    )
    return model.state_dict(), curve


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["real", "distilled"])
def test_training_is_replayed_to_the_bit(kind, optimizer, eager):
    state, curve = train(GPU, kind, optimizer)
    again, same = train(GPU, kind, optimizer)
    eager()
    wanted, told = train(GPU, kind, optimizer)
    assert curve == same == told
    assert all(torch.equal(state[n], v) and torch.equal(again[n], v) for n, v in wanted.items())


@pytest.mark.parametrize("kind", ["real", "distilled"])
def test_training_begins_as_on_a_cpu(kind):
    found, wanted = (train(device, kind, "sgd", "float32")[1] for device in (GPU, CPU))
    assert found.train_loss[0] == pytest.approx(wanted.train_loss[0], rel=0.02)


class Drawn:
    """A source of random images, as `FileCrops` reads one."""

    labels = np.arange(40) % CLASSES

    def __len__(self) -> int:
        return 40

    def image(self, i: int):
        from PIL import Image

        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def test_processes_that_decode_do_not_disturb_a_capture():
    def run(workers: int) -> list[float]:
        crops = FileCrops(Drawn(), RESOLUTION, (0,), 0.3, True)
        batches = file_batches(crops, 8, MEAN, STD, workers=workers, device=GPU)
        model = build_model("convnet", CLASSES, RESOLUTION, seed=2, width=16).to(GPU)
        return fit(model, Schedule(3, "sgd", 0.01), batches, hard_label_loss).train_loss

    assert run(0) == run(3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_on_a_second_gpu_is_captured_there():
    device = torch.device("cuda", 1)
    layer = nn.Linear(8, 8).to(device)
    call = graphs.replayed(lambda x: layer(x).square(), device)
    for step in range(graphs.EAGER_CALLS + 3):
        x = torch.full((4, 8), float(step), device=device)
        assert torch.equal(call(x), layer(x).square())
