"""Minimal filtering and gradients of images against PyTorch's, in float64, and where networks use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.stages import placed
from wmdd_core import convolution
from wmdd_core.convolution import Conv2d, G, ImageConvolution, MinimalFiltering, use_fast_convolutions
from wmdd_core.models import build_model, freeze
from wmdd_core.seeding import torch_generator

# Lavin and Gray 2016, F(4×4, 3×3).
B_T = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
B_T += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
A_T = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
KERNEL = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]

SHAPES = [
    (3, 5, 7, 9, 12),  # images, channels, kernels, height, width
    (5, 8, 4, 64, 64),  # an image a block, and more images than blocks
    (37, 4, 6, 7, 7),  # sides that are no multiple of a tile, blocks that do not come out even
    (1, 3, 2, 1, 1),
]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("convolution", *shape), dtype=dtype)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_transforms_are_the_published_matrices():
    assert torch.equal(G * 24, torch.tensor(KERNEL, dtype=torch.float64))
    tile, six, four = drawn(6, 10), torch.empty(6, 10).double(), torch.empty(4, 10).double()
    convolution._input_transform(tile.unbind(), six.unbind())
    torch.testing.assert_close(six, torch.tensor(B_T).double() @ tile)
    wanted = torch.tensor(A_T).double() @ tile
    convolution._output_transform(tile.unbind(), four.unbind(), torch.empty(10).double())
    torch.testing.assert_close(four, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_values_and_gradients_are_those_of_the_convolution(shape, channels_last, threads):
    count, channels, kernels, height, width = shape
    x, weight = drawn(count, channels, height, width), drawn(kernels, channels, 3, 3)
    if channels_last:
        x, weight = (v.to(memory_format=torch.channels_last) for v in (x, weight))
    given = [v.requires_grad_() for v in (x, weight, drawn(kernels))]
    found, wanted = MinimalFiltering.apply(*given), F.conv2d(*given, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last)
    slope = drawn(*wanted.shape)
    gradients = [torch.autograd.grad(y, given, slope) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_only_the_wanted_gradients_are_computed(wanted, monkeypatch):
    asked = []
    for owner, name in ((torch.nn.grad, "conv2d_weight"), (convolution, "_spectrum")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _r=real, _n=name, **k: asked.append(_n) or _r(*a, **k))
    given = [drawn(3, 4, 8, 8), drawn(5, 4, 3, 3), None]
    for i in wanted:
        given[i].requires_grad_()
    found = MinimalFiltering.apply(*given)
    asked.clear()
    found.sum().backward()
    assert asked == ["conv2d_weight"] * (1 in wanted) + ["_spectrum"] * (0 in wanted)
    assert [given[i].grad is not None for i in (0, 1)] == [i in wanted for i in (0, 1)]


def test_gradients_can_be_differentiated_again():
    """Gradient matching differentiates the norm of a gradient."""
    x, weight, bias = drawn(3, 4, 8, 8), drawn(5, 4, 3, 3), drawn(5)

    def second(convolve) -> tuple[torch.Tensor, ...]:
        given = [v.clone().requires_grad_() for v in (x, weight, bias)]
        first = torch.autograd.grad(convolve(*given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(v.square().sum() for v in first), given)

    found, wanted = second(MinimalFiltering.apply), second(lambda *g: F.conv2d(*g, padding=1))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_float32_rounds_to_a_few_millionths():
    x, weight = drawn(4, 128, 16, 16), drawn(128, 128, 3, 3)
    exact = F.conv2d(x, weight, padding=1)
    found = MinimalFiltering.apply(x.float(), weight.float(), None)
    assert 1e-8 < (found - exact).norm() / exact.norm() < 5e-6


def test_an_image_has_no_part_in_another():
    """Not a number in one image, and the others are as they were."""
    x, weight = drawn(6, 4, 12, 12), drawn(5, 4, 3, 3)
    clean = MinimalFiltering.apply(x, weight, None)
    x[2] = float("nan")
    spoilt = MinimalFiltering.apply(x, weight, None)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[others], clean[others]) and spoilt[2].isnan().all()


@pytest.fixture
def filtered(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that are filtered minimally from here on."""
    seen = []
    real = MinimalFiltering.apply
    monkeypatch.setattr(MinimalFiltering, "apply", lambda x, *a: seen.append(tuple(x.shape)) or real(x, *a))
    return seen


