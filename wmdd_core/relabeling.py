"""Soft labels (FKD): the teacher's logits on replayable views, and the student's loss on them.

Fast knowledge distillation labels each image once per epoch on one random view. A view is drawn
from (seed, epoch) and the number of images alone, so the student redraws exactly the views that
were labelled; batch size and order are free on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wmdd_core.augmentation import Views, batch_viewer, draw_views
from wmdd_core.errors import UserError
from wmdd_core.graphs import replayed
from wmdd_core.models import Classifier
from wmdd_core.progress import Progress
from wmdd_core.seeding import torch_generator

TEACHER_MODES = ("eval", "batch")

SAMPLED_VIEWS = 16
"""Views that labels are stored with, for a reader to tell whether it draws the same ones."""


@dataclass(frozen=True)
class ViewSettings:
    """What the views of a recipe look like; equal settings and seed give equal views."""

    seed: int
    crop_scale_min: float
    flip: bool
    cutmix: bool

    def views(self, epoch: int, count: int, resolution: int) -> Views:
        """The views of `count` images in `epoch`."""
        generator = torch_generator(self.seed, "label views", epoch)
        return draw_views(
            count,
            resolution,
            generator,
            crop_scale_min=self.crop_scale_min,
            flip=self.flip,
            cutmix=self.cutmix,
        )

    def sample(self, count: int, resolution: int) -> dict[str, list]:
        """The first views of the first epoch, as the fields of `Views`, to be stored with their labels."""
        return {n: v[:SAMPLED_VIEWS].tolist() for n, v in vars(self.views(0, count, resolution)).items()}

    def check(self, sample: Mapping[str, list], count: int, resolution: int, path: str) -> None:
        """Raise `UserError` unless `sample`, which lies in `path`, is drawn here too.

        PyTorch's generators may change between versions. Processors may round a side by a pixel unlike.
        """
        for name, drawn in self.sample(count, resolution).items():
            stored, pixels = np.array(sample[name], int), 1 if name in ("box", "patch") else 0
            if stored.shape != np.shape(drawn) or (abs(stored - np.array(drawn, int)) > pixels).any():
                raise UserError(
                    f"{path}: these labels are of other views than PyTorch {torch.__version__} draws"
                    f" ({name}); delete them and run snakemake again"
                )


@torch.no_grad()
def label_views(
    teacher: Classifier,
    images: Tensor,
    settings: ViewSettings,
    mean: Tensor,
    std: Tensor,
    labels: np.ndarray,
    *,
    teacher_mode: str = "eval",
    batch_size: int = 100,
    precision: AbstractContextManager | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill `labels` (epochs, M, classes) float16 with the teacher's logits on each epoch's views.

    `images` are uint8 (M, 3, R, R) on the teacher's device; `mean` and `std` (3,) are in 0..1 units; `labels`
    may be a memory map; `precision` is the context of forward passes, float32 if None.
    `teacher_mode`: "eval" normalises with the running statistics; "batch" with those of each batch,
    as SRe2L's CIFAR relabelling does, and then the labels depend on `batch_size`. Such batches are drawn
    anew in each epoch: `images` may be sorted by class, and a class or two have other statistics than all.

    Raises `UserError` for logits that float16 cannot hold, `labels` of another number of images, and an
    unknown `teacher_mode`.
    """
    if teacher_mode not in TEACHER_MODES:
        raise UserError(f"teacher_mode is {teacher_mode!r}; known are {', '.join(TEACHER_MODES)}")
    _check_labels(labels, len(images))
    teacher.eval()
    if teacher_mode == "batch":
        teacher.train()
        for module in teacher.modules():
            if hasattr(module, "track_running_stats"):
                module.momentum = 0.0  # look at the batch, leave the running statistics alone
    device = images.device
    view = batch_viewer(images, mean, std, cutmix=settings.cutmix)

    def label(inputs: Tensor) -> Tensor:
        with precision or nullcontext():
            return teacher(inputs).half()

    label = replayed(label, device)
    indices = torch.arange(len(images), device=device)
    first = state["epochs"] if progress and (state := progress.resume()) else 0
    for epoch in range(first, len(labels)):
        views = settings.views(epoch, len(images), images.shape[-1]).to(device)
        if teacher_mode == "batch":
            batches = shuffled(len(images), batch_size, (settings.seed, "label batches"), epoch, device)
        else:
            batches = indices.split(batch_size)
        for chosen in batches:
            labels[epoch, chosen.cpu().numpy()] = label(view(chosen, views)).cpu().numpy()
        if not np.isfinite(labels[epoch]).all():
            raise UserError(
                "the teacher's logits are not finite, or above 65,504, the most that float16 holds; train it"
                " with a lower learning_rate, or check the weights that it was loaded from"
            )
        if progress:
            progress.step(epoch, len(labels), lambda: {"epochs": epoch + 1}, dict)  # noqa: B023


