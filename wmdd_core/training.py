"""Training and testing of teachers and students: one loop for every kind of target."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wmdd_core.augmentation import batch_viewer, draw_crop, draw_views, normalise
from wmdd_core.device import images_per_pass
from wmdd_core.errors import UserError
from wmdd_core.graphs import replayed
from wmdd_core.memory import small_blocks_apart
from wmdd_core.optimizers import SGD, Adam, AdamW
from wmdd_core.progress import STOPS, Progress
from wmdd_core.seeding import torch_generator
from wmdd_core.sources import ImageSource

Batch = tuple[Tensor, ...]
"""Network input first; whatever the loss needs after it."""


@dataclass(frozen=True)
class Schedule:
    """How to optimise: `sgd` (with Nesterov-free momentum), `adam` or `adamw`; cosine decay per epoch.

    `smoothing` stretches the cosine: lr_e = lr · ½(1 + cos(π e / (smoothing · epochs))), 1 ends at 0.
    Weight decay applies to weights of more than one dimension when `decay_matrices_only`.
    """

    epochs: int
    optimizer: str
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_matrices_only: bool = False
    smoothing: float = 1.0

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate in `epoch`, counted from 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / (self.smoothing * self.epochs)))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of `model`'s parameters."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.decay_matrices_only:
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
        else:
            groups = [{"params": parameters, "weight_decay": self.weight_decay}]
        match self.optimizer:
            case "sgd":
                return SGD(groups, lr=self.learning_rate, momentum=self.momentum)
            case "adam":
                return Adam(groups, lr=self.learning_rate, fused=True)
            case "adamw":
                return AdamW(groups, lr=self.learning_rate, fused=True)
        raise UserError(f"unknown optimizer {self.optimizer!r}; known are sgd, adam, adamw")


@dataclass
class Curve:
    """What happened in each epoch: mean training loss, and accuracy where it was measured."""

    train_loss: list[float] = field(default_factory=list)
    top1: list[float | None] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[int, float, float | None]]:
        """(epoch from 1, training loss, top-1 or None), an epoch each."""
        return zip(range(1, len(self.train_loss) + 1), self.train_loss, self.top1, strict=True)


@small_blocks_apart()
def fit(
    model: nn.Module,
    schedule: Schedule,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[..., Tensor],
    *,
    test: Callable[[], float] | None = None,
    test_every: int = 0,
    precision: AbstractContextManager | None = None,
    progress: Progress | None = None,
) -> Curve:
    """Train `model` in place for `schedule.epochs` epochs; the last epoch is the result.

    `batches(epoch)` yields (inputs, *targets), drawn from the epoch's number alone so that a resumed
    run sees what an uninterrupted one sees; `loss(logits, *targets)` gives a scalar. `test()` is
    called every `test_every` epochs (0: never) and only recorded, never used to choose anything.

    In a process group every process trains its part of each batch (`part_of_batch`) and gradients are
    averaged over the images of the whole batch: batch size and learning rate stay as configured, and the
    result is that of one process but for rounding. Only a last batch of fewer images than processes is
    left out (`trainable`), which makes one step less in an epoch than one process would take. The first
    alone has `progress`.
    """
    optimizer = schedule.build_optimizer(model)
    curve, first = Curve(), 0
    if state := _from_first(progress.resume() if progress else None):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        curve, first = Curve(**state["curve"]), len(state["curve"]["train_loss"])
    parallel = dist.is_initialized()
    network = DistributedDataParallel(model) if parallel else model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def differentiate(inputs: Tensor, *targets: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        optimizer.zero_grad(set_to_none=True)
        with precision or nullcontext():
            logits = network(inputs)
        batch_loss = loss(logits.float(), *targets)
        (batch_loss * _share_of_batch(inputs) if parallel else batch_loss).backward()
        return batch_loss.detach(), [p.grad for p in parameters]

    if not parallel:
        differentiate = replayed(differentiate, parameters[0].device)
    for epoch in range(first, schedule.epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(epoch)
        total, count = 0.0, 0
        for inputs, *targets in batches(epoch):
            batch_loss, gradients = differentiate(inputs, *targets)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            total, count = total + batch_loss * len(inputs), count + len(inputs)
        if parallel:
            total, count = _summed(torch.stack([total, total.new_tensor(count)]))
        mean = float(total) / int(count)
        if not math.isfinite(mean):
            raise UserError(f"the training loss is {mean} in epoch {epoch + 1}; lower the learning rate")
        due = (
            test is not None and test_every and (epoch + 1) % test_every == 0 and epoch + 1 < schedule.epochs
        )
        curve.train_loss.append(mean)
        curve.top1.append(test() if due else None)
        if progress:
            progress.step(
                epoch,
                schedule.epochs,
                lambda: {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "curve": vars(curve),
                },
                lambda: {"loss": curve.train_loss[-1]},
            )
    return curve


def part_of_batch(batch: Tensor | list) -> Tensor | list:
    """What this process trains on of a batch: all of it, or every n-th image of n processes."""
    return batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch


def trainable(size: int, total: int) -> bool:
    """Whether a batch of `size` of `total` images is trained on.

    BatchNorm has no variance in a batch of one, and no process may go without an image: with three or more
    processes an epoch may leave out a last batch that one process would train on, and be a step shorter.
    """
    return total == 1 or size >= max(2, dist.get_world_size() if dist.is_initialized() else 1)


def _share_of_batch(inputs: Tensor) -> Tensor:
    """Weight of this process's mean loss where losses are averaged over processes of unequal parts."""
    mine = torch.tensor(float(len(inputs)), device=inputs.device)
    return mine * dist.get_world_size() / _summed(mine.clone())


