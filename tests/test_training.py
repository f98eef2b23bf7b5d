"""Schedules and optimisers by hand, batches that cover the data, bit-identical and resumable training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_core import training
from wmdd_core.augmentation import draw_views, normalise, view_batch
from wmdd_core.errors import UserError
from wmdd_core.models import build_model
from wmdd_core.progress import Progress
from wmdd_core.seeding import torch_generator
from wmdd_core.training import Schedule, accuracy, fit, hard_label_loss, real_batches, test_batches

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
CPU = torch.device("cpu")


class Killed(Exception):
    pass


# ---- schedules and optimisers ------------------------------------------------------------------


def test_the_learning_rate_falls_by_a_cosine():
    schedule = Schedule(4, "sgd", 0.2)
    rates = [schedule.learning_rate_at(e) for e in range(5)]
    half = 0.1 * (1 + math.sqrt(0.5))
    assert rates == pytest.approx([0.2, half, 0.1, 0.2 - half, 0], abs=1e-12)


def test_smoothing_stretches_the_cosine():
    schedule = Schedule(4, "sgd", 0.2, smoothing=2)
    assert schedule.learning_rate_at(4) == pytest.approx(0.1)
    assert schedule.learning_rate_at(2) == pytest.approx(0.1 * (1 + math.sqrt(0.5)))
    assert Schedule(8, "sgd", 0.2).learning_rate_at(3) == schedule.learning_rate_at(3)


def test_a_network_computes_as_asked_and_its_loss_in_float32():
    model, seen = build_model("convnet", 3, 8, seed=0, width=4, depth=1), []
    model.trunk[0].register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    inputs, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])

    def loss(logits, labels):
        seen.append(logits.dtype)
        return hard_label_loss(logits, labels)

    half = torch.autocast("cpu", torch.bfloat16)
    for context in (half, None):
        fit(model, Schedule(1, "sgd", 0.1), lambda _: [(inputs, labels)], loss, precision=context)
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_only_matrices_decay_when_asked():
    model = build_model("convnet", 3, 8, seed=0, width=4, depth=1)
    model.trunk[0].weight.requires_grad_(False)
    groups = (
        Schedule(1, "adamw", 0.1, weight_decay=0.01, decay_matrices_only=True)
        .build_optimizer(model)
        .param_groups
    )
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    told = {n: decay.get(id(p)) for n, p in model.named_parameters()}
    assert told == {
        "trunk.0.weight": None,  # frozen
        "trunk.0.bias": 0,
        "trunk.1.weight": 0,
        "trunk.1.bias": 0,
        "classifier.weight": 0.01,
        "classifier.bias": 0,
    }
    (group,) = Schedule(1, "sgd", 0.1, momentum=0.7, weight_decay=0.01).build_optimizer(model).param_groups
    assert group["weight_decay"] == 0.01 and len(group["params"]) == 5 and group["momentum"] == 0.7
    assert not group["nesterov"]


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_the_optimizer_is_the_one_named(name, kind):
    assert type(Schedule(1, name, 0.1).build_optimizer(nn.Linear(2, 2))).__name__ == kind


def test_an_unknown_optimizer_is_told():
    with pytest.raises(UserError, match="unknown optimizer 'lion'; known are sgd, adam, adamw"):
        Schedule(1, "lion", 0.1).build_optimizer(nn.Linear(1, 1))


def quadratic() -> tuple[nn.Linear, callable, callable]:
    """One weight w, loss ½(w·x − y)², one batch (x, y) = (2, 1) per epoch."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    data = (torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    return model, lambda _epoch: iter([data]), lambda logits, y: (logits - y).square().mean() / 2


def test_sgd_with_momentum_and_decay_by_hand():
    model, batches, loss = quadratic()
    schedule = Schedule(3, "sgd", 0.1, momentum=0.5, weight_decay=0.2)
    curve = fit(model, schedule, batches, loss)
    w, velocity, losses = 3.0, 0.0, []
    for epoch in range(3):
        losses.append((2 * w - 1) ** 2 / 2)
        gradient = 2 * (2 * w - 1) + 0.2 * w
        velocity = gradient if epoch == 0 else 0.5 * velocity + gradient
        w -= schedule.learning_rate_at(epoch) * velocity
    assert float(model.weight.detach()) == pytest.approx(w, rel=1e-6)
    assert curve.train_loss == pytest.approx(losses, rel=1e-6)
    assert [epoch for epoch, _, _ in curve.rows()] == [1, 2, 3]


