"""DM and DC, the distribution- and gradient-matching methods that WMDD is compared with.

Both optimise the images of a distilled set by SGD with momentum against freshly initialised networks:

    DM  Σ_c ‖mean φ(real_c) − mean φ(distilled_c)‖²      a new random φ at each iteration
    DC  Σ_c D(∇CE(real_c), ∇CE(distilled_c))             along the training of a random network

(Zhao and Bilen, "Dataset condensation with distribution matching", WACV 2023; Zhao, Mopuri and Bilen,
"Dataset condensation with gradient matching", ICLR 2021.) Images are normalised, (M, 3, R, R).
Whatever is random in an iteration is derived from its number, so that a resumed run equals an
uninterrupted one bit for bit on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_core.errors import UserError
from wmdd_core.models import Classifier
from wmdd_core.optimizers import SGD
from wmdd_core.progress import Progress
from wmdd_core.seeding import derive_seed, torch_generator

RealImages = Callable[[int, int, torch.Generator], Tensor]
"""(class, count, generator) → (n, 3, R, R) normalised, n = `count` or all that the class has."""

BuildNetwork = Callable[[int], Classifier]
"""Seed → a freshly initialised network whose weights depend on that seed alone."""

DC_LOOPS = {1: (1, 1), 10: (10, 50), 50: (50, 10)}
"""IPC → (outer_loops, inner_steps) of DC as published."""

NETWORK_BATCH = 256
"""Distilled images in a step of the network that DC trains."""

CHECK_EVERY = 50
"""Losses stay on the device for this many iterations before they are looked at."""


# Differentiable augmentation

SCALE_RANGE = (1 / 1.2, 1.2)
ROTATION_DEGREES = 15.0
CROP_SHARE = 0.125
CUTOUT_SHARE = 0.5
BRIGHTNESS_RANGE = (-0.5, 0.5)
SATURATION_RANGE = (0.0, 2.0)
CONTRAST_RANGE = (0.5, 1.5)


@dataclass(frozen=True)
class Augmentation:
    """One augmentation for all images of a batch: its name (None: identity) and its draw in [0, 1)."""

    name: str | None
    draw: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_augmentation(names: Sequence[str], generator: torch.Generator) -> Augmentation:
    """Draw one of the augmentations named in `names`, and its strength, from a CPU generator.

    As published, each draw is a single augmentation: `colour` (brightness within ±0.5 in normalised
    units, saturation 0–2, contrast 0.5–1.5), `crop` (a shift by up to 1/8 of the side, zeros move
    in), `cutout` (a square of half the side set to zero), `flip` (left to right, probability 0.5),
    `scale` (each axis by 1/1.2–1.2), `rotate` (±15°). Without names it is the identity.

    Raises `UserError` for an unknown name.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise UserError(
                f"unknown augmentation {name!r} in augmentation; known are {', '.join(AUGMENTATIONS)}"
            )
    choice, *draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    return Augmentation(names[int(choice * len(names))], tuple(draw)) if names else Augmentation(None)


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Apply one augmentation to all images, (N, C, R, R) → (N, C, R, R); differentiable in the images."""
    return (
        images if augmentation.name is None else AUGMENTATIONS[augmentation.name](images, augmentation.draw)
    )


def _recolour(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    brightness, saturation, contrast = (
        low + (high - low) * u
        for u, (low, high) in zip(draw, (BRIGHTNESS_RANGE, SATURATION_RANGE, CONTRAST_RANGE), strict=True)
    )
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = grey + saturation * (images - grey)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + contrast * (images - level)


def _shift(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    side = images.shape[-1]
    margin = int(CROP_SHARE * side + 0.5)
    top, left = (int(u * (2 * margin + 1)) for u in draw[:2])
    return F.pad(images, (margin,) * 4)[..., top : top + side, left : left + side]


def _cut_out(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    side = images.shape[-1]
    hole = int(CUTOUT_SHARE * side + 0.5)
    pixels = torch.arange(side, device=images.device)
    # Centres lie on pixels for odd holes and on the side + 1 edges between them for even ones.
    starts = (int(u * (side + 1 - hole % 2)) - hole // 2 for u in draw[:2])
    rows, columns = ((pixels >= start) & (pixels < start + hole) for start in starts)
    return images.masked_fill(rows[:, None] & columns[None, :], 0)


def _flip(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    return images.flip(-1) if draw[0] < 0.5 else images


def _scale(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    low, high = SCALE_RANGE
    across, down = (low + (high - low) * u for u in draw[:2])
    return _warp(images, [[across, 0, 0], [0, down, 0]])


def _rotate(images: Tensor, draw: tuple[float, float, float]) -> Tensor:
    angle = math.radians(ROTATION_DEGREES) * (2 * draw[0] - 1)
    return _warp(images, [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])


def _warp(images: Tensor, output_to_input: list[list[float]]) -> Tensor:
    """Sample the images bilinearly through an affine map of coordinates in −1 … 1, zeros outside."""
    affine = torch.tensor(output_to_input, dtype=images.dtype, device=images.device)
    grid = F.affine_grid(affine.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


AUGMENTATIONS: dict[str, Callable[[Tensor, tuple[float, float, float]], Tensor]] = {
    "colour": _recolour,
    "crop": _shift,
    "cutout": _cut_out,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


# DM


@dataclass(frozen=True)
class DmSettings:
    """DM as published; the learning rate is 10 from 100 images per class on.

    `real_batch`: real images per class and iteration. `augmentation`: see `draw_augmentation`.
    """

    iterations: int = 20_000
    real_batch: int = 256
    learning_rate: float = 1.0
    momentum: float = 0.5
    augmentation: Sequence[str] = tuple(AUGMENTATIONS)


def distil_dm(
    real: RealImages,
    initial: Tensor,
    labels: Tensor,
    build_network: BuildNetwork,
    settings: DmSettings,
    seed_names: tuple,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Distil by distribution matching, on the device and in the dtype of `initial`.

    At each iteration a network is built anew, in training mode, and each class's images take one SGD
    step towards the mean feature of `real_batch` real images; both see the same augmentation.

    real: see `RealImages`. initial: (M, 3, R, R) normalised, as published real images. labels: (M,)
    class indices. build_network: see `BuildNetwork`; ConvNet-3 of width 128 with InstanceNorm as
    published. Everything random derives from `seed_names`.

    Returns the images (M, 3, R, R) and the losses (iterations,), both on the CPU. Raises `UserError`
    for unfitting images and a loss that is not finite.
    """
    members = _members(initial, labels)

    def iterate(iteration: int, images: Tensor, update: Callable[[], None]) -> Tensor:
        network = _fresh_network(build_network, images, seed_names, iteration).requires_grad_(False)
        total = images.new_zeros(())
        for label, member in members.items():
            batches = _augmented_pair(real, images, member, label, settings, (*seed_names, iteration))
            with torch.no_grad():
                wanted = network.features(batches[0]).mean(0)
            loss = (wanted - network.features(batches[1]).mean(0)).square().sum()
            loss.backward()
            total = total + loss.detach()
        update()
        return total

    return _optimise("dm", initial, settings, iterate, progress)


