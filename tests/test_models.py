"""Networks against torchvision's, their common interface, and strict loading of weights."""

import pytest
import torch
from torch import nn

from wmdd_core.errors import UserError
from wmdd_core.models import (
    ARCHITECTURES,
    batchnorm_layers,
    build_model,
    freeze,
    load_weights,
)
from wmdd_core.seeding import torch_generator
from wmdd_core.terms import patch_size

DIMENSION = {"resnet18": 512, "resnet50": 2048, "resnet101": 2048, "vit_tiny": 192, "vit_small": 384}
CASES = [
    ("convnet", 16),
    ("convnet", 32),
    ("convnet", 64),
    ("resnet18", 16),
    ("resnet18", 32),
    ("resnet18", 64),
]
CASES += [("resnet50", 16), ("resnet101", 8), ("vit_tiny", 16), ("vit_small", 8)]


def images(count: int, resolution: int) -> torch.Tensor:
    return torch.randn(count, 3, resolution, resolution, generator=torch_generator("images"))


@pytest.fixture(scope="module")
def networks():
    """Built once: the large ones take a while."""
    built = {}

    def get(architecture: str, resolution: int):
        if (architecture, resolution) not in built:
            built[architecture, resolution] = build_model(architecture, 7, resolution, seed=0, width=16)
        return built[architecture, resolution]

    return get


def test_every_architecture_is_tested():
    assert {a for a, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(("architecture", "resolution"), CASES)
def test_features_then_classifier_is_the_network(networks, architecture, resolution):
    model = freeze(networks(architecture, resolution))
    x = images(2, resolution)
    features = model.features(x)
    dimension = 16 * (resolution // 8) ** 2 if architecture == "convnet" else DIMENSION[architecture]
    assert features.shape == (2, dimension) and model.classifier.in_features == dimension
    assert model(x).shape == (2, 7)
    assert torch.equal(model(x), model.classifier(features))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    x.requires_grad_(True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_small_images_get_the_small_stem_and_large_ones_the_standard(networks):
    from torchvision.models import resnet18

    small, large = networks("resnet18", 64).trunk, build_model("resnet18", 7, 65, seed=0).trunk
    assert (
        small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1) and small.conv1.padding == (1, 1)
    )
    assert isinstance(small.maxpool, nn.Identity) and small.conv1.bias is None
    assert repr(large.conv1) == repr(resnet18().conv1) and isinstance(large.maxpool, nn.MaxPool2d)
    # The new convolution is initialised as the others: normal, deviation √(2 / (9 · 64)).
    assert small.conv1.weight.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)


def test_the_convnet_is_blocks_of_convolution_norm_relu_and_pooling():
    model = build_model("convnet", 3, 20, seed=1, width=5, depth=2)
    kinds = [type(m).__name__ for m in model.trunk]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "AvgPool2d"] * 2 + ["Flatten"]
    freeze(model)
    x = images(2, 20)
    y = x
    for i in (0, 4):
        y = torch.nn.functional.avg_pool2d(model.trunk[i + 1](model.trunk[i](y)).relu(), 2)
    torch.testing.assert_close(model.features(x), y.flatten(1))
    assert model.classifier.in_features == 5 * 5 * 5


def test_instance_norm_normalises_each_channel_of_each_image():
    model = build_model("convnet", 3, 8, seed=1, width=6, depth=1, norm="instance")
    assert batchnorm_layers(model) == {}
    x = images(3, 8)
    conv, norm = model.trunk[0], model.trunk[1]
    y = conv(x)
    wanted = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm(y), wanted, rtol=1e-4, atol=1e-5)


def test_batchnorm_layers_come_in_the_order_of_the_forward_pass(networks):
    model = networks("resnet18", 16)
    layers = batchnorm_layers(model)
    assert len(layers) == 20 and list(layers)[0] == "trunk.bn1"
    seen = []
    hooks = [m.register_forward_hook(lambda m, _i, _o: seen.append(m)) for m in layers.values()]
    model(images(1, 16))
    for hook in hooks:
        hook.remove()
    assert seen[0] is next(iter(layers.values()))  # the first is the one that SRe2L multiplies


