"""Recovery against the equations written out in float64, and what a class's images may depend on."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wmdd_core import recovery
from wmdd_core.augmentation import Views, apply_views, draw_views
from wmdd_core.batchnorm import LayerStatistics, batchnorm_layers
from wmdd_core.device import precision
from wmdd_core.discrepancies import mmd_linear, mmd_rbf, random_directions, sliced_wasserstein
from wmdd_core.errors import UserError
from wmdd_core.models import build_model, freeze
from wmdd_core.progress import Progress
from wmdd_core.recovery import (
    CHECK_EVERY,
    SET_TERMS,
    VIEW_BLOCK,
    Objective,
    RecoverySettings,
    Shard,
    ShardViews,
    initial_noise,
    recover_images,
)
from wmdd_core.seeding import derive_seed, torch_generator

CLASSES, RESOLUTION, IPC = 5, 8, 3
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
CPU = torch.device("cpu")
SEED = (0, "digits")


class Killed(Exception):
    pass


def small_teacher() -> nn.Module:
    """A ConvNet of two blocks whose running statistics are not those of its inputs."""
    model = build_model("convnet", CLASSES, RESOLUTION, seed=1, width=5, depth=2)
    generator = torch_generator("teacher")
    for layer in batchnorm_layers(model).values():
        nn.init.uniform_(layer.running_mean, -0.5, 0.5, generator=generator)
        nn.init.uniform_(layer.running_var, 0.5, 1.5, generator=generator)
        nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
        nn.init.uniform_(layer.bias, -0.5, 0.5, generator=generator)
    return freeze(model)


TEACHER = small_teacher()
DIMENSION = TEACHER.classifier.in_features


def statistics_of() -> dict[str, LayerStatistics]:
    generator = torch_generator("statistics")

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    return {
        name: LayerStatistics(draw(CLASSES, 5) - 0.5, draw(CLASSES, 5), draw(5) - 0.5, draw(5))
        for name in batchnorm_layers(TEACHER)
    }


def real_images(c: int, count: int = 20) -> torch.Tensor:
    """Normalised images in a class's own colours."""
    generator = torch_generator("real images", c)
    colours = torch.rand(3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, RESOLUTION, RESOLUTION, generator=generator)
    return ((colours + noise) / 2 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


STATISTICS = statistics_of()
FEATURES = torch.stack([TEACHER.features(real_images(c)) for c in range(CLASSES)])
ATOMS = FEATURES[:, :IPC].double()
WEIGHTS = torch.tensor([[0.5, 0.3, 0.2]]).repeat(CLASSES, 1).double()
WEIGHTS[1] = torch.tensor([0.1, 0.1, 0.8])


def shard_of(classes: list[int], numbers: list[int] = (0, 1, 2), **changes: object) -> Shard:
    """Images `numbers` of each of `classes`, as a job would put them together."""
    group = torch.arange(len(classes)).repeat_interleave(len(numbers))
    index = torch.tensor(numbers).repeat(len(classes))
    weights = WEIGHTS[classes][:, list(numbers)]
    shard = Shard(
        classes=torch.tensor(classes),
        group=group,
        index=index,
        weights=(weights / weights.sum(1, keepdim=True)).flatten(),
        statistics=STATISTICS,
        atoms=ATOMS[classes][:, list(numbers)].flatten(0, 1),
        real_features=real_features,
    )
    return replace(shard, **changes)


def real_features(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return FEATURES[c][torch.randperm(20, generator=generator)[:count]]


def settings_of(**changes: object) -> RecoverySettings:
    plain = {"iterations": 12, "learning_rate": 0.1, "lambda_bn": 3.0, "crop_scale_min": 0.5, "roll": 2}
    return RecoverySettings(**{**plain, **changes})


def recover(shard: Shard, settings: RecoverySettings, seed: tuple = SEED, **more: object):
    return recover_images(
        TEACHER,
        shard,
        settings,
        resolution=RESOLUTION,
        mean=MEAN,
        std=STD,
        seed_names=seed,
        device=CPU,
        **more,
    )


def viewed_images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=torch_generator("viewed"))


# ---- the equations, written out ----------------------------------------------------------------


def forward(images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Features, inputs of the BatchNorm layers and logits of float64 images, layer by layer."""
    x, inputs = images, {}
    for number, layer in enumerate(TEACHER.trunk):
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight.double(), layer.bias.double(), padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            inputs[f"trunk.{number}"] = x
            scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
            x = (x - layer.running_mean.double()[:, None, None]) * scale[:, None, None]
            x = x + layer.bias.double()[:, None, None]
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        elif isinstance(layer, nn.AvgPool2d):
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    features = x.flatten(1)
    return (
        features,
        inputs,
        features @ TEACHER.classifier.weight.double().T + TEACHER.classifier.bias.double(),
    )


def weighted_moments(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel over all pixels, where the pixels of image j share the weight w_j."""
    count, channels = x.shape[:2]
    share = (weights[:, None] / x[0, 0].numel()).expand(count, x[0, 0].numel()).flatten()
    pixels = x.transpose(0, 1).reshape(channels, -1)
    mean = pixels @ share
    return mean, (pixels - mean[:, None]).square() @ share


def written_out(
    images: torch.Tensor, shard: Shard, s: RecoverySettings
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The unscaled terms of each class and the total, from the formulas, in float64."""
    features, inputs, logits = forward(images)
    rows = [torch.nonzero(shard.group == g)[:, 0] for g in range(len(shard.classes))]
    paper, terms, total = s.loss_form == "paper", {}, 0

    if s.feature_term == "barycenter":
        distances = [sum(((features[j] - shard.atoms[j]) ** 2).sum() for j in r) for r in rows]
        terms["feature_loss"] = torch.stack(distances)
        frobenius = torch.linalg.matrix_norm(features - shard.atoms)
        total = total + (terms["feature_loss"].sum() if paper else frobenius)

    weight = 1 if s.feature_term == "cross_entropy" else s.ce_weight
    if weight:
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        ce = [-sum(log_p[j, c] for j in r) for r, c in zip(rows, shard.classes, strict=True)]
        terms["ce_loss"] = torch.stack(ce)
        total = total + weight * terms["ce_loss"].sum() / (1 if paper else len(images))

    if s.bn_term != "none":
        per_class = []
        for r, c in zip(rows, shard.classes.tolist(), strict=True):
            loss = 0
            for number, (name, x) in enumerate(inputs.items()):
                wanted = STATISTICS[name]
                if s.bn_term in ("global", "running"):
                    mean, var = weighted_moments(x, torch.full((len(x),), 1 / len(x), dtype=torch.float64))
                    layer = TEACHER.get_submodule(name)
                    asked = {
                        "global": (wanted.global_mean, wanted.global_var),
                        "running": (layer.running_mean, layer.running_var),
                    }[s.bn_term]
                    gaps = (mean - asked[0], var - asked[1])
                else:
                    mean, var = weighted_moments(x[r], shard.weights[r])
                    gaps = (mean - wanted.mean[c], var - wanted.var[c])
                parts = [(gap**2).sum() if paper else (gap**2).sum().sqrt() for gap in gaps]
                loss = loss + (s.first_bn_multiplier if number == 0 else 1) * sum(parts)
            per_class.append(loss)
        # A term of all images is the same for all; in the paper's sum over classes it counts once for each.
        terms["bn_loss"] = torch.stack(per_class if s.bn_term == "per_class" else per_class[:1])
        total = total + s.lambda_bn * (sum(per_class) if paper else sum(per_class) / len(per_class))
    return terms, total


FORMS = [
    {"feature_term": feature, "bn_term": bn, "loss_form": form, **more}
    for form in ("paper", "released")
    for feature, bn, more in [
        ("barycenter", "per_class", {}),
        ("barycenter", "global", {}),
        ("barycenter", "none", {}),
        ("cross_entropy", "per_class", {}),
        ("cross_entropy", "global", {"first_bn_multiplier": 10.0}),
        ("cross_entropy", "running", {"first_bn_multiplier": 10.0, "ce_weight": 0.7}),
        ("none", "per_class", {"lambda_bn": 0.25}),
        ("barycenter", "per_class", {"ce_weight": 0.7, "first_bn_multiplier": 4.0}),
    ]
]


def described(form: dict) -> str:
    return "-".join(map(str, form.values()))


@pytest.mark.parametrize("form", FORMS, ids=described)
def test_terms_and_total_are_the_written_out_formulas(form):
    settings, shard = settings_of(**form), shard_of([3, 1])
    images = viewed_images(6)
    terms, total = Objective(TEACHER, shard, settings, SEED, CPU)(images, 0)
    wanted, wanted_total = written_out(images.double(), shard, settings)
    assert terms.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(terms[name].double(), values, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), wanted_total, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=described)
def test_the_gradient_is_that_of_the_formulas_by_finite_differences(form):
    settings, shard = settings_of(**form), shard_of([3, 1])
    images = viewed_images(6).requires_grad_(True)
    Objective(TEACHER, shard, settings, SEED, CPU)(images, 0)[1].backward()
    step, exact = 1e-6, images.detach().double()
    for place in [(0, 0, 0, 0), (2, 1, 4, 7), (3, 2, 3, 3), (5, 0, 7, 5)]:
        sides = []
        for sign in (1, -1):
            moved = exact.clone()
            moved[place] += sign * step
            sides.append(written_out(moved, shard, settings)[1])
        slope = float(sides[0] - sides[1]) / (2 * step)
        assert float(images.grad[place]) == pytest.approx(
            slope, rel=1e-3, abs=2e-5 * float(images.grad.abs().max())
        )


def test_sre2l_is_its_published_loss():
    """Cross-entropy + r Σ_l m_l (‖Δvar‖₂ + ‖Δmean‖₂) over the batch, m = 10 on the first layer; Δ to the
    teacher's running averages, so that no statistics of real images are needed."""
    settings = settings_of(
        feature_term="cross_entropy",
        bn_term="running",
        loss_form="released",
        lambda_bn=0.01,
        first_bn_multiplier=10,
    )
    shard, images = shard_of([0, 1, 2, 3, 4], [1], statistics={}), viewed_images(5)
    _, total = Objective(TEACHER, shard, settings, SEED, CPU)(images, 0)
    _, inputs, logits = forward(images.double())
    wanted = F.cross_entropy(logits, torch.arange(5))
    for (name, x), multiplier in zip(inputs.items(), (10, 1), strict=True):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        layer = TEACHER.get_submodule(name)
        gap = (var - layer.running_var).norm() + (mean - layer.running_mean).norm()
        wanted = wanted + 0.01 * multiplier * gap
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "form",
    [
        *FORMS,
        *({"feature_term": term, "loss_form": form} for term in SET_TERMS for form in ("paper", "released")),
    ],
    ids=described,
)
def test_the_loss_of_a_shard_is_the_sum_over_its_batches(form):
    settings, images = settings_of(**form), viewed_images(6)
    whole = shard_of([3, 1])
    terms, total = Objective(TEACHER, replace(whole, batch=whole.index), settings, SEED, CPU)(images, 0)
    alone = [
        Objective(TEACHER, shard_of([3, 1], [number]), settings, SEED, CPU)(images[whole.index == number], 0)
        for number in range(IPC)
    ]
    torch.testing.assert_close(total, sum(t for _, t in alone), rtol=1e-5, atol=1e-6)
    for name, values in terms.items():
        torch.testing.assert_close(values, sum(t[name] for t, _ in alone), rtol=1e-5, atol=1e-6)


def test_batches_of_a_shard_are_recovered_as_if_alone():
    settings = settings_of(
        feature_term="cross_entropy", bn_term="global", loss_form="released", crop_scale_start=1.0
    )
    whole = shard_of([0, 2, 4])
    together = recover(replace(whole, batch=whole.index), settings)
    for number in range(IPC):
        alone = recover(shard_of([0, 2, 4], [number]), settings)
        torch.testing.assert_close(together.images[number::IPC], alone.images, rtol=0, atol=2e-3)


def test_lambda_scales_the_batchnorm_term_and_nothing_else():
    shard, images = shard_of([3, 1]), viewed_images(6)

    def total(lambda_bn: float, form: str, bn_term: str = "per_class") -> tuple[float, dict]:
        settings = settings_of(lambda_bn=lambda_bn, loss_form=form, bn_term=bn_term)
        terms, total = Objective(TEACHER, shard, settings, SEED, CPU)(images, 0)
        return float(total), {n: v.tolist() for n, v in terms.items()}

    for form in ("paper", "released"):
        for bn_term in ("per_class", "global"):
            (zero, terms), (one, same), (ten, _) = (total(x, form, bn_term) for x in (0, 1, 10))
            assert terms == same  # terms are unscaled
            assert ten - zero == pytest.approx(10 * (one - zero), rel=1e-4)


def test_exact_match_has_no_loss_and_a_finite_gradient():
    """Images that are their own target: norms have no derivative at zero."""
    images = viewed_images(6)
    features, inputs, _ = forward(images.double())
    shard = shard_of([3, 1], atoms=features)
    statistics = {}
    for name, x in inputs.items():
        mean, var = torch.zeros(CLASSES, 5).double(), torch.zeros(CLASSES, 5).double()
        for g, c in enumerate((3, 1)):
            rows = shard.group == g
            mean[c], var[c] = weighted_moments(x[rows], shard.weights[rows])
        statistics[name] = LayerStatistics(mean, var, mean[0], var[0])
    shard = replace(shard, statistics=statistics)
    for form in ("paper", "released"):
        images = images.detach().requires_grad_(True)
        terms, total = Objective(TEACHER, shard, settings_of(loss_form=form), SEED, CPU)(images, 0)
        total.backward()
        assert float(total.detach()) < 1e-4 and all(bool((v.detach() < 1e-4).all()) for v in terms.values())
        assert images.grad.isfinite().all()


@pytest.mark.parametrize("term", SET_TERMS)
def test_set_terms_are_the_discrepancies_of_each_class_times_its_images(term):
    settings, shard, images = (
        settings_of(feature_term=term, real_batch=10, directions=7),
        shard_of([3, 1]),
        viewed_images(6),
    )
    terms, _ = Objective(TEACHER, shard, settings, SEED, CPU)(images, 7)
    features = TEACHER.features(images)

    def squared_distance(own: torch.Tensor, real: torch.Tensor) -> float:
        return float(torch.pdist(torch.cat([own, real])).square().mean())

    for g, c in enumerate((3, 1)):
        generator = torch_generator(*SEED, "real features", c, 7)
        own, real = features[shard.group == g], real_features(c, 10, generator)
        wanted = {
            "mmd_linear": lambda own, real: mmd_linear(own, real),
            "mmd_rbf": lambda own, real: squared_distance(own, real) * mmd_rbf(own, real),
            "sliced_wasserstein": lambda own, real, g=generator: (
                DIMENSION * sliced_wasserstein(own, real, directions=random_directions(DIMENSION, 7, g))
            ),
        }[term](own, real)
        torch.testing.assert_close(terms["feature_loss"][g], 3 * wanted)


def test_losses_are_computed_in_full_precision_under_autocast(monkeypatch):
    """bfloat16 is for the network; in it, the statistics of a layer lose all but two digits."""
    gaps = {"group_moments": [], "apply_views": []}

    def checked(name: str):
        function = getattr(recovery, name)

        def call(first, second):
            found = function(first, second)
            doubled = tuple(m.double() for m in first) if isinstance(first, tuple) else first.double()
            with torch.autocast("cpu", enabled=False):
                exact = function(doubled, second.double() if isinstance(second, torch.Tensor) else second)
            pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
            with torch.no_grad():
                gaps[name] += [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
            return found

        monkeypatch.setattr(recovery, name, call)

    for name in gaps:
        checked(name)
    settings = settings_of(iterations=2, loss_form="released", ce_weight=1.0)
    found = recover(shard_of([3, 1]), settings, precision=torch.autocast("cpu", torch.bfloat16))
    assert max(gaps["group_moments"]) < 1e-5
    assert max(gaps["apply_views"]) < 1e-5
    assert found.images.dtype == torch.float32 and all(
        v.dtype == torch.float32 for v in found.losses.values()
    )


# ---- the loop ----------------------------------------------------------------------------------


def test_the_steps_are_adams_on_the_viewed_images_by_hand():
    """Views, β = (0.5, 0.9), bias correction, the cosine, and the projection to valid pixels."""
    shard, settings = shard_of([3, 1]), settings_of(iterations=3, learning_rate=0.3)
    low, high = (-MEAN / STD).view(3, 1, 1), ((1 - MEAN) / STD).view(3, 1, 1)
    views = ShardViews(shard, settings, RESOLUTION, SEED)
    images = initial_noise(shard, RESOLUTION, SEED)
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    for step in range(3):
        images.requires_grad_(True)
        _, total = Objective(TEACHER, shard, settings, SEED, CPU)(apply_views(images, views.at(step)), step)
        (gradient,) = torch.autograd.grad(total, images)
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        rate = 0.15 * (1 + math.cos(math.pi * step / 3))
        move = (first / (1 - 0.5 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        images = (images.detach() - rate * move).maximum(low).minimum(high)
    torch.testing.assert_close(recover(shard, settings).images, images, rtol=1e-4, atol=1e-4)


def test_the_learning_rate_falls_by_a_cosine_per_step():
    settings = settings_of(iterations=8, learning_rate=0.2)
    rates = [settings.learning_rate_at(t) for t in (0, 2, 4, 8)]
    assert rates == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0], abs=1e-12)


STILL = {"crop_scale_min": 1.0, "flip": False, "roll": 0}
"""No views, so that a loss has no reason but the images to change."""


def test_recovery_approaches_its_target():
    """The features of real images can be reached."""
    losses = recover(shard_of([0, 1]), settings_of(iterations=60, bn_term="none", **STILL)).losses
    assert losses["feature_loss"].shape == (60, 2)
    assert (losses["feature_loss"][-1] < 0.3 * losses["feature_loss"][0]).all()


def test_both_terms_fall_together():
    losses = recover(shard_of([0, 1, 2]), settings_of(iterations=40, lambda_bn=1.0, **STILL)).losses
    assert losses["bn_loss"].shape == (40, 3)
    for values in losses.values():
        assert (values[-1] < 0.9 * values[0]).all()


@pytest.mark.parametrize("term", ["cross_entropy", *SET_TERMS])
def test_each_feature_term_falls(term):
    settings = settings_of(iterations=40, feature_term=term, bn_term="none", real_batch=20, **STILL)
    losses = recover(shard_of([0, 1]), settings).losses
    assert losses.keys() == {"ce_loss" if term == "cross_entropy" else "feature_loss"}
    (values,) = losses.values()
    assert values[-5:].mean() < 0.95 * values[:5].mean()


def test_pixels_stay_in_the_valid_range():
    found = recover(shard_of([0, 1]), settings_of(iterations=5, learning_rate=2.0)).images
    pixels = found * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert (pixels < 1e-6).any() and (pixels > 1 - 1e-6).any()  # the bounds were reached


def test_images_may_start_from_given_ones_which_stay_as_they_are():
    shard = shard_of([0, 1])
    low, high = (-MEAN / STD).view(3, 1, 1), ((1 - MEAN) / STD).view(3, 1, 1)
    initial = viewed_images(6).maximum(low).minimum(high)
    before = initial.clone()
    found = recover(shard, settings_of(iterations=2, learning_rate=1e-4), initial=initial)
    assert torch.equal(initial, before) and not initial.requires_grad
    assert 0 < (found.images - before).abs().max() < 3e-4
    assert not found.images.requires_grad


def test_the_teacher_is_left_as_it_was():
    before = copy.deepcopy(TEACHER.state_dict())
    recover(shard_of([0]), settings_of(iterations=2))
    assert all(torch.equal(v, before[n]) for n, v in TEACHER.state_dict().items())
    # As `record_input_moments` sets it on a layer; hooks are not what it observes with.
    assert not any("forward" in vars(m) for m in TEACHER.modules()) and not TEACHER.training
    assert all(p.grad is None for p in TEACHER.parameters())


# ---- seeds and shards --------------------------------------------------------------------------


@pytest.mark.parametrize("loss_form", ["paper", "released"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(loss_form):
    settings, shard = settings_of(loss_form=loss_form), shard_of([0, 2])
    state = torch.random.get_rng_state()
    first, again = recover(shard, settings), recover(shard, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.images, again.images)
    assert all(torch.equal(first.losses[n], v) for n, v in again.losses.items())
    for seed in ((1, "digits"), (0, "cifar10")):
        assert not torch.equal(recover(shard, settings, seed).images, first.images)


@pytest.mark.parametrize("feature_term", ["barycenter", "cross_entropy", "sliced_wasserstein"])
def test_a_class_does_not_depend_on_which_classes_share_its_shard(feature_term):
    settings = settings_of(feature_term=feature_term)
    whole = recover(shard_of([0, 1, 2, 3, 4]), settings)
    for classes in ([0, 3], [4, 2], [1]):
        part = recover(shard_of(classes), settings)
        wanted = torch.cat([whole.images[3 * c : 3 * c + 3] for c in classes])
        torch.testing.assert_close(part.images, wanted, rtol=0, atol=2e-3)
        for name, values in part.losses.items():
            torch.testing.assert_close(values, whole.losses[name][:, classes], rtol=1e-3, atol=1e-4)


def test_one_image_of_each_class_at_a_time_does_not_depend_on_the_others():
    """SRe2L's layout. Without BatchNorm terms an image is alone, so the layout must change nothing at all."""
    settings = settings_of(feature_term="cross_entropy", bn_term="none")
    whole = recover(shard_of([0, 1, 2, 3, 4]), settings).images.view(CLASSES, IPC, 3, RESOLUTION, RESOLUTION)
    for number in range(IPC):
        layer = recover(shard_of([0, 1, 2, 3, 4], [number]), settings).images
        torch.testing.assert_close(layer, whole[:, number], rtol=0, atol=2e-3)


def test_global_statistics_couple_the_classes_of_a_batch():
    """Which is why the layout is part of the method: the test above can tell."""
    settings = settings_of(
        feature_term="cross_entropy", bn_term="global", loss_form="released", lambda_bn=1.0
    )
    together = recover(shard_of([0, 1], [0]), settings)
    assert together.losses["bn_loss"].shape == (12, 1) and together.losses["ce_loss"].shape == (12, 2)
    assert (together.images[:1] - recover(shard_of([0], [0]), settings).images).abs().max() > 0.01


def test_noise_is_that_of_class_and_number():
    whole = initial_noise(shard_of([0, 1, 2]), RESOLUTION, SEED)
    assert torch.equal(initial_noise(shard_of([2, 0]), RESOLUTION, SEED), whole[[6, 7, 8, 0, 1, 2]])
    assert torch.equal(initial_noise(shard_of([1], [2, 0]), RESOLUTION, SEED), whole[[5, 3]])
    assert len({image.sum().item() for image in whole}) == 9
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    assert not torch.equal(initial_noise(shard_of([0]), RESOLUTION, (1, "digits")), whole[:3])


def fields_of(views: Views, rows: torch.Tensor) -> list[list]:
    return [getattr(views, name)[rows].tolist() for name in ("box", "flip", "roll")]


def test_views_are_shared_in_a_class_and_by_its_shards_and_differ_otherwise():
    settings = settings_of()
    shard = shard_of([0, 1, 2])
    whole = ShardViews(shard, settings, 64, SEED)
    part = ShardViews(shard_of([2], [1]), settings, 64, SEED)
    seen = []
    for step in (0, 1, 499, 500, 501, 3):  # across the blocks in which views are drawn, and back
        views = whole.at(step)
        for g in range(3):
            first, *others = (fields_of(views, torch.tensor([row])) for row in range(3 * g, 3 * g + 3))
            assert all(other == first for other in others)
            seen.append(str(first))
        assert fields_of(part.at(step), torch.tensor([0])) == fields_of(views, torch.tensor([6]))
    assert len(set(seen)) == len(seen)
    assert VIEW_BLOCK == 500  # part of what a seed means: changing it changes every result


def test_views_keep_what_the_settings_allow():
    shard = shard_of([0, 1])
    plain = ShardViews(shard, settings_of(crop_scale_min=1.0, flip=False, roll=0), RESOLUTION, SEED)
    x = viewed_images(6)
    torch.testing.assert_close(apply_views(x, plain.at(3)), x)
    views = ShardViews(shard, settings_of(roll=3), RESOLUTION, SEED)
    rolls = torch.stack([views.at(step).roll[0] for step in range(200)])
    assert rolls.min() == -3 and rolls.max() == 3
    boxes = torch.stack([views.at(step).box[0] for step in range(200)])
    assert (boxes[:, 2] * boxes[:, 3] / RESOLUTION**2).min() > 0.35  # 0.5, but for rounding to pixels


# ---- the curriculum ----------------------------------------------------------------------------


def test_cdas_curriculum_is_its_formula():
    settings = settings_of(iterations=1000, crop_scale_min=0.08, crop_scale_start=1.0)
    steps = torch.tensor([0, 1, 250, 500, 999, 1000])
    wanted = [0.08 + 0.92 * (1 + math.cos(math.pi * t / 1000)) / 2 for t in steps.tolist()]
    assert settings.crop_scale_at(steps).tolist() == pytest.approx(wanted, abs=1e-6)
    assert settings_of(crop_scale_min=0.3).crop_scale_at(steps).tolist() == pytest.approx([0.3] * 6)


def test_the_curriculum_reaches_the_views():
    settings = settings_of(iterations=VIEW_BLOCK, crop_scale_min=0.08, crop_scale_start=1.0)
    views = ShardViews(shard_of([0, 1, 2, 3, 4]), settings, 32, SEED)
    areas = torch.stack(
        [views.at(t).box[::3, 2] * views.at(t).box[::3, 3] / 32**2 for t in range(VIEW_BLOCK)]
    )
    scale = settings.crop_scale_at(torch.arange(VIEW_BLOCK))
    assert (areas[:20] > 0.9).all()
    assert (areas >= scale[:, None] * 0.85 - 0.01).all()  # rounding to pixels
    assert areas[-50:].min() < 0.25 and areas[-50:].mean() == pytest.approx(0.5, abs=0.1)


def test_the_curriculum_goes_on_in_the_next_block():
    settings = settings_of(iterations=2 * VIEW_BLOCK, crop_scale_min=0.08, crop_scale_start=1.0)
    views = ShardViews(shard_of([0, 1, 2, 3, 4]), settings, 32, SEED)
    late = [views.at(t).box for t in range(2 * VIEW_BLOCK - 50, 2 * VIEW_BLOCK)]
    areas = torch.stack([box[:, 2] * box[:, 3] / 32**2 for box in late])
    assert areas.min() < 0.25  # the bound is 0.08 here; begun anew it would be 0.54


def test_without_curriculum_the_scale_is_constant():
    scales = settings_of(crop_scale_min=0.5)
    generator = torch_generator(*SEED, "recovery views", 0, 0)
    wanted = draw_views(VIEW_BLOCK, RESOLUTION, generator, crop_scale_min=0.5, flip=True, roll=2)
    views = ShardViews(shard_of([0]), scales, RESOLUTION, SEED)
    for step in (0, 17, 499):
        assert fields_of(views.at(step), torch.tensor([0])) == fields_of(wanted, torch.tensor([step]))


# ---- resuming ----------------------------------------------------------------------------------


class Interrupted(Progress):
    """Saves after each step, and kills the job after one of them."""

    def __init__(self, path, stop_after: int) -> None:
        super().__init__("recover", path, "stamp", save_every=0)
        self.stop_after = stop_after

    def step(self, index, *arguments):
        super().step(index, *arguments)
        if index == self.stop_after:
            raise Killed


@pytest.mark.parametrize("loss_form", ["paper", "released"])
def test_a_resumed_recovery_ends_bit_identical(tmp_path, loss_form, monkeypatch):
    monkeypatch.setattr(recovery, "CHECK_EVERY", 5)
    settings = settings_of(iterations=13, loss_form=loss_form, ce_weight=0.5)
    shard = shard_of([0, 2])
    wanted = recover(shard, settings)
    for stop_after in (0, 2, 4, 11):  # at and between the checks of the losses
        with pytest.raises(Killed):
            recover(shard, settings, progress=Interrupted(tmp_path / "state.pt", stop_after))
    found = recover(shard, settings, progress=Interrupted(tmp_path / "state.pt", -1))
    assert torch.equal(found.images, wanted.images)
    assert found.losses.keys() == wanted.losses.keys()
    assert all(torch.equal(found.losses[n], v) for n, v in wanted.losses.items())


def test_a_recovery_that_was_complete_when_it_was_killed_is_taken_over(tmp_path):
    settings, shard = settings_of(iterations=4), shard_of([0])
    with pytest.raises(Killed):
        recover(shard, settings, progress=Interrupted(tmp_path / "state.pt", 3))
    found, wanted = (
        recover(shard, settings, progress=Interrupted(tmp_path / "state.pt", -1)),
        recover(shard, settings),
    )
    assert torch.equal(found.images, wanted.images) and torch.equal(
        found.losses["bn_loss"], wanted.losses["bn_loss"]
    )


def test_resuming_from_given_images_goes_on_from_the_state(tmp_path):
    settings, shard, initial = settings_of(iterations=6), shard_of([0]), 0.1 * viewed_images(3)
    wanted = recover(shard, settings, initial=initial.clone())
    with pytest.raises(Killed):
        recover(shard, settings, initial=initial.clone(), progress=Interrupted(tmp_path / "state.pt", 2))
    found = recover(shard, settings, initial=initial.clone(), progress=Interrupted(tmp_path / "state.pt", -1))
    assert torch.equal(found.images, wanted.images)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: losses of a resumed run live on two devices"
)
def test_a_recovery_resumes_on_a_gpu(tmp_path):
    teacher = copy.deepcopy(TEACHER).cuda()

    def on_gpu(progress):
        return recover_images(
            teacher,
            shard_of([0, 2]),
            settings_of(),
            resolution=RESOLUTION,
            mean=MEAN,
            std=STD,
            seed_names=SEED,
            device=torch.device("cuda"),
            progress=progress,
        )

    with pytest.raises(Killed):
        on_gpu(Interrupted(tmp_path / "state.pt", 5))
    found = on_gpu(Interrupted(tmp_path / "state.pt", -1))
    torch.testing.assert_close(found.losses["bn_loss"], on_gpu(None).losses["bn_loss"], rtol=1e-2, atol=1e-3)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("device", "name", "tolerance"),
    [
        ("cpu", "bfloat16", 0.05),
        pytest.param("cuda", "float32", 0.005, marks=GPU),
        pytest.param("cuda", "bfloat16", 0.05, marks=GPU),
    ],
)
def test_devices_and_precisions_agree(device, name, tolerance):
    """Losses of each step within the tolerance of those in float32 on the CPU; statistics in float32."""
    shard, settings = shard_of([0, 2, 4]), settings_of(learning_rate=0.02)
    wanted = recover(shard, settings)
    found = recover_images(
        copy.deepcopy(TEACHER).to(device),
        shard,
        settings,
        resolution=RESOLUTION,
        mean=MEAN,
        std=STD,
        seed_names=SEED,
        device=torch.device(device),
        precision=precision({"precision": name}, torch.device(device)),
    )
    assert found.images.dtype == torch.float32
    for term, losses in wanted.losses.items():
        assert found.losses[term].dtype == torch.float32
        torch.testing.assert_close(found.losses[term].sum(1), losses.sum(1), rtol=tolerance, atol=0)
    assert not torch.equal(found.images, wanted.images)  # otherwise nothing was compared
    drift = (found.images - wanted.images).norm() / (
        wanted.images - initial_noise(shard, RESOLUTION, SEED)
    ).norm()
    assert drift < 10 * tolerance


# ---- bad input ---------------------------------------------------------------------------------


def test_a_feature_loss_that_is_not_finite_names_term_class_and_iteration():
    atoms = ATOMS[[0, 3]].flatten(0, 1).clone()
    atoms[4, 2] = math.inf  # the second class, class 3
    with pytest.raises(UserError, match=r"feature_loss of class 3 is inf at iteration 1; lower") as caught:
        recover(shard_of([0, 3], atoms=atoms), settings_of())
    assert "\n" not in str(caught.value)


def test_a_batchnorm_loss_that_is_not_finite_is_named_before_what_it_spoils():
    """After one step the class's images are not numbers, and then its features are not either."""
    statistics = {n: replace(s, var=s.var.clone()) for n, s in STATISTICS.items()}
    statistics["trunk.5"].var[3, 1] = math.nan
    with pytest.raises(UserError, match="bn_loss of class 3 is nan at iteration 1;"):
        recover(shard_of([0, 3], statistics=statistics), settings_of())


@pytest.mark.parametrize("last", [CHECK_EVERY + 5, 2 * CHECK_EVERY, 4 * CHECK_EVERY])
def test_the_iteration_is_right_when_it_comes_late(last):
    calls = []

    def drying_up(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
        calls.append(c)
        value = real_features(c, count, generator)
        return value * math.nan if calls.count(4) == CHECK_EVERY + 3 and c == 4 else value

    settings = settings_of(iterations=last, feature_term="mmd_linear", bn_term="none", real_batch=5)
    with pytest.raises(UserError, match=f"feature_loss of class 4 is nan at iteration {CHECK_EVERY + 3};"):
        recover(shard_of([1, 4], real_features=drying_up), settings)
    assert calls.count(4) <= 2 * CHECK_EVERY  # it is not looked for at the end alone


def test_global_terms_belong_to_all_classes():
    statistics = {n: replace(s, global_mean=s.global_mean * math.nan) for n, s in STATISTICS.items()}
    settings = settings_of(feature_term="cross_entropy", bn_term="global", loss_form="released")
    with pytest.raises(UserError, match="bn_loss of all classes is nan at iteration 1;"):
        recover(shard_of([0, 3], statistics=statistics), settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_term": "barycentre"}, "feature_term is 'barycentre'; known are barycenter"),
        ({"bn_term": "perclass"}, "bn_term is 'perclass'; known are per_class, global, running, none"),
        ({"crop_scale_start": 0.5}, "crops shrink from it to crop_scale_min"),
        ({"loss_form": "squared"}, "loss_form is 'squared'; known are paper, released"),
        ({"lambda_bn": -1.0}, "lambda_bn is -1.0"),
        ({"lambda_bn": math.nan}, "lambda_bn is nan"),
        ({"lambda_bn": math.inf}, "lambda_bn is inf"),
        ({"feature_term": "none", "bn_term": "none"}, "bn_term"),
    ],
)
def test_settings_that_make_no_sense_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        settings_of(**changes)


def test_a_teacher_without_batchnorm_is_told():
    model = build_model("convnet", CLASSES, RESOLUTION, seed=0, width=5, depth=2, norm="instance")
    with pytest.raises(UserError, match="no BatchNorm layer; set bn_term: none"):
        Objective(freeze(model), shard_of([0], statistics={}), settings_of(), SEED, CPU)


def test_set_terms_draw_anew_in_each_step():
    seeds = []

    def recorded(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return real_features(c, count, generator)

    settings = settings_of(iterations=4, feature_term="mmd_linear", bn_term="none", real_batch=5)
    recover(shard_of([1, 4], real_features=recorded), settings)
    assert seeds == [derive_seed(*SEED, "real features", c, t) for t in range(4) for c in (1, 4)]


def test_a_barycenter_term_needs_atoms():
    with pytest.raises(UserError, match="needs the barycenter's atoms"):
        recover(shard_of([0], atoms=None), settings_of())
