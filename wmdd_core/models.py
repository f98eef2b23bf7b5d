"""Networks: ConvNet, ResNet and ViT behind one small interface.

Every network is a `Classifier`: `features` gives the penultimate layer, `classifier` is the
last linear layer, and calling the network composes the two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wmdd_core.convolution import use_fast_convolutions
from wmdd_core.errors import UserError
from wmdd_core.terms import SMALL_IMAGE, check_network, patch_size

ARCHITECTURES = ("convnet", "resnet18", "resnet50", "resnet101", "vit_tiny", "vit_small")


class Classifier(nn.Module):
    """A trunk that maps images (N, 3, R, R) to features (N, D), and a linear layer on top."""

    def __init__(self, trunk: nn.Module, dimension: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.classifier = nn.Linear(dimension, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate-layer embedding, (N, 3, R, R) → (N, D)."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, 3, R, R) → (N, classes)."""
        return self.classifier(self.features(images))


def build_model(
    architecture: str,
    classes: int,
    resolution: int,
    *,
    seed: int,
    width: int = 128,
    depth: int = 3,
    norm: str = "batch",
) -> Classifier:
    """Build a freshly initialised network, whose weights depend on `seed` alone.

    `width`, `depth` and `norm` ("batch" or "instance") shape the ConvNet: `depth` blocks of
    3×3 convolution, normalisation, ReLU and 2×2 average pooling, then the flattened map. The
    other architectures have their published shape, with the stem and the patch size that
    fit `resolution`.

    Raises `UserError` for an architecture that is not in `ARCHITECTURES`, or images too small for it.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    check_network(architecture, resolution, depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "convnet":
            trunk, dimension = _convnet_trunk(resolution, width, depth, norm)
        elif architecture.startswith("resnet"):
            trunk, dimension = _resnet_trunk(architecture, resolution)
        else:
            trunk, dimension = _vit_trunk(architecture, resolution)
        use_fast_convolutions(trunk)
        # Convolutions run 1.5 times as fast on a CPU, and faster on a GPU, with channels last in memory.
        return Classifier(trunk, dimension, classes).to(memory_format=torch.channels_last)


def _convnet_trunk(resolution: int, width: int, depth: int, norm: str) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(depth):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width, width),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten()), width * (resolution >> depth) ** 2


def _resnet_trunk(architecture: str, resolution: int) -> tuple[nn.Module, int]:
    from torchvision.models import resnet

    network = getattr(resnet, architecture)(weights=None)
    if resolution <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    dimension = network.fc.in_features
    network.fc = nn.Identity()
    return network, dimension


def _vit_trunk(architecture: str, resolution: int) -> tuple[nn.Module, int]:
    from torchvision.models.vision_transformer import VisionTransformer

    heads = {"vit_tiny": 3, "vit_small": 6}[architecture]
    network = VisionTransformer(
        image_size=resolution,
        patch_size=patch_size(resolution),
        num_layers=12,
        num_heads=heads,
        hidden_dim=64 * heads,
        mlp_dim=256 * heads,
    )
    network.heads = nn.Identity()
    return network, 64 * heads


def batchnorm_layers(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers of `model` by name, in the order of definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def freeze(model: Classifier) -> Classifier:
    """Evaluation mode and no gradients for the weights; gradients still flow to the images."""
    return model.eval().requires_grad_(False)


def load_weights(model: Classifier, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load `weights` strictly, from a file of ours or one in torchvision's naming.

    Raises `UserError` that lists every missing, surplus or misshapen weight; `origin` names the file.
    """
    own = model.state_dict()
    if "classifier.weight" not in weights:
        weights = {_from_torchvision(name): value for name, value in weights.items()}
    # Published weights predate BatchNorm's counter of batches, which PyTorch fills in and nothing here reads.
    missing = sorted(n for n in own.keys() - weights.keys() if not n.endswith(".num_batches_tracked"))
    surplus = sorted(weights.keys() - own.keys())
    shaped = [
        f"{n} {tuple(weights[n].shape)} instead of {tuple(own[n].shape)}"
        for n in sorted(own.keys() & weights.keys())
        if own[n].shape != weights[n].shape
    ]
    faults = {"missing": missing, "surplus": surplus, "of another shape": shaped}
    told = [f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names]
    if told:
        raise UserError(f"{origin} does not fit the configured architecture; {'; '.join(told)}")
    model.load_state_dict(dict(weights))


def _from_torchvision(name: str) -> str:
    for head in ("fc.", "heads.head.", "heads."):
        if name.startswith(head):
            return "classifier." + name.removeprefix(head)
    return "trunk." + name