# DC


@dataclass(frozen=True)
class DcSettings:
    """DC as published; `DC_LOOPS` holds `outer_loops` and `inner_steps` by images per class.

    `iterations`: networks that are drawn. `outer_loops`: image updates along the training of one
    network. `inner_steps`: passes of the network over the distilled set between two image updates, in
    batches of `NETWORK_BATCH`. `augmentation`: see `draw_augmentation`; DC itself uses none.
    """

    outer_loops: int
    inner_steps: int
    iterations: int = 1000
    real_batch: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.5
    network_learning_rate: float = 0.01
    augmentation: Sequence[str] = ()


def gradient_distance(
    gradients_real: Sequence[Tensor], gradients_distilled: Sequence[Tensor], epsilon: float = 1e-6
) -> Tensor:
    """DC's distance, the sum over layers and output rows of 1 − ⟨a, b⟩ / (‖a‖‖b‖ + epsilon); no unit.

    Gradients of weights as (out, …), the rest of each row flattened; one-dimensional parameters
    (biases, normalisation) are skipped. `epsilon` is the published one: rows with hardly any gradient
    count as orthogonal.
    """
    total = gradients_real[0].new_zeros(())
    for a, b in zip(gradients_real, gradients_distilled, strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + epsilon)
            total = total + (1 - cosine).sum()
    return total


