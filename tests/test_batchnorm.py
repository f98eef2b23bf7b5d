"""Per-class BatchNorm statistics against direct computation in float64."""

import pytest
import torch
from torch import nn

from wmdd_core.batchnorm import (
    StatisticsAccumulator,
    _FrozenBatchNorm,
    group_moments,
    image_moments,
    record_input_moments,
)
from wmdd_core.models import build_model, freeze
from wmdd_core.seeding import torch_generator


def direct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over images and pixels, float64."""
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


def uneven_data() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([0] * 1 + [1] * 17 + [2] * 40 + [3] * 5)
    x = torch.randn(len(labels), 6, 5, 4, generator=torch_generator(0))
    # A mean that is large beside the deviation is where E[x²] − mean² in float32 fails.
    return x * 0.1 + 50 + labels.view(-1, 1, 1, 1), labels


def accumulate(x, labels, sizes) -> StatisticsAccumulator:
    accumulator = StatisticsAccumulator(4)
    order = torch.randperm(len(x), generator=torch_generator(1))
    for chosen in order.split(sizes):
        accumulator.add({"layer": image_moments(x[chosen])}, labels[chosen])
    return accumulator


def test_statistics_are_exact_for_uneven_batches_and_classes():
    x, labels = uneven_data()
    statistics = accumulate(x, labels, [1, 30, 7, 20, 5]).statistics()["layer"]
    for c in range(4):
        mean, var = direct(x[labels == c])
        torch.testing.assert_close(statistics.mean[c], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(statistics.var[c], var, rtol=1e-6, atol=1e-6)
    mean, var = direct(x)
    torch.testing.assert_close(statistics.global_mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.global_var, var, rtol=1e-6, atol=1e-6)


def test_variance_between_batches_is_not_lost_as_by_averaging_their_variances():
    """What the released code does."""
    x, labels = uneven_data()
    x = x + torch.arange(len(x)).view(-1, 1, 1, 1)
    found = accumulate(x, labels, 1).statistics()["layer"].var[2]
    chosen = x[labels == 2]
    exact, averaged = direct(chosen)[1], torch.stack([direct(image)[1] for image in chosen.split(1)]).mean(0)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert (averaged < 0.01 * exact).all()


@pytest.mark.parametrize("norm_layers", [3])
def test_network_statistics_equal_a_direct_pass(norm_layers):
    model = freeze(build_model("convnet", 4, 16, seed=0, width=8))
    images = torch.randn(30, 3, 16, 16, generator=torch_generator(2))
    labels = torch.arange(30) % 4
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda _m, args, n=n: inputs.__setitem__(n, args[0].double()))
        for n, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    accumulator = StatisticsAccumulator(4)
    with torch.no_grad(), record_input_moments(model) as moments:
        for chosen in torch.arange(30).split([7, 20, 3]):
            model.features(images[chosen])
            accumulator.add(moments, labels[chosen])
    statistics = accumulator.statistics()
    assert len(statistics) == norm_layers and statistics.keys() == inputs.keys()
    for name, x in inputs.items():
        for c in range(4):
            mean, var = direct(x[labels == c])
            torch.testing.assert_close(statistics[name].mean[c], mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(statistics[name].var[c], var, rtol=1e-6, atol=1e-6)


def test_rounding_makes_no_variance_negative():
    """A hundred equal images have none, and the difference of their sums lies below zero."""
    means = torch.linspace(1, 2, 50).expand(200, -1)
    accumulator = StatisticsAccumulator(2)
    accumulator.add({"layer": (means, torch.zeros_like(means))}, torch.arange(200) // 100)
    mean, second = (accumulator.sums["layer"] / 100).unbind(1)
    assert (second < mean**2).any()
    statistics = accumulator.statistics()["layer"]
    assert (statistics.var >= 0).all() and (statistics.global_var >= 0).all()


def test_weighted_moments_of_groups():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch_generator(3)) * 2 + 7
    w = torch.tensor([0.2, 0.8, 0.5, 0.3, 0.2], dtype=torch.float64)
    weights = torch.zeros(2, 5, dtype=torch.float64)
    weights[0, :2], weights[1, 2:] = w[:2], w[2:]
    group_mean, group_var = group_moments(image_moments(x), weights)
    for g, rows in enumerate([slice(0, 2), slice(2, 5)]):
        pixels = x[rows].transpose(0, 1).flatten(2)
        wanted_mean = (pixels.mean(2) * w[rows]).sum(1)
        wanted_var = ((pixels - wanted_mean[:, None, None]).square().mean(2) * w[rows]).sum(1)
        torch.testing.assert_close(group_mean[g], wanted_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(group_var[g], wanted_var, rtol=1e-6, atol=1e-6)


def test_a_layer_on_vectors_has_variance_between_images_only():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch_generator(4))
    mean, var = group_moments(image_moments(x), torch.full((1, 6), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(mean[0].double(), x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var[0].double(), x.var(0, correction=0), rtol=1e-6, atol=1e-6)


def test_moments_and_their_gradient_equal_autograds_own():
    x = torch.randn(4, 6, 5, 3, generator=torch_generator(5)) * 3 + 20
    pull = torch.randn(2, 4, 6, generator=torch_generator(6), dtype=torch.float64)

    def gradient(v: torch.Tensor, moments) -> torch.Tensor:
        v = v.clone().requires_grad_(True)
        mean, var = moments(v)
        (mean.double() * pull[0] + var.double() * pull[1]).sum().backward()
        return v.grad

    def direct_moments(v):
        return v.mean((2, 3)), v.var((2, 3), correction=0)

    for layout in (torch.contiguous_format, torch.channels_last):
        ours = gradient(x.contiguous(memory_format=layout), image_moments)
        torch.testing.assert_close(ours.double(), gradient(x.double(), direct_moments), rtol=1e-4, atol=1e-5)


def test_the_gradients_of_a_frozen_layer_and_its_moments_are_autograds():
    generator = torch_generator(5)
    layer = nn.BatchNorm2d(6).eval().requires_grad_(False)
    layer.running_mean.normal_(generator=generator)
    for values in (layer.running_var, layer.weight, layer.bias):
        nn.init.uniform_(values, 0.5, 1.5, generator=generator)
    x = torch.randn(4, 6, 5, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    pulls = [torch.randn(s, generator=generator) for s in ((4, 6, 5, 7), (4, 6), (4, 6))]

    ours = x.clone().requires_grad_(True)
    statistics = layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    found = _FrozenBatchNorm.apply(ours, *statistics)
    torch.autograd.backward(found, pulls)

    exact = x.double().requires_grad_(True)
    var, mean = torch.var_mean(exact, (2, 3), correction=0)
    wanted = layer.double()(exact), mean, var
    torch.autograd.backward(wanted, [v.double() for v in pulls])
    for value, true in zip((*found, ours.grad), (*wanted, exact.grad), strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-6)
    assert ours.grad.is_contiguous(memory_format=torch.channels_last)
