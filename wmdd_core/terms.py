"""What the configuration says and jobs read: terms of the loss, networks, labels. Standard library only."""

from collections import Counter
from collections.abc import Mapping

from wmdd_core.errors import UserError

SET_TERMS = ("mmd_linear", "mmd_rbf", "sliced_wasserstein")
"""Feature terms that compare a class's set of features with a mini-batch of its real ones."""
FEATURE_TERMS = ("barycenter", "cross_entropy", *SET_TERMS, "none")
BN_TERMS = ("per_class", "global", "running", "none")
MEASURED_BN_TERMS = ("per_class", "global")
"""Those that need the real images' statistics; `running` needs the teacher alone."""
LOSS_FORMS = ("paper", "released")

MEAN = "mean"
"""In the place of a class in a table: the mean over classes."""

CLASSES_SHOWN = 10
"""Most classes of a t-SNE map: as many as it has colours."""

SMALL_IMAGE = 64
"""Up to this many pixels a ResNet starts with a 3×3 stride-1 convolution and no max-pool."""


def tell_apart(labels: Mapping[str, str]) -> dict[str, str]:
    """Name → what people read; where several read alike, each with its name.

    >>> tell_apart({"wmdd": "WMDD", "longer": "WMDD", "dm": "DM"})
    {'wmdd': 'WMDD (wmdd)', 'longer': 'WMDD (longer)', 'dm': 'DM'}
    """
    alike = Counter(labels.values())
    return {name: f"{read} ({name})" if alike[read] > 1 else read for name, read in labels.items()}


def check_network(architecture: str, resolution: int, depth: int = 3, **_: object) -> None:
    """Raise `UserError` unless images of `resolution` pixels are large enough for the network."""
    if architecture == "convnet" and resolution >> depth < 1:
        raise UserError(f"a ConvNet of depth {depth} halves {resolution} pixels below one; lower its depth")
    if architecture.startswith("vit"):
        patch_size(resolution)


def patch_size(resolution: int) -> int:
    """Side of a ViT's patches in pixels: 16 from 160 pixels on, as published; below, an eighth of the image
    and no less than 4; or the next smaller divisor of `resolution`, down to half of that.

    Raises `UserError` where there is none.
    """
    wanted = 16 if resolution >= 160 else max(4, resolution // 8)
    for patch in range(wanted, (wanted - 1) // 2, -1):
        if resolution % patch == 0:
            return patch
    raise UserError(
        f"no patch of {(wanted + 1) // 2} to {wanted} pixels divides a ViT's image of {resolution};"
        f" use a resolution that is a multiple of {wanted}"
    )
