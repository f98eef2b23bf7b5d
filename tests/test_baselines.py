"""DM and DC against steps written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_core import baselines as b
from wmdd_core import progress as progress_module
from wmdd_core.errors import UserError
from wmdd_core.models import build_model
from wmdd_core.progress import Progress
from wmdd_core.seeding import derive_seed, torch_generator

SIDE = 8
LABELS = torch.tensor([0, 0, 2, 2, 2])
PER_CLASS = {0: 6, 2: 40}
SEED = (0, "test")


def draw_images(*names: object, count: int, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch_generator("images", *names), dtype=torch.float64)


REAL = {label: draw_images("real", label, count=count) for label, count in PER_CLASS.items()}
INITIAL = draw_images("initial", count=len(LABELS))


def real_images(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return REAL[label][torch.randperm(len(REAL[label]), generator=generator)[:count]]


class Dense(nn.Module):
    """Linear features, or with a hidden smooth layer, and a linear classifier."""

    def __init__(self, seed: int, dimension: int = 5, classes: int = 3, smooth: bool = False) -> None:
        super().__init__()
        generator = torch_generator("dense", seed)
        self.trunk = nn.Linear(3 * SIDE * SIDE, dimension)
        self.classifier = nn.Linear(dimension, classes)
        self.smooth = smooth
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10

    def features(self, images: torch.Tensor) -> torch.Tensor:
        linear = self.trunk(images.flatten(1))
        return torch.tanh(linear) if self.smooth else linear

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


def convnet(seed: int) -> nn.Module:
    return build_model("convnet", 3, SIDE, seed=seed, width=6, depth=2, norm="instance")


def run_dm(progress=None, *, initial=INITIAL, real=real_images, network=convnet, seed=SEED, **settings):
    settings = b.DmSettings(**{"iterations": 4, "real_batch": 5, **settings})
    return b.distil_dm(real, initial, LABELS, network, settings, seed, progress)


def run_dc(progress=None, *, initial=INITIAL, real=real_images, network=convnet, seed=SEED, **settings):
    settings = b.DcSettings(
        **{"iterations": 3, "outer_loops": 2, "inner_steps": 2, "real_batch": 5, **settings}
    )
    return b.distil_dc(real, initial, LABELS, network, settings, seed, progress)


BOTH = pytest.mark.parametrize("run", [run_dm, run_dc])


# Augmentation

NAMES = ["colour", "crop", "cutout", "flip", "scale", "rotate"]


def test_the_published_augmentations_are_there():
    assert list(b.AUGMENTATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_augmentation_is_the_same_for_every_image_of_every_batch(name):
    real, distilled = draw_images("a", count=4), draw_images("b", count=2)
    for seed in range(4):
        augmentation = b.draw_augmentation([name], torch_generator("draw", seed))
        together = b.augment(torch.cat([real, distilled]), augmentation)
        apart = torch.cat([b.augment(real, augmentation), b.augment(distilled, augmentation)])
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
        assert augmentation == b.draw_augmentation([name], torch_generator("draw", seed))


@pytest.mark.parametrize("name", NAMES)
def test_an_augmentation_changes_images_and_is_differentiable(name):
    images = draw_images("a", count=1, side=4)
    draws = [b.draw_augmentation([name], torch_generator("draw", seed)) for seed in range(8)]
    changed = [draw for draw in draws if not torch.equal(b.augment(images, draw), images)]
    assert changed
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: b.augment(x, changed[0]), images)


def test_no_augmentation_is_the_identity():
    augmentation = b.draw_augmentation([], torch_generator("draw"))
    assert augmentation.name is None
    assert b.augment(INITIAL, augmentation) is INITIAL


def test_each_draw_picks_one_of_the_augmentations():
    generator = torch_generator("draws")
    drawn = [b.draw_augmentation(["crop", "rotate"], generator).name for _ in range(400)]
    assert set(drawn) == {"crop", "rotate"}
    assert 150 < drawn.count("crop") < 250


def test_an_unknown_augmentation_is_told():
    with pytest.raises(UserError, match="'color'.*known are colour"):
        b.draw_augmentation(["crop", "color"], torch_generator("draw"))


def test_colour_by_hand():
    images = draw_images("a", count=2)
    (u, v, w) = (0.9, 0.25, 0.1)
    brightened = images.numpy() + (u - 0.5)
    grey = brightened.mean(1, keepdims=True)
    saturated = grey + 2 * v * (brightened - grey)
    level = saturated.mean((1, 2, 3), keepdims=True)
    expected = level + (0.5 + w) * (saturated - level)
    actual = b.augment(images, b.Augmentation("colour", (u, v, w)))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    torch.testing.assert_close(b.augment(images, b.Augmentation("colour", (0.5, 0.5, 0.5))), images)


def test_crop_shifts_by_up_to_an_eighth_and_zeros_move_in():
    images = draw_images("a", count=2, side=16)
    down = b.augment(images, b.Augmentation("crop", (0.0, 0.5, 0.0)))
    assert torch.equal(down[..., 2:, :], images[..., :-2, :])
    assert torch.equal(down[..., :2, :], torch.zeros_like(down[..., :2, :]))
    left = b.augment(images, b.Augmentation("crop", (0.5, 0.999, 0.0)))
    assert torch.equal(left[..., :-2], images[..., 2:])
    assert torch.equal(b.augment(images, b.Augmentation("crop", (0.5, 0.5, 0.0))), images)


def test_cutout_clears_a_square_of_half_the_side():
    images = torch.ones(1, 3, 8, 8)
    centred = b.augment(images, b.Augmentation("cutout", (0.5, 0.5, 0.0)))
    expected = torch.ones(8, 8)
    expected[2:6, 2:6] = 0
    assert torch.equal(centred[0], expected.expand(3, 8, 8))
    corner = b.augment(images, b.Augmentation("cutout", (0.0, 0.999, 0.0)))
    assert (corner[0, 0] == 0).nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]


def test_flip_mirrors_half_of_the_time():
    assert torch.equal(b.augment(INITIAL, b.Augmentation("flip", (0.49, 0, 0))), INITIAL.flip(3))
    assert torch.equal(b.augment(INITIAL, b.Augmentation("flip", (0.51, 0, 0))), INITIAL)


def test_warps_by_known_maps():
    quarter_turn = b._warp(INITIAL, [[0, -1, 0], [1, 0, 0]])
    torch.testing.assert_close(quarter_turn, INITIAL.rot90(1, (2, 3)))
    torch.testing.assert_close(b.augment(INITIAL, b.Augmentation("rotate", (0.5, 0, 0))), INITIAL)
    # The neutral scale 1 lies at (1 − 1/1.2) / (1.2 − 1/1.2) of its range.
    neutral = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    torch.testing.assert_close(b.augment(INITIAL, b.Augmentation("scale", (neutral, neutral, 0))), INITIAL)
    # A bilinear sample of a linear ramp is the ramp at the mapped coordinate.
    ramp = torch.linspace(-1 + 1 / 16, 1 - 1 / 16, 16).double().expand(1, 3, 16, 16)
    enlarged = b.augment(ramp, b.Augmentation("scale", (0.0, neutral, 0)))
    torch.testing.assert_close(enlarged, ramp / 1.2)


def test_rotation_has_fifteen_degrees_scale_an_axis_each_and_zeros_come_in():
    for draw, degrees in ((0.0, -15), (1.0, 15)):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        wanted = b._warp(INITIAL, [[c, -s, 0], [s, c, 0]])
        torch.testing.assert_close(b.augment(INITIAL, b.Augmentation("rotate", (draw, 0, 0))), wanted)
    neutral = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)
    ramp = torch.linspace(-15 / 16, 15 / 16, 16).double().expand(1, 3, 16, 16)
    for x, wanted in ((ramp, ramp), (ramp.mT, ramp.mT / 1.2)):
        torch.testing.assert_close(b.augment(x, b.Augmentation("scale", (neutral, 0.0, 0))), wanted)
    shrunk = b.augment(torch.ones(1, 3, 16, 16), b.Augmentation("scale", (1.0, neutral, 0)))
    assert (shrunk[..., 0] == 0).all() and (shrunk[..., 8] == 1).any()


# DM


def test_two_dm_steps_with_momentum_by_hand():
    # With linear features A x the gradient in x̃_j is −2/n Aᵀ A (mean real − mean distilled).
    rate, momentum = 0.3, 0.7  # not the default
    images, losses = run_dm(
        network=lambda seed: Dense(0), augmentation=[], learning_rate=rate, momentum=momentum, iterations=2,
        real_batch=1000,
    )  # fmt: skip
    weight = Dense(0).trunk.weight.detach().double()
    expected, velocity, expected_losses = INITIAL.flatten(1).clone(), 0, []
    for _ in range(2):
        gradient, loss = torch.zeros_like(expected), 0.0
        for label in (0, 2):
            member = LABELS.eq(label)
            gap = REAL[label].flatten(1).mean(0) - expected[member].mean(0)
            gradient[member] = -2 / int(member.sum()) * (weight.T @ weight @ gap)
            loss += (weight @ gap).square().sum().item()
        velocity = momentum * velocity + gradient
        expected = expected - rate * velocity
        expected_losses.append(loss)
    torch.testing.assert_close(images.flatten(1), expected)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    assert losses[1] < losses[0]


def test_dm_gives_real_and_distilled_images_the_same_augmentation():
    images, losses = run_dm(real=lambda label, count, generator: INITIAL[LABELS.eq(label)], iterations=30)
    assert losses.max() < 1e-20
    torch.testing.assert_close(images, INITIAL)


def test_dm_builds_a_new_network_in_training_mode_at_each_iteration():
    built = []

    def network(seed: int) -> nn.Module:
        built.append((seed, convnet(seed).eval()))
        return built[-1][1]

    run_dm(network=network)
    assert [seed for seed, _ in built] == [derive_seed(*SEED, "network", i) for i in range(4)]
    assert all(network.training for _, network in built)
    assert all(p.grad is None for _, network in built for p in network.parameters())


# DC


def test_gradient_distance_of_two_layers_by_hand():
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    second = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, -1.0]])
    bias = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    real, distilled = zip(first, bias, second, strict=True)
    # Rows: 1 − 24/25, then orthogonal 1, then opposite 2; the bias does not count.
    assert b.gradient_distance(real, distilled, epsilon=0).item() == pytest.approx(1 / 25 + 1 + 2)
    assert b.gradient_distance(real, real, epsilon=0).item() == pytest.approx(0, abs=1e-6)
    # The published epsilon beside a product of norms of 1e-6 halves the cosine.
    tiny = [torch.tensor([[1e-3, 0.0]])]
    assert b.gradient_distance(tiny, tiny).item() == pytest.approx(0.5, rel=1e-3)


def test_gradient_distance_flattens_a_filter_to_a_row():
    a, c = (torch.randn(4, 3, 2, 2, generator=torch_generator(name)).double() for name in "ac")
    expected = sum(
        1 - np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))
        for x, y in zip(a.numpy().reshape(4, 12), c.numpy().reshape(4, 12), strict=True)
    )
    assert b.gradient_distance([a], [c], epsilon=0).item() == pytest.approx(expected, rel=1e-12)


def written_out_gradients(network: Dense, images: torch.Tensor, label: int) -> list[np.ndarray]:
    """Cross-entropy gradients of both weights of a two-layer tanh network, without autograd."""
    x = images.flatten(1).numpy()
    inner, bias_in, outer, bias_out = (p.detach().double().numpy() for p in network.parameters())
    hidden = np.tanh(x @ inner.T + bias_in)
    logits = hidden @ outer.T + bias_out
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error[:, label] -= 1
    error /= len(x)
    back = (error @ outer) * (1 - hidden**2)
    return [back.T @ x, error.T @ hidden]


def written_out_distance(network: Dense, real: torch.Tensor, distilled: torch.Tensor, label: int) -> float:
    total = 0.0
    for g, h in zip(*(written_out_gradients(network, x, label) for x in (real, distilled)), strict=True):
        cosine = (g * h).sum(1) / (np.linalg.norm(g, axis=1) * np.linalg.norm(h, axis=1) + 1e-6)
        total += (1 - cosine).sum()
    return total


def test_a_dc_step_against_gradients_and_differences_written_out():
    rate, network = 0.1, Dense(1, smooth=True).double()
    images, losses = run_dc(
        network=lambda seed: Dense(1, smooth=True), iterations=1, outer_loops=1, learning_rate=rate,
        real_batch=1000,
    )  # fmt: skip
    expected = sum(
        written_out_distance(network, REAL[label], INITIAL[LABELS.eq(label)], label) for label in (0, 2)
    )
    assert losses.tolist() == pytest.approx([expected], rel=1e-9)
    step = 1e-5
    for pixel in ((0, 0, 0), (1, 3, 5), (2, 7, 7)):
        moved = []
        for sign in (1, -1):
            distilled = INITIAL[LABELS.eq(2)].clone()
            distilled[(1, *pixel)] += sign * step
            moved.append(written_out_distance(network, REAL[2], distilled, 2))
        slope = (moved[0] - moved[1]) / (2 * step)
        assert (INITIAL - images)[(3, *pixel)].item() == pytest.approx(rate * slope, rel=1e-5, abs=1e-9)


def test_dc_trains_the_network_between_image_steps_only():
    for outer_loops, steps in ((1, 0), (2, 3), (3, 6)):
        trained = Dense(1, smooth=True).double()
        run_dc(
            network=lambda seed, n=trained: n, iterations=1, outer_loops=outer_loops, inner_steps=3,
            learning_rate=0.0, network_learning_rate=0.2,
        )  # fmt: skip
        expected = Dense(1, smooth=True).double()
        for _ in range(steps):
            loss = F.cross_entropy(expected(INITIAL), LABELS)
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                    parameter -= 0.2 * gradient
        torch.testing.assert_close(trained.state_dict(), expected.state_dict())


def test_dc_trains_the_network_in_batches_that_cover_every_image(monkeypatch):
    monkeypatch.setattr(b, "NETWORK_BATCH", 2)
    seen = []

    class Watched(Dense):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach())
            return super().forward(images)

    run_dc(network=Watched, iterations=1, inner_steps=1, learning_rate=0.0)
    # Two loops of two classes, each a real and a distilled batch; one pass after the first loop.
    training = seen[4:-4]
    assert [len(batch) for batch in training] == [2, 2, 1]
    order = torch.randperm(len(INITIAL), generator=torch_generator(*SEED, 0, 0, "train network", 0))
    assert torch.equal(torch.cat(training), INITIAL[order])

    seen.clear()
    run_dc(network=Watched, iterations=1, inner_steps=1, learning_rate=0.0, augmentation=["colour"])
    assert not any((image == INITIAL).flatten(1).all(1).any() for image in torch.cat(seen[4:-4]))


def test_dc_averages_its_loss_over_the_outer_loops():
    frozen = {"iterations": 1, "learning_rate": 0.0, "network_learning_rate": 0.0, "real_batch": 1000}
    once, thrice = run_dc(outer_loops=1, **frozen)[1], run_dc(outer_loops=3, **frozen)[1]
    torch.testing.assert_close(once, thrice)


def test_the_published_loops():
    assert b.DC_LOOPS == {1: (1, 1), 10: (10, 50), 50: (50, 10)}


# Both


@BOTH
def test_losses_and_images_have_their_shapes(run):
    images, losses = run()
    assert images.shape == INITIAL.shape
    assert not images.requires_grad
    assert not torch.equal(images, INITIAL)
    assert losses.shape == ((4,) if run is run_dm else (3,))
    assert losses.isfinite().all() and (losses > 0).all()


@BOTH
def test_the_initial_images_are_left_alone(run):
    initial = INITIAL.clone()
    run(initial=initial)
    assert torch.equal(initial, INITIAL)


@BOTH
def test_a_class_with_fewer_images_than_the_batch_uses_what_there_is(run):
    counts = {}

    def real(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        batch = real_images(label, count, generator)
        counts[label] = (count, len(batch))
        return batch

    _, losses = run(real=real, real_batch=16)
    assert counts == {0: (16, 6), 2: (16, 16)}
    assert losses.isfinite().all()


@BOTH
def test_an_interrupted_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module.signal, "signal", lambda *_: None)
    path = tmp_path / "checkpoint"
    whole = run(iterations=5)

    class Interrupted(Exception):
        pass

    class Stopping(Progress):
        def step(self, index, *arguments):
            super().step(index, *arguments)
            if index == 2:
                raise Interrupted

    with pytest.raises(Interrupted):
        run(Stopping("test", path, "stamp", save_every=0.0), iterations=5)
    built = []

    def network(seed: int) -> nn.Module:
        built.append(seed)
        return convnet(seed)

    images, losses = run(Progress("test", path, "stamp", save_every=1e9), iterations=5, network=network)
    assert built == [derive_seed(*SEED, "network", i) for i in (3, 4)]
    assert torch.equal(images, whole[0])
    assert torch.equal(losses, whole[1])


@BOTH
def test_progress_sees_every_iteration_and_its_loss(run):
    class Recorder:
        steps: list[tuple[int, int]] = []
        figures: list[float] = []
        states: list[dict] = []

        def resume(self):
            return None

        def step(self, index, total, state, figures):
            self.steps.append((index, total))
            self.figures.append(figures()["loss"])
            self.states.append(state())

    recorder = Recorder()
    recorder.steps, recorder.figures, recorder.states = [], [], []
    _, losses = run(recorder, iterations=3)
    assert recorder.steps == [(0, 3), (1, 3), (2, 3)]
    assert recorder.figures == losses.tolist()
    for index, state in enumerate(recorder.states):
        assert torch.equal(state["losses"], losses[: index + 1])
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not torch.equal(recorder.states[0]["images"], recorder.states[1]["images"])


@BOTH
def test_results_depend_on_the_seed_names_alone(run):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run()[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(run()[0], first)
    assert not torch.equal(run(seed=(1, "test"))[0], first)


@BOTH
def test_every_class_and_step_draws_anew(run, monkeypatch):
    seeds, strategies = [], []
    draw = b.draw_augmentation

    def real(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return real_images(label, count, generator)

    def recorded(names, generator):
        strategies.append(generator.initial_seed())
        return draw(names, generator)

    monkeypatch.setattr(b, "draw_augmentation", recorded)
    run(real=real, iterations=3, **({"inner_steps": 0} if run is run_dc else {}))
    places = [(i, loop) for i in range(3) for loop in range(2)] if run is run_dc else [(i,) for i in range(3)]
    for purpose, found in (("real images", seeds), ("augmentation", strategies)):
        assert found == [derive_seed(*SEED, *place, purpose, label) for place in places for label in (0, 2)]
    assert len({*seeds, *strategies}) == 4 * len(places)


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_method_and_iteration(run, bad):
    calls = []

    def real(label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        calls.append(label)
        per_iteration = 2 if run is run_dm else 4
        return real_images(label, count, generator) * (bad if len(calls) > per_iteration * 2 else 1)

    method = "dm" if run is run_dm else "dc"
    with pytest.raises(UserError, match=f"{method}: the loss is nan at iteration 3; lower learning_rate"):
        run(real=real, iterations=4)


@BOTH
def test_a_loss_that_is_not_finite_does_not_run_on_for_long(run, monkeypatch):
    monkeypatch.setattr(b, "CHECK_EVERY", 2)
    calls = []

    def network(seed: int) -> nn.Module:
        calls.append(seed)
        return Dense(seed)

    with pytest.raises(UserError, match="iteration 1;"):
        run(real=lambda *_: REAL[0] * math.nan, network=network, iterations=100)
    assert len(calls) == 2


@BOTH
def test_unfitting_images_are_told(run):
    with pytest.raises(UserError, match=r"received real images \(0, 3, 8, 8\) of class 0"):
        run(real=lambda *_: REAL[0][:0])
    with pytest.raises(UserError, match="received real images"):
        run(real=lambda *_: REAL[0][..., :4])
    with pytest.raises(UserError, match="one label for each image"):
        run(initial=INITIAL[:3])


def test_noise_images_are_standard_normal_and_seeded():
    noise = b.noise_images(20, 16, SEED)
    assert noise.shape == (20, 3, 16, 16)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(noise, b.noise_images(20, 16, SEED))
    assert not torch.equal(noise, b.noise_images(20, 16, (1,)))
