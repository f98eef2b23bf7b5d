"""Recover: optimise synthetic images so that their features and BatchNorm statistics match (Eq. 15).

One loop serves WMDD, SRe2L, CDA and every cell of the ablation; what differs is a setting. For the
classes c of a shard, with images j, features f_e, barycenter atoms b and weights w:

    L = L_feature + λ L_BN
    L_feature = Σ_c Σ_j ‖f_e(x̃_cj) − b_cj‖²                                  feature_term = barycenter
    L_BN      = Σ_c Σ_l (‖mean_l(x̃_c) − BNmean_cl‖² + ‖var_l(x̃_c) − BNvar_cl‖²)  bn_term = per_class

mean_l and var_l are taken at the input of BatchNorm layer l, over the class's images (weighted by w)
and all pixels. `loss_form="paper"` is the above. `loss_form="released"` is what the released code
minimises: ‖F − B‖_F over the batch and Σ_l mean_c (‖Δmean‖ + ‖Δvar‖), norms instead of squares, so
that the balance between the terms depends on the batch. A shard may hold several batches; they are
optimised in the same steps, and the loss is the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wmdd_core.augmentation import Views, apply_views, draw_views
from wmdd_core.batchnorm import LayerStatistics, Moments, group_moments, record_input_moments
from wmdd_core.discrepancies import mmd_linear, mmd_rbf, random_directions, rbf_bandwidth, sliced_wasserstein
from wmdd_core.errors import UserError
from wmdd_core.graphs import replayed
from wmdd_core.memory import small_blocks_apart
from wmdd_core.models import Classifier, batchnorm_layers
from wmdd_core.optimizers import Adam
from wmdd_core.progress import Progress
from wmdd_core.seeding import torch_generator
from wmdd_core.terms import BN_TERMS, FEATURE_TERMS, LOSS_FORMS, SET_TERMS

VIEW_BLOCK = 500
"""Views are drawn for this many steps at once; part of what a seed means, so never a setting."""

CHECK_EVERY = 50
"""Losses stay on the device for this many steps before they are looked at."""


@dataclass(frozen=True)
class RecoverySettings:
    """How to recover. Table 6 of the paper: iterations, learning_rate, lambda_bn; the rest as released.

    `bn_term`: "per_class" (WMDD); "running", the averages that the teacher's training left in its layers
    (SRe2L); "global", exact statistics of all real images, as the per-class ones are of a class's.
    `ce_weight` adds cross-entropy to another feature term (the released code: 1; the paper: 0).
    `first_bn_multiplier` scales the first layer's part of the BatchNorm term (SRe2L: 10).
    `crop_scale_start` above `crop_scale_min` is CDA's curriculum: the lower bound of the crop scale
    falls from one to the other by a cosine. `roll` is in pixels. `real_batch` is the number of real
    features per class and step for the set terms.
    """

    iterations: int
    learning_rate: float
    lambda_bn: float
    feature_term: str = "barycenter"
    bn_term: str = "per_class"
    loss_form: str = "paper"
    ce_weight: float = 0.0
    first_bn_multiplier: float = 1.0
    crop_scale_min: float = 0.08
    crop_scale_start: float | None = None
    flip: bool = True
    roll: int = 32
    real_batch: int = 256
    directions: int = 128
    beta1: float = 0.5
    beta2: float = 0.9

    def __post_init__(self) -> None:
        for key, known in (("feature_term", FEATURE_TERMS), ("bn_term", BN_TERMS), ("loss_form", LOSS_FORMS)):
            if getattr(self, key) not in known:
                raise UserError(f"{key} is {getattr(self, key)!r}; known are {', '.join(known)}")
        if not (math.isfinite(self.lambda_bn) and self.lambda_bn >= 0):
            raise UserError(f"lambda_bn is {self.lambda_bn}; it must be zero or a positive number")
        if self.crop_scale_start is not None and self.crop_scale_start <= self.crop_scale_min:
            raise UserError(
                f"crop_scale_start is {self.crop_scale_start}, and crops shrink from it to crop_scale_min,"
                f" {self.crop_scale_min}; lower crop_scale_min"
            )
        if self.feature_term == self.bn_term == "none" and not self.ce_weight:
            raise UserError(
                "feature_term and bn_term are both none; there is nothing to match, so set one of them"
            )

    def crop_scale_at(self, steps: Tensor) -> Tensor:
        """Lower bound of the crop scale at each of `steps`."""
        if self.crop_scale_start is None:
            return torch.full(steps.shape, self.crop_scale_min)
        fall = self.crop_scale_start - self.crop_scale_min
        return self.crop_scale_min + fall * 0.5 * (1 + torch.cos(math.pi * steps / self.iterations))

    def learning_rate_at(self, step: int) -> float:
        """Cosine decay to zero, per step."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.iterations))