@pytest.mark.parametrize(
    ("channels", "shape", "chosen"),
    [
        (128, (64, 8, 8), True),
        (128, (63, 8, 8), False),  # fewer tiles than make a block
        (128, (200, 6, 6), False),
        (64, (4, 64, 64), False),
    ],
)
def test_it_is_used_where_it_pays(channels, shape, chosen, filtered):
    count, *sides = shape
    layer = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
    use_fast_convolutions(layer)
    x = drawn(count, channels, *sides, dtype=torch.float32)
    found = layer(x)
    assert filtered == [tuple(x.shape)] * chosen
    wanted = F.conv2d(x, layer[0].weight, layer[0].bias, padding=1)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_other_precisions_go_the_direct_way(filtered):
    layer = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    use_fast_convolutions(layer)
    x = drawn(8, 128, 32, 32)
    layer.double()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
    assert filtered == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.Conv2d(5, 8, 7, padding=3, stride=2),
        nn.Conv2d(3, 8, 7, padding=2, stride=2),
        nn.Conv2d(3, 8, 3, padding=1, stride=3),
        nn.Conv2d(3, 8, 4, padding=2, stride=2),
        nn.Conv2d(3, 8, (3, 5), padding=(1, 2)),
    ],
    ids=repr,
)
def test_other_convolutions_are_left_alone(layer):
    use_fast_convolutions(nn.Sequential(layer))
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_images_are_those_of_the_convolution(size, stride, channels_last):
    for sides in ((12, 10), (2, 4)):
        x, weight, bias = drawn(3, 3, *sides), drawn(5, 3, size, size), drawn(5)
        if channels_last:
            x, weight = (v.to(memory_format=torch.channels_last) for v in (x, weight))
        x.requires_grad_()
        found = ImageConvolution.apply(x, weight, bias, stride)
        wanted = F.conv2d(x, weight, bias, stride, size // 2)
        assert torch.equal(found, wanted)
        slope = drawn(*wanted.shape)
        gradients = [torch.autograd.grad(y, x, slope) for y in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_gradients_of_images_can_be_differentiated_again():
    x, weight = drawn(2, 3, 8, 8).requires_grad_(), drawn(4, 3, 3, 3)

    def second(convolve) -> torch.Tensor:
        (first,) = torch.autograd.grad(convolve(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = second(lambda v: ImageConvolution.apply(v, weight, None, 1))
    wanted = second(lambda v: F.conv2d(v, weight, padding=1))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)


def test_gradients_of_images_keep_their_precision(monkeypatch):
    """Under autocast the layer computes in bfloat16; the images' gradient is float32, as the images are."""
    monkeypatch.setattr(convolution, "OUTPUTS", 0)
    layer = nn.Sequential(nn.Conv2d(3, 16, 7, stride=2, padding=3)).requires_grad_(False)
    x = drawn(4, 3, 16, 16, dtype=torch.float32).requires_grad_()

    def gradient() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.float().square().sum(), x)[0]

    wanted = gradient()
    use_fast_convolutions(layer)
    found = gradient()
    assert found.dtype == wanted.dtype == torch.float32
    assert (found - wanted).norm() / wanted.norm() < 1e-2


def test_gradients_of_images_are_used_where_only_images_want_one(monkeypatch):
    used = []
    real = ImageConvolution.apply
    monkeypatch.setattr(ImageConvolution, "apply", lambda x, *a: used.append(tuple(x.shape)) or real(x, *a))

    def run(
        count: int = 9,
        channels: int = 3,
        side: int = 64,
        frozen: bool = True,
        wanted: bool = True,
        bias: bool = True,
    ) -> bool:
        used.clear()
        layer = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=bias)).requires_grad_(not frozen)
        use_fast_convolutions(layer)
        layer(torch.zeros(count, channels, side, side, requires_grad=wanted))
        return used == [(count, channels, side, side)]

    assert run() and run(channels=1) and run(bias=False)
    assert not run(frozen=False, bias=False)
    assert not (run(count=8) or run(channels=5) or run(side=65) or run(frozen=False) or run(wanted=False))
    with torch.no_grad():
        assert not run()


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_kernels_or_a_bias_that_learn_beside_images_get_their_gradient(learns, monkeypatch):
    """One of them alone: the other is frozen, or there is none."""
    monkeypatch.setattr(convolution, "OUTPUTS", 0)
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=learns == "bias", dtype=torch.float64).requires_grad_(False)
    given = [drawn(2, 3, 8, 8).requires_grad_(), getattr(layer, learns).requires_grad_()]
    wanted = torch.autograd.grad(layer(given[0]).square().sum(), given)
    use_fast_convolutions(nn.Sequential(layer))
    found = torch.autograd.grad(layer(given[0]).square().sum(), given)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "convnet"])
def test_networks_are_those_of_pytorchs_convolutions(architecture, filtered):
    """Same weights, same outputs to rounding; of gradients, rounding moves a few past the kink of a ReLU."""
    model = freeze(build_model(architecture, 5, 32, seed=0, width=128))
    plain = placed(freeze(build_model(architecture, 5, 32, seed=0, width=128)), "plain", "cpu")
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert not any(isinstance(m, Conv2d) for m in plain.modules())
    x = drawn(16, 3, 32, 32, dtype=torch.float32).requires_grad_()
    outputs = [network(x) for network in (model, plain)]
    assert len(filtered) == {"resnet18": 3, "resnet50": 3, "convnet": 1}[architecture]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    for (found, wanted), allowed in ((outputs, 2e-5), (gradients, 1e-2)):
        assert (found - wanted).norm() / wanted.norm() < allowed