def _check_labels(labels: np.ndarray, count: int) -> None:
    if labels.ndim != 3 or labels.shape[1] != count:
        raise UserError(f"labels have the shape {labels.shape}; expected (epochs, {count}, classes)")


def soft_label_batches(
    images: Tensor,
    weights: Tensor,
    labels: np.ndarray | Classifier,
    settings: ViewSettings,
    batch_size: int,
    mean: Tensor,
    std: Tensor,
    seed_names: tuple,
    precision: AbstractContextManager | None = None,
) -> Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor]]]:
    """Epochs of (views, teacher logits, weights) of distilled images, uint8 (M, 3, R, R), shuffled by seed.

    `weights` (M,) average 1; the views are those that `label_views` labelled. `labels` are its array, or the
    frozen teacher, which then labels each view as it comes: the same labels but for rounding, nothing stored.
    On a GPU a batch overwrites the views of the one before.

    Raises `UserError` for an array of another number of images.
    """
    if isinstance(labels, np.ndarray):
        _check_labels(labels, len(images))
    device = images.device
    view = batch_viewer(images, mean, std, cutmix=settings.cutmix)
    weights = weights.to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        views = settings.views(epoch, len(images), images.shape[-1]).to(device)
        stored = (
            torch.from_numpy(np.array(labels[epoch])).to(device) if isinstance(labels, np.ndarray) else None
        )
        for chosen in shuffled(len(images), batch_size, seed_names, epoch, device):
            inputs = view(chosen, views)
            if stored is not None:
                logits = stored[chosen]
            else:
                with torch.no_grad(), precision or nullcontext():
                    logits = labels(inputs).half()
            yield inputs, logits.float(), weights[chosen]

    return batches


def hard_label_batches(
    images: Tensor,
    weights: Tensor,
    labels: Tensor,
    settings: ViewSettings,
    batch_size: int,
    mean: Tensor,
    std: Tensor,
    seed_names: tuple,
) -> Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]]:
    """Epochs of (views, own class, pasted class, pasted share, weights): same views, classes as labels.

    On a GPU a batch overwrites the views of the one before.
    """
    device = images.device
    view = batch_viewer(images, mean, std, cutmix=settings.cutmix)
    labels, weights = labels.to(device), weights.to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        resolution = images.shape[-1]
        views = settings.views(epoch, len(images), resolution).to(device)
        for chosen in shuffled(len(images), batch_size, seed_names, epoch, device):
            mixed = views[chosen]
            share = mixed.patch[:, 2:].prod(1) / resolution**2
            yield view(chosen, views), labels[chosen], labels[mixed.partner], share, weights[chosen]

    return batches


def shuffled(
    count: int, batch_size: int, seed_names: tuple, epoch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """A random order of `count` indices for `epoch`, in batches; a last batch of one joins the one before."""
    order = torch.randperm(count, generator=torch_generator(*seed_names, "order", epoch))
    parts = list(order.to(device).split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:  # BatchNorm has no variance in a batch of one
        parts[-2:] = [torch.cat(parts[-2:])]
    return tuple(parts)


def soft_label_loss(temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """KL(teacher ‖ student) at `temperature`, weighted mean over images, without the factor T².

    The loss is (1/B) Σ_i w_i KL(softmax(t_i / T) ‖ softmax(s_i / T)).
    """

    def loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        log_student = F.log_softmax(student / temperature, 1)
        log_teacher = F.log_softmax(teacher / temperature, 1)
        divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
        return (weights * divergence).mean()

    return loss


def mixed_label_loss(student: Tensor, own: Tensor, pasted: Tensor, share: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of CutMix: (1 − share) · CE(own class) + share · CE(pasted class), weighted mean."""
    ce_own = F.cross_entropy(student, own, reduction="none")
    ce_pasted = F.cross_entropy(student, pasted, reduction="none")
    return (weights * ((1 - share) * ce_own + share * ce_pasted)).mean()