def _summed(values: Tensor) -> Tensor:
    """`values`, in place, added up over the processes."""
    dist.all_reduce(values)
    return values


def _from_first(state: dict | None) -> dict | None:
    """The first process's `state`, in every process."""
    shared = [state]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def real_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    mean: Tensor,
    std: Tensor,
    seed_names: tuple,
    *,
    crop_scale_min: float,
    flip: bool,
) -> Callable[[int], Iterator[Batch]]:
    """Batches of resident real images, uint8 (N, 3, R, R), freshly cropped and flipped in each epoch.

    On a GPU a batch overwrites the images of the one before.
    """
    view, device = batch_viewer(images, mean, std, cutmix=False), images.device

    def batches(epoch: int) -> Iterator[Batch]:
        generator = torch_generator(*seed_names, "epoch", epoch)
        order = torch.randperm(len(images), generator=generator).to(device)
        views = draw_views(len(images), images.shape[-1], generator, crop_scale_min=crop_scale_min, flip=flip)
        views = views.to(device)
        for chosen in order.split(batch_size):
            if trainable(len(chosen), len(images)):
                mine = part_of_batch(chosen)
                yield view(mine, views), labels[mine]

    return batches


def outlive_stops(_worker: int) -> None:
    """For processes that read for a loop: a signal reaches all of a job, and the loop must end its step."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class FileCrops(torch.utils.data.Dataset):
    """Training images as files: each is decoded, cropped at random from its full size, resized and mirrored.

    Item (epoch, i) depends on the seed's names, the epoch and i alone, whichever worker makes it.
    `source` has `image(i)` (a PIL image), `labels` and a length.
    """

    def __init__(
        self, source: ImageSource, resolution: int, seed_names: tuple, crop_scale_min: float, flip: bool
    ) -> None:
        self.source, self.resolution, self.seed_names = source, resolution, seed_names
        self.crop_scale_min, self.flip = crop_scale_min, flip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        epoch, i = item
        generator = torch_generator(*self.seed_names, "crop", epoch, i)
        image = self.source.image(i)
        top, left, height, width = draw_crop(image.height, image.width, self.crop_scale_min, generator)
        # Cut first, as torchvision does: given a box to resize, Pillow's filter reaches beyond it.
        cut = image.crop((left, top, left + width, top + height))
        view = cut.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return pixels, int(self.source.labels[i])


def file_batches(
    crops: FileCrops, batch_size: int, mean: Tensor, std: Tensor, *, workers: int, device: torch.device
) -> Callable[[int], Iterator[Batch]]:
    """As `real_batches`, decoding in `workers` processes while the network trains (0 or 1: in this one)."""

    def batches(epoch: int) -> Iterator[Batch]:
        order = torch.randperm(len(crops), generator=torch_generator(*crops.seed_names, "epoch", epoch))
        chosen = [[(epoch, i) for i in part.tolist()] for part in order.split(batch_size)]
        loader = torch.utils.data.DataLoader(
            crops,
            batch_sampler=[part_of_batch(part) for part in chosen if trainable(len(part), len(crops))],
            num_workers=workers if workers > 1 else 0,
            worker_init_fn=outlive_stops,
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            yield normalise(images.to(device, non_blocking=True), mean, std), labels.to(device)

    return batches


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: AbstractContextManager | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent over (normalised images, labels) batches, in evaluation mode."""
    training = model.training
    model.eval()
    hits, count = 0, 0
    for images, labels in batches:
        with precision or nullcontext():
            logits = model(images)
        ranked = logits.float().topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        hits = hits + torch.stack([ranked[:, 0].sum(), ranked.any(1).sum()])
        count += len(labels)
    model.train(training)
    top1, top5 = (100 * hits.double() / count).tolist()
    return {"top1": top1, "top5": top5, "count": count}


def test_batches(
    images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised passes of uint8 images (N, 3, R, R) with their labels, unaugmented and in order."""
    size = images_per_pass(device)
    for part, own in zip(images.split(size), labels.split(size), strict=True):
        yield normalise(part.to(device), mean, std), own.to(device)


test_batches.__test__ = False  # a name that pytest would collect


def hard_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy against class indices (N,)."""
    return F.cross_entropy(logits, labels)