def distil_dc(
    real: RealImages,
    initial: Tensor,
    labels: Tensor,
    build_network: BuildNetwork,
    settings: DcSettings,
    seed_names: tuple,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Distil by gradient matching, on the device and in the dtype of `initial`.

    Each iteration builds a network and alternates `outer_loops` times between one SGD step of the
    images on `gradient_distance`, class by class, and `inner_steps` passes of the network over the
    distilled set (none after the last image step).

    Arguments and errors as in `distil_dm`; as published, images start from noise (`noise_images`). Returns
    the images (M, 3, R, R) and the losses (iterations,), summed over classes and averaged over the outer
    loops, both on the CPU.
    """
    members = _members(initial, labels)
    labels = labels.to(initial.device)

    def iterate(iteration: int, images: Tensor, update: Callable[[], None]) -> Tensor:
        network = _fresh_network(build_network, images, seed_names, iteration)
        total = images.new_zeros(())
        for loop in range(settings.outer_loops):
            names = (*seed_names, iteration, loop)
            for label, member in members.items():
                batches = _augmented_pair(real, images, member, label, settings, names)
                distance = gradient_distance(*_weight_gradients(network, batches, label))
                distance.backward(inputs=[images])
                total = total + distance.detach()
            update()
            if loop + 1 < settings.outer_loops:
                _train_network(network, images.detach(), labels, settings, names)
        return total / settings.outer_loops

    return _optimise("dc", initial, settings, iterate, progress)


def noise_images(count: int, resolution: int, seed_names: tuple) -> Tensor:
    """N(0, 1) images (count, 3, R, R) in normalised units, float32 on the CPU."""
    return torch.randn(count, 3, resolution, resolution, generator=torch_generator(*seed_names, "noise"))


def _weight_gradients(
    network: nn.Module, batches: tuple[Tensor, Tensor], label: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Cross-entropy gradients of all weights on (real, distilled); only the latter can be differentiated."""
    weights = [p for p in network.parameters() if p.ndim > 1]

    def gradients(images: Tensor, differentiable: bool) -> tuple[Tensor, ...]:
        target = torch.full((len(images),), label, device=images.device)
        return torch.autograd.grad(
            F.cross_entropy(network(images), target), weights, create_graph=differentiable
        )

    return gradients(batches[0], False), gradients(batches[1], True)


def _train_network(
    network: nn.Module, images: Tensor, labels: Tensor, settings: DcSettings, names: tuple
) -> None:
    optimizer = SGD(network.parameters(), lr=settings.network_learning_rate)
    for step in range(settings.inner_steps):
        generator = torch_generator(*names, "train network", step)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in order.split(NETWORK_BATCH):
            viewed = augment(images[batch], draw_augmentation(settings.augmentation, generator))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(viewed), labels[batch]).backward()
            optimizer.step()


# What both share


def _members(images: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Class → indices of its images, by ascending class."""
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UserError(
            f"received images {tuple(images.shape)} and labels {tuple(labels.shape)}; "
            "give (M, 3, R, R) and one label for each image"
        )
    return {
        label: (labels == label).nonzero()[:, 0].to(images.device) for label in sorted(set(labels.tolist()))
    }


def _fresh_network(
    build_network: BuildNetwork, images: Tensor, seed_names: tuple, iteration: int
) -> Classifier:
    return build_network(derive_seed(*seed_names, "network", iteration)).to(images).train()


def _augmented_pair(
    real: RealImages,
    images: Tensor,
    member: Tensor,
    label: int,
    settings: DmSettings | DcSettings,
    names: tuple,
) -> tuple[Tensor, Tensor]:
    """A batch of real images and the distilled images of one class under the same augmentation."""
    batch = real(label, settings.real_batch, torch_generator(*names, "real images", label))
    if batch.shape[1:] != images.shape[1:] or len(batch) == 0:
        raise UserError(
            f"received real images {tuple(batch.shape)} of class {label} for distilled images "
            f"{tuple(images.shape)}; give at least one real image of the same size"
        )
    augmentation = draw_augmentation(settings.augmentation, torch_generator(*names, "augmentation", label))
    batch = batch.to(images.device, images.dtype, non_blocking=True)
    return augment(batch, augmentation), augment(images[member], augmentation)


def _optimise(
    method: str,
    initial: Tensor,
    settings: DmSettings | DcSettings,
    iterate: Callable[[int, Tensor, Callable[[], None]], Tensor],
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Run `iterate(iteration, images, update)`, which gives a loss, with SGD updates of the images."""
    images = initial.detach().clone().requires_grad_(True)
    velocity = torch.zeros_like(initial)
    losses = initial.new_zeros(settings.iterations)
    first = 0
    if progress and (state := progress.resume()):
        with torch.no_grad():
            images.copy_(state["images"])
        velocity.copy_(state["velocity"])
        first = len(state["losses"])
        losses[:first] = state["losses"]

    def update() -> None:
        with torch.no_grad():
            velocity.mul_(settings.momentum).add_(images.grad)
            images.sub_(settings.learning_rate * velocity)
        images.grad = None

    def losses_before(stop: int) -> Tensor:
        return _require_finite(method, losses[:stop].cpu(), settings.learning_rate)

    for iteration in range(first, settings.iterations):
        losses[iteration] = iterate(iteration, images, update)
        done = iteration + 1
        if done % CHECK_EVERY == 0:
            losses_before(done)
        if progress:
            progress.step(
                iteration,
                settings.iterations,
                lambda: {
                    # Copies, since on the CPU these tensors change with the next iteration.
                    "losses": losses_before(done).clone(),  # noqa: B023
                    "images": images.detach().cpu().clone(),
                    "velocity": velocity.cpu().clone(),
                },
                lambda: {"loss": float(losses_before(done)[-1])},  # noqa: B023
            )
    return images.detach().cpu(), losses_before(settings.iterations)


def _require_finite(method: str, losses: Tensor, learning_rate: float) -> Tensor:
    broken = (~losses.isfinite()).nonzero()[:, 0].tolist()
    if broken:
        raise UserError(
            f"{method}: the loss is {losses[broken[0]]:g} at iteration {broken[0] + 1}; "
            f"lower learning_rate (now {learning_rate:g})"
        )
    return losses