@pytest.mark.parametrize("architecture", ["convnet", "resnet18", "vit_tiny"])
def test_weights_depend_on_the_seed_alone(architecture):
    def state(seed: int) -> dict:
        return build_model(architecture, 3, 16, seed=seed, width=4).state_dict()

    first = state(5)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = state(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(again[n], first[n]) for n in first)
    other = state(6)
    # Convolutions and the classifier differ; norms start from the same constants.
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])
    name = next(n for n in first if "conv" in n and n.endswith("weight") or n == "trunk.0.weight")
    assert not torch.equal(other[name], first[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alexnet", 10, 32), "unknown architecture 'alexnet'.*convnet.*vit_small"),
        (("convnet", 10, 4), "depth 3 halves 4 pixels"),
    ],
)
def test_what_cannot_be_built_is_told(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(*arguments, seed=0)


@pytest.mark.parametrize(
    ("resolution", "patch"), [(8, 4), (16, 4), (28, 4), (32, 4), (36, 4), (64, 8), (224, 16), (200, 10)]
)
def test_patches_of_a_vision_transformer_fill_the_image(resolution, patch):
    assert patch_size(resolution) == patch
    model = build_model("vit_tiny", 3, resolution, seed=0)
    assert model.eval()(images(1, resolution)).shape == (1, 3)


@pytest.mark.parametrize("resolution", [97, 163])
def test_an_image_that_no_patch_fills_is_told(resolution):
    """Deep in torchvision it is an assertion; a patch of one pixel would be thousands of tokens."""
    with pytest.raises(UserError, match=f"divides a ViT's image of {resolution}; use a resolution"):
        build_model("vit_tiny", 3, resolution, seed=0)


# ---- loading -----------------------------------------------------------------------------------


def small() -> nn.Module:
    return build_model("convnet", 4, 8, seed=0, width=4, depth=1)


def test_own_weights_are_loaded():
    model = small()
    other = build_model("convnet", 4, 8, seed=1, width=4, depth=1).state_dict()
    load_weights(model, other, "file")
    assert all(torch.equal(v, other[n]) for n, v in model.state_dict().items())


def test_missing_surplus_and_misshapen_weights_are_all_listed():
    model = small()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    weights = model.state_dict()
    del weights["trunk.1.running_mean"], weights["trunk.0.bias"]
    weights["trunk.9.weight"] = torch.zeros(1)
    weights["classifier.bias"] = torch.zeros(10)
    weights["trunk.0.weight"] = torch.ones(4, 3, 3, 3)
    with pytest.raises(UserError) as caught:
        load_weights(model, weights, "teacher.pth")
    told = str(caught.value)
    assert told.startswith("teacher.pth does not fit") and "\n" not in told
    assert "missing: trunk.0.bias, trunk.1.running_mean" in told
    assert "surplus: trunk.9.weight" in told
    assert "of another shape: classifier.bias (10,) instead of (4,)" in told
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())  # nothing is half loaded


def test_weights_in_torchvisions_naming_give_torchvisions_network():
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = resnet18(num_classes=5)
    for layer in batchnorm_layers(theirs).values():
        nn.init.normal_(layer.running_mean, generator=torch_generator("mean"))
    ours = build_model("resnet18", 5, 224, seed=0)
    load_weights(ours, theirs.state_dict(), "file")
    x = images(1, 96)
    with torch.no_grad():
        torch.testing.assert_close(freeze(ours)(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_weights_of_torchvisions_transformer_are_accepted():
    from torchvision.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        image_size=16, patch_size=4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=5
    )
    ours = build_model("vit_tiny", 5, 16, seed=0)
    nn.init.normal_(theirs.heads.head.weight, generator=torch_generator("head"))
    load_weights(ours, theirs.state_dict(), "file")
    x = images(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(freeze(ours)(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_published_weights_from_before_the_batch_counter_are_accepted():
    """torchvision's published ResNets were saved without `num_batches_tracked`, which nothing here reads."""
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=5).state_dict()
    old = {n: v for n, v in theirs.items() if not n.endswith("num_batches_tracked")}
    assert len(old) == 102
    ours = build_model("resnet18", 5, 224, seed=0)
    load_weights(ours, old, "resnet18.pth")
    assert torch.equal(ours.trunk.conv1.weight, old["conv1.weight"])


def test_another_architectures_weights_are_refused():
    with pytest.raises(UserError, match="missing: .*; surplus: "):
        load_weights(small(), build_model("resnet18", 4, 8, seed=0).state_dict(), "file")
    with pytest.raises(UserError, match=r"classifier.weight \(10, 512\) instead of \(4, 512\)"):
        load_weights(
            build_model("resnet18", 4, 8, seed=0), build_model("resnet18", 10, 8, seed=0).state_dict(), "f"
        )