@dataclass(frozen=True)
class Shard:
    """The images of one job and what each is to match; rows of `images` are grouped by class.

    `classes` (G,) are the class indices present, `group` (M,) the row of `classes` of each image,
    `index` (M,) the image's number within its class, `weights` (M,) what images weigh beside others of
    their class, `atoms` (M, D) the barycenter's support (or None), `real_features(class, count, generator)`
    draws real features for the set terms, `statistics` holds the real images' BatchNorm statistics by layer
    (empty where `bn_term` needs none).
    `batch` (M,) is the batch of each image, each with images of all `classes` (None: all are one batch).
    """

    classes: Tensor
    group: Tensor
    index: Tensor
    weights: Tensor
    statistics: dict[str, LayerStatistics]
    atoms: Tensor | None = None
    real_features: Callable[[int, int, torch.Generator], Tensor] | None = None
    batch: Tensor | None = None


@dataclass(frozen=True)
class Recovered:
    """`images` (M, 3, R, R) normalised float32, and the unscaled loss terms of every step.

    `losses` maps feature_loss, bn_loss and ce_loss to (iterations, G), one column a class of the shard
    (one column in all for a BatchNorm term that is not per class).
    """

    images: Tensor
    losses: dict[str, Tensor]


@small_blocks_apart()
def recover_images(
    model: Classifier,
    shard: Shard,
    settings: RecoverySettings,
    *,
    resolution: int,
    mean: Tensor,
    std: Tensor,
    seed_names: tuple,
    device: torch.device,
    initial: Tensor | None = None,
    precision: AbstractContextManager | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Optimise the images of `shard` against a frozen teacher with Adam.

    `model` is the teacher, frozen, on `device`; `resolution` is R in pixels; `mean` and `std` (3,) are in
    0..1 units; `precision` is the context of forward passes, float32 if None.
    Images start from N(0, 1) in normalised space, or from `initial` (M, 3, R, R) normalised. Noise
    and views are drawn from `seed_names` with class, image and step, so a class's images do
    not depend on which classes share its shard (with `bn_term` per_class and loss_form paper).
    After each step every channel is clamped to what a pixel can hold; the last iterate is kept.

    Raises `UserError` naming step, class and term when a loss is not finite.
    """
    images = initial if initial is not None else initial_noise(shard, resolution, seed_names)
    # A copy, because the loop updates it in place.
    images = images.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    optimizer = Adam([images], lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)
    low, high = ((bound - v).view(1, 3, 1, 1).to(device) for bound, v in ((0, mean), (1, mean)))
    low, high = low / std.view(1, 3, 1, 1).to(device), high / std.view(1, 3, 1, 1).to(device)
    objective = Objective(model, shard, settings, seed_names, device)
    views = ShardViews(shard, settings, resolution, seed_names, device)
    step = 0

    def differentiate(*drawn: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        leaf = images.detach().requires_grad_(True)
        viewed = apply_views(leaf, Views(*drawn))
        with precision or nullcontext():
            terms, total = objective(viewed, step)
        (gradient,) = torch.autograd.grad(total, [leaf])
        return {name: values.detach() for name, values in terms.items()}, gradient

    if settings.feature_term not in SET_TERMS:  # which draw real features on the host in each step
        differentiate = replayed(differentiate, device)
    curves: dict[str, list[Tensor]] = {}
    first = 0
    if progress and (state := progress.resume()):
        images.copy_(state["images"])
        optimizer.load_state_dict(state["optimizer"])
        curves = {name: list(curve.to(device)) for name, curve in state["losses"].items()}
        first = state["step"] + 1

    for step in range(first, settings.iterations):
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        terms, images.grad = differentiate(*vars(views.at(step)).values())
        optimizer.step()
        images.clamp_(low, high)
        for name, values in terms.items():
            curves.setdefault(name, []).append(values.clone())
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == settings.iterations:
            _check_finite(curves, step // CHECK_EVERY * CHECK_EVERY, shard)
        if progress:
            progress.step(
                step,
                settings.iterations,
                lambda: {
                    "images": images,
                    "optimizer": optimizer.state_dict(),
                    "losses": {n: torch.stack(c).cpu() for n, c in curves.items()},
                    "step": step,  # noqa: B023
                },
                lambda: {n: float(c[-1].sum()) for n, c in curves.items()},
            )
    losses = {n: torch.stack([v.cpu() for v in c]) for n, c in curves.items()}
    return Recovered(images.cpu(), losses)


def initial_noise(shard: Shard, resolution: int, seed_names: tuple) -> Tensor:
    """N(0, 1) images (M, 3, R, R), each from the seed of its class and number."""
    return torch.stack(
        [
            torch.randn(3, resolution, resolution, generator=torch_generator(*seed_names, "noise", c, i))
            for c, i in zip(shard.classes[shard.group].tolist(), shard.index.tolist(), strict=True)
        ]
    )


class ShardViews:
    """One view for each class and step, shared by the class's images, drawn a block of steps at a time."""

    def __init__(
        self,
        shard: Shard,
        settings: RecoverySettings,
        resolution: int,
        seed_names: tuple,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shard, self.settings, self.resolution, self.seed_names = shard, settings, resolution, seed_names
        self.device = device
        self.block = -1
        self.drawn: list[Views] = []

    def at(self, step: int) -> Views:
        """The views of the M images at `step`."""
        block, row = divmod(step, VIEW_BLOCK)
        if block != self.block:
            self.block, self.drawn = block, self._draw(block)
        return self.drawn[row]

    def _draw(self, block: int) -> list[Views]:
        steps = torch.arange(block * VIEW_BLOCK, (block + 1) * VIEW_BLOCK)
        by_class = [
            draw_views(
                VIEW_BLOCK,
                self.resolution,
                torch_generator(*self.seed_names, "recovery views", c, block),
                crop_scale_min=self.settings.crop_scale_at(steps),
                flip=self.settings.flip,
                roll=self.settings.roll,
            )
            for c in self.shard.classes.tolist()
        ]
        fields = {
            name: torch.stack([getattr(v, name) for v in by_class], 1)[:, self.shard.group].to(self.device)
            for name in vars(by_class[0])
        }
        return [Views(**{n: values[row] for n, values in fields.items()}) for row in range(VIEW_BLOCK)]


class Objective:
    """Eq. 15 and its variants for one shard: viewed images → terms by class, and the total to minimise."""

    def __init__(
        self,
        model: Classifier,
        shard: Shard,
        settings: RecoverySettings,
        seed_names: tuple,
        device: torch.device,
    ) -> None:
        self.model, self.settings, self.seed_names = model, settings, seed_names
        self.shard, self.device = shard, device
        self.labels = shard.classes[shard.group].to(device)
        if settings.feature_term == "barycenter":
            if shard.atoms is None:
                raise UserError("feature_term barycenter needs the barycenter's atoms; none were given")
            self.atoms = shard.atoms.float().to(device)
        # A cell is the images of one class in one batch; per-cell terms are (batches, classes).
        batch = torch.zeros_like(shard.group) if shard.batch is None else shard.batch
        self.batches, cell = int(batch.max()) + 1, batch * len(shard.classes) + shard.group
        cells = torch.arange(self.batches * len(shard.classes))
        self.members = (cells[:, None] == cell).to(device)
        if settings.bn_term == "per_class":
            weights = F.one_hot(cell).T * shard.weights.double()
        else:
            weights = F.one_hot(batch).T.double()
        self.bn_weights = (weights / weights.sum(1, keepdim=True)).float().to(device)
        self.layers = batchnorm_layers(model)
        if settings.bn_term != "none":
            if not self.layers:
                raise UserError("the teacher has no BatchNorm layer; set bn_term: none")
            self.targets = self._bn_targets()
            self.channels = [layer.num_features for layer in self.layers.values()]

    def _bn_targets(self) -> Tensor:
        """Mean and variance to match, every layer's channels side by side: (2, cells or 1, ΣC)."""

        def moments(name: str) -> Moments:
            if self.settings.bn_term == "running":
                return self.layers[name].running_mean[None], self.layers[name].running_var[None]
            real = self.shard.statistics[name]
            if self.settings.bn_term == "global":
                return real.global_mean[None], real.global_var[None]
            classes = self.shard.classes.repeat(self.batches)
            return real.mean[classes], real.var[classes]

        parts = zip(*map(moments, self.layers), strict=True)
        return torch.stack([torch.cat(part, 1) for part in parts]).float().to(self.device)

    def __call__(self, viewed: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        with record_input_moments(self.model) as moments:
            features = self.model.features(viewed)
        # The network may compute in half precision; losses and the statistics in them never do.
        with torch.autocast(viewed.device.type, enabled=False):
            return self._compare(features.float(), moments, step)

    def _compare(
        self, features: Tensor, moments: dict[str, Moments], step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        settings, paper = self.settings, self.settings.loss_form == "paper"
        terms: dict[str, Tensor] = {}
        total = features.new_zeros(())
        if settings.feature_term not in ("none", "cross_entropy"):
            by_cell = self.feature_loss(features, step)
            terms["feature_loss"] = by_cell.sum(0)
            # A tiny floor keeps the gradient of the norm finite when the match is exact.
            total = total + (by_cell.sum() if paper else (by_cell.sum(1) + 1e-12).sqrt().sum())
        ce_weight = 1 if settings.feature_term == "cross_entropy" else settings.ce_weight
        if ce_weight:
            logits = self.model.classifier(features)
            ce = F.cross_entropy(logits.float(), self.labels, reduction="none")
            terms["ce_loss"] = self._sum_by_cell(ce).sum(0)
            total = total + ce_weight * terms["ce_loss"].sum() / (1 if paper else len(ce) / self.batches)
        if settings.bn_term != "none":
            terms["bn_loss"] = self.bn_loss(moments)
            # A term of all images counts once for each class, so that λ weighs the same number of images.
            scale = len(self.shard.classes) if paper else 1
            total = total + settings.lambda_bn * scale * terms["bn_loss"].mean()
        return terms, total

    def feature_loss(self, features: Tensor, step: int) -> Tensor:
        """The feature term of each batch and class, (M, D) → (B, G), squared distances."""
        if self.settings.feature_term == "barycenter":
            return self._sum_by_cell((features - self.atoms).square().sum(1))
        cells = range(self.batches * len(self.shard.classes))
        return torch.stack([self._set_distance(features, c, step) for c in cells]).view(self.batches, -1)

    def _set_distance(self, features: Tensor, cell: int, step: int) -> Tensor:
        chosen = self.members[cell]
        label = int(self.shard.classes[cell % len(self.shard.classes)])
        generator = torch_generator(*self.seed_names, "real features", label, step)
        real = self.shard.real_features(label, self.settings.real_batch, generator).to(self.device)
        own, count = features[chosen], int(chosen.sum())
        match self.settings.feature_term:
            case "mmd_linear":
                return count * mmd_linear(own, real)
            case "mmd_rbf":
                # Without unit, it would lie below the BatchNorm term by the square of the features' scale.
                bandwidth = rbf_bandwidth(own, real)
                return count * bandwidth * mmd_rbf(own, real, bandwidth=bandwidth)
            case "sliced_wasserstein":
                # One direction sees 1/D of a squared distance; D makes the scale that of the others.
                directions = random_directions(own.shape[1], self.settings.directions, generator)
                distance = sliced_wasserstein(own, real, directions=directions)
                return count * features.shape[1] * distance
        raise AssertionError(self.settings.feature_term)

    def bn_loss(self, moments: dict[str, Moments]) -> Tensor:
        """The BatchNorm term of each class (G,), or (1,) where it is of all images, summed over batches."""
        # All layers at once: their statistics are small, and a GPU's time would go into starting on each.
        own = [torch.cat(part, 1) for part in zip(*(moments[n] for n in self.layers), strict=True)]
        squares = (torch.stack(group_moments((own[0], own[1]), self.bn_weights)) - self.targets).square()
        layers = torch.stack([layer.sum(-1) for layer in squares.split(self.channels, -1)], -1)
        if self.settings.loss_form == "released":
            layers = (layers + 1e-12).sqrt()
        layers = layers.sum(0)  # mean and variance
        loss = layers[:, 0] * self.settings.first_bn_multiplier + layers[:, 1:].sum(1)
        return loss.view(self.batches, -1).sum(0)

    def _sum_by_cell(self, values: Tensor) -> Tensor:
        # Neither scattered additions, which are not reproducible on a GPU, nor a product with the members,
        # in which one value that is not finite spoils every sum.
        return torch.where(self.members, values, 0).sum(1).view(self.batches, -1)


def _check_finite(curves: dict[str, list[Tensor]], first: int, shard: Shard) -> None:
    """Raise at the earliest loss from step `first` on that is not finite; later ones follow from it."""
    faults = []
    for name, curve in curves.items():
        values = torch.stack(curve[first:]).cpu()
        for row, column in (~values.isfinite()).nonzero()[:1].tolist():
            whole = values.shape[1] == 1 and len(shard.classes) > 1
            owner = "all classes" if whole else f"class {int(shard.classes[column])}"
            faults.append(
                (row, f"{name} of {owner} is {values[row, column]:g} at iteration {first + row + 1}")
            )
    if faults:
        _, told = min(faults, key=lambda fault: fault[0])
        raise UserError(f"{told}; lower learning_rate or lambda_bn")