def test_adamw_decays_apart_from_the_gradient_by_hand():
    model, batches, loss = quadratic()
    fit(model, Schedule(1, "adamw", 0.1, weight_decay=0.2, decay_matrices_only=True), batches, loss)
    # The first step of Adam is lr · sign(gradient); the decay is lr · 0.2 · w.
    assert float(model.weight.detach()) == pytest.approx(3 - 0.1 * 0.2 * 3 - 0.1, rel=1e-5)


def test_the_curves_loss_is_the_mean_over_images_not_batches():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    batches = [(torch.ones(3, 1), torch.ones(3, 1)), (torch.ones(1, 1), 5 * torch.ones(1, 1))]
    curve = fit(
        model, Schedule(1, "sgd", 1e-12), lambda _: iter(batches), lambda a, b: (a - b).square().mean()
    )
    assert curve.train_loss == pytest.approx([(3 * 1 + 25) / 4])


# ---- fit ---------------------------------------------------------------------------------------


def real(count: int, resolution: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (count, 3, resolution, resolution)
    images = torch.randint(0, 256, shape, generator=torch_generator("images"), dtype=torch.uint8)
    return images, torch.arange(count) % 3


def train(
    seed: int = 0,
    epochs: int = 4,
    optimizer: str = "adamw",
    progress=None,
    stop_at: int | None = None,
    **more,
):
    """A small ConvNet on random images; `stop_at` is the epoch in which the job is killed."""
    images, labels = real(22)
    drawn = real_batches(images, labels, 5, MEAN, STD, (seed, "x"), crop_scale_min=0.3, flip=True)

    def batches(epoch: int):
        for number, batch in enumerate(drawn(epoch)):
            if epoch == stop_at and number == 2:
                raise Killed
            yield batch

    model = build_model("convnet", 3, 8, seed=seed, width=4, depth=1)
    schedule = Schedule(epochs, optimizer, 0.01, weight_decay=0.1, decay_matrices_only=True)
    curve = fit(model, schedule, batches, hard_label_loss, progress=progress, **more)
    return model.state_dict(), curve


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_same_seed_gives_the_same_bits_and_a_resumed_run_too(optimizer, tmp_path):
    state, curve = train(optimizer=optimizer, test=lambda: 12.5, test_every=2)
    again, same = train(optimizer=optimizer, test=lambda: 12.5, test_every=2)
    assert all(torch.equal(again[n], v) for n, v in state.items()) and same == curve
    assert curve.top1 == [None, 12.5, None, None]  # the last epoch is left to the caller

    for stop_at in (1, 1, 3):
        progress = Progress("fit", tmp_path / "state.pt", "stamp", save_every=0)
        with pytest.raises(Killed):
            train(optimizer=optimizer, stop_at=stop_at, progress=progress, test=lambda: 12.5, test_every=2)
    progress = Progress("fit", tmp_path / "state.pt", "stamp", save_every=0)
    resumed, told = train(optimizer=optimizer, progress=progress, test=lambda: 12.5, test_every=2)
    assert all(torch.equal(resumed[n], v) for n, v in state.items()) and told == curve


def test_another_seed_gives_another_network():
    assert not torch.equal(train(seed=1)[0]["classifier.weight"], train(seed=0)[0]["classifier.weight"])


def test_training_reduces_the_loss_and_the_global_generator_is_untouched():
    before = torch.random.get_rng_state()
    _, curve = train(epochs=15)
    assert curve.train_loss[-1] < 0.9 * curve.train_loss[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [e for e, _, _ in curve.rows()] == list(range(1, 16))


def test_testing_in_between_changes_nothing():
    images, labels = real(9)

    def tested(model) -> float:
        return accuracy(model, test_batches(images, labels, MEAN, STD, CPU))["top1"]

    def run(test_every: int):
        images, labels = real(22)
        batches = real_batches(images, labels, 5, MEAN, STD, (0,), crop_scale_min=1, flip=False)
        model = build_model("convnet", 3, 8, seed=0, width=4, depth=1)
        schedule = Schedule(3, "sgd", 0.1)
        fit(model, schedule, batches, hard_label_loss, test=lambda: tested(model), test_every=test_every)
        return model.state_dict()

    with_tests, without = run(1), run(0)
    assert all(torch.equal(with_tests[n], v) for n, v in without.items())


def test_a_loss_that_is_not_finite_stops_with_the_epoch():
    model, batches, _ = quadratic()
    calls = []

    def loss(logits, y):
        calls.append(1)
        return (logits - y).square().mean() * (float("nan") if len(calls) == 3 else 1)

    with pytest.raises(UserError, match="training loss is nan in epoch 3; lower the learning rate"):
        fit(model, Schedule(5, "sgd", 0.1), batches, loss)


# ---- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 5), (12, 12), (12, 50), (11, 5), (1, 5)])
def test_each_epoch_covers_each_image_once(count, size):
    """But for a last batch of one, in which BatchNorm has no variance; the next epoch drops another image."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 4, 4).contiguous()
    labels = torch.arange(count) + 100
    one, zero = torch.ones(3), torch.zeros(3)
    batches = real_batches(images, labels, size, zero, one, (0,), crop_scale_min=1, flip=False)
    orders = []
    for epoch in range(3):
        seen = list(batches(epoch))
        sizes = [len(x) for x, _ in seen]
        assert all(s == size for s in sizes[:-1]) and sizes[-1] <= size
        shown = torch.cat([x[:, 0, 0, 0] * 255 for x, _ in seen]).round().long()
        assert torch.equal(shown + 100, torch.cat([y for _, y in seen]))  # labels go with their images
        dropped = 1 if count % size == 1 and count > 1 else 0
        assert len(shown) == len(set(shown.tolist())) == count - dropped
        assert 1 not in sizes or count == 1
        orders.append(shown.tolist())
    assert count < 3 or orders[0] != orders[1] != orders[2]


def test_views_are_drawn_anew_in_each_epoch_and_replayable():
    images, labels = real(6)
    batches = real_batches(images, labels, 6, MEAN, STD, (0, "a"), crop_scale_min=0.2, flip=True)
    (first,), (again,), (later,) = list(batches(0)), list(batches(0)), list(batches(1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0].sort(0).values, later[0].sort(0).values)  # not only another order
    other = real_batches(images, labels, 6, MEAN, STD, (1, "a"), crop_scale_min=0.2, flip=True)
    assert not torch.equal(next(other(0))[0], first[0])
    generator = torch_generator(0, "a", "epoch", 0)
    order = torch.randperm(6, generator=generator)
    views = draw_views(6, 8, generator, crop_scale_min=0.2, flip=True)
    assert torch.equal(first[0], view_batch(images, views, order, MEAN, STD))


# ---- testing -----------------------------------------------------------------------------------


class Table(nn.Module):
    """A network by hand: image i, whose pixels are all i, gets row i of `logits`."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def constant_images(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 2, 2)


@pytest.mark.parametrize("size", [1, 3, 500])
def test_top_1_and_top_5_of_a_network_by_hand(size, monkeypatch):
    monkeypatch.setattr(training, "images_per_pass", lambda _: size)
    # Image i ranks class k at place (k − i) mod 7: label i is first, i + 4 fifth, i + 5 sixth.
    rank = (torch.arange(7)[None, :] - torch.arange(7)[:, None]) % 7
    labels = torch.tensor([0, 1, 3, 7, 9, 10, 11]) % 7
    places = [int(rank[i, y]) for i, y in enumerate(labels)]
    model = Table(-rank.float()).train()
    batches = test_batches(constant_images(7), labels, torch.zeros(3), torch.ones(3), CPU)
    found = accuracy(model, batches)
    assert found["top1"] == pytest.approx(100 * sum(p == 0 for p in places) / 7)
    assert found["top5"] == pytest.approx(100 * sum(p < 5 for p in places) / 7)
    assert 0 < found["top1"] < found["top5"] < 100 and found["count"] == 7
    assert model.training  # as it was


def test_top_5_of_fewer_than_five_classes_is_everything():
    batches = test_batches(constant_images(3), torch.tensor([0, 1, 0]), torch.zeros(3), torch.ones(3), CPU)
    found = accuracy(Table(torch.eye(3)).eval(), batches)
    assert found == {"top1": pytest.approx(200 / 3), "top5": 100, "count": 3}


def test_test_batches_are_all_images_in_order_and_normalised():
    """A pass at a time: 500 images of 64 pixels held more memory in a ResNet than training on 100 does."""
    images, labels = real(150)
    batches = list(test_batches(images, labels, MEAN, STD, CPU))
    assert [len(x) for x, _ in batches] == [64, 64, 22]
    assert torch.equal(torch.cat([x for x, _ in batches]), normalise(images, MEAN, STD))
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_accuracy_leaves_batchnorm_alone():
    model = build_model("convnet", 3, 8, seed=0, width=4, depth=1).train()
    before = copy.deepcopy(model.state_dict())
    images, labels = real(6)
    accuracy(model, test_batches(images, labels, MEAN, STD, CPU))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and model.training


def test_hard_label_loss_is_the_mean_negative_log_probability():
    logits = torch.randn(4, 3, generator=torch_generator("logits"))
    labels = torch.tensor([0, 2, 1, 1])
    wanted = -F.softmax(logits.double(), 1)[range(4), labels].log().mean()
    torch.testing.assert_close(hard_label_loss(logits, labels).double(), wanted, rtol=1e-6, atol=0)
