"""The plain way to do each stage's work, as the field's public code does it; never part of the workflow.

Float32, contiguous memory, torchvision's transforms built in each step, a pass over the files for features
and another for BatchNorm statistics, a file for each batch of soft labels, images decoded in every epoch,
the student tested after every tenth epoch in small batches. Mathematics and results are `wmdd_core`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.transforms import functional

RATIO = (3 / 4, 4 / 3)
TEST_BATCH = 25


class Files(Dataset):
    """Images as files, decoded each time they are asked for; items are (normalised image, label)."""

    def __init__(self, files: Sequence[str], labels: Sequence[int], mean: Tensor, std: Tensor) -> None:
        self.files, self.labels = files, labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.files[i]) as image:
            return self.transform(image.convert("RGB")), self.labels[i]


def batchnorms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers in the order of definition."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


# ---- features -----------------------------------------------------------------------------------


@torch.no_grad()
def features_and_statistics(
    model: nn.Module, files: Files, batch_size: int, device: torch.device
) -> tuple[np.ndarray, list[tuple[Tensor, Tensor]]]:
    """Features (N, D) in one pass; in another, class by class, a layer's mean and variance (classes, C)."""
    parts = [
        model.features(images.to(device)).cpu() for images, _ in DataLoader(files, batch_size=batch_size)
    ]
    layers, seen = batchnorms(model), []
    measure = lambda _m, inputs: seen.append(torch.var_mean(inputs[0], (0, 2, 3), correction=0))  # noqa: E731
    hooks = [m.register_forward_pre_hook(measure) for m in layers]
    labels = np.asarray(files.labels)
    by_class = []
    for c in np.unique(labels):
        sums = [[0, 0] for _ in layers]
        count = 0
        for images, _ in DataLoader(Subset(files, np.flatnonzero(labels == c)), batch_size=batch_size):
            seen.clear()
            model.features(images.to(device))
            for total, (var, mean) in zip(sums, seen, strict=True):
                total[0] = total[0] + len(images) * mean.double()
                total[1] = total[1] + len(images) * (var.double() + mean.double() ** 2)
            count += len(images)
        by_class.append([(s / count, q / count - (s / count) ** 2) for s, q in sums])
    for hook in hooks:
        hook.remove()
    statistics = [
        tuple(torch.stack(v).cpu() for v in zip(*layer, strict=True)) for layer in zip(*by_class, strict=True)
    ]
    return torch.cat(parts).numpy(), statistics


# ---- recover ------------------------------------------------------------------------------------


def recover(
    model: nn.Module,
    images: Tensor,
    atoms: Tensor,
    targets: Sequence[tuple[Tensor, Tensor]],
    mean: Tensor,
    std: Tensor,
    *,
    iterations: int,
    learning_rate: float,
    lambda_bn: float,
    crop_scale_min: float,
    flip: bool,
    roll: int,
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Eq. 15, uniform weights: images (M, 3, R, R), grouped by class in equal numbers; targets (classes, C).

    One view for the whole batch in each step. Returns the images and the two loss terms of each step.
    """
    images = images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=learning_rate, betas=(0.5, 0.9))
    layers, seen = batchnorms(model), []
    hooks = [m.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])) for m in layers]
    resolution, classes, losses = images.shape[-1], len(targets[0][0]), []
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        ratio = RATIO if crop_scale_min < 1 else (1.0, 1.0)
        view = transforms.Compose(
            [
                transforms.RandomResizedCrop(resolution, scale=(crop_scale_min, 1), ratio=ratio),
                transforms.RandomHorizontalFlip(0.5 if flip else 0),
            ]
        )(images)
        shift = torch.randint(-roll, roll + 1, (2,)).tolist()
        seen.clear()
        features = model.features(torch.roll(view, shift, (2, 3)))
        feature_loss = (features - atoms).square().sum()
        bn_loss = 0
        for x, (wanted_mean, wanted_var) in zip(seen, targets, strict=True):
            grouped = x.view(classes, -1, *x.shape[1:])
            own_mean = grouped.mean((1, 3, 4))
            own_var = grouped.var((1, 3, 4), correction=0)
            bn_loss = (
                bn_loss + (own_mean - wanted_mean).square().sum() + (own_var - wanted_var).square().sum()
            )
        # λ times the mean over classes, times their number: the sum of Eq. 15.
        loss = feature_loss + lambda_bn * bn_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for channel in range(3):
            low, high = ((bound - float(mean[channel])) / float(std[channel]) for bound in (0, 1))
            images.data[:, channel] = torch.clamp(images.data[:, channel], low, high)
        losses.append((feature_loss.item(), bn_loss.item()))
    for hook in hooks:
        hook.remove()
    return images.detach().clone(), losses


# ---- relabel ------------------------------------------------------------------------------------


def load_view(file: str, crop: tuple, flip: bool, resolution: int, mean: Tensor, std: Tensor) -> Tensor:
    """Decode an image and build its transforms for one crop (top, left, height, width)."""
    with Image.open(file) as image:
        image = functional.resized_crop(image.convert("RGB"), *crop, [resolution, resolution])
    if flip:
        image = functional.hflip(image)
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])(image)


def cutmix_box(resolution: int, share: float) -> tuple[int, int, int, int]:
    """A box of the area 1 − share, clipped: top, left, bottom, right."""
    side = int(resolution * math.sqrt(1 - share))
    row, column = (int(v) for v in torch.randint(resolution, (2,)))
    return (
        max(0, row - side // 2),
        max(0, column - side // 2),
        min(resolution, row + side // 2),
        min(resolution, column + side // 2),
    )


def mix(views: Tensor, partners: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """CutMix with one box for the whole batch."""
    top, left, bottom, right = box
    views[:, :, top:bottom, left:right] = views[partners, :, top:bottom, left:right]
    return views


@torch.no_grad()
def relabel(
    teacher: nn.Module,
    files: Sequence[str],
    folder: Path,
    batches: Callable[[int], Sequence[Tensor]],
    resolution: int,
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    *,
    epochs: int,
    crop_scale_min: float,
    flip: bool,
    cutmix: bool,
) -> None:
    """One file a batch in `folder`: what the view was, and the teacher's logits in float16."""
    for epoch in range(epochs):
        (folder / f"epoch_{epoch}").mkdir(parents=True, exist_ok=True)
        for number, chosen in enumerate(batches(epoch)):
            whole = torch.zeros(3, resolution, resolution)
            ratio = RATIO if crop_scale_min < 1 else (1.0, 1.0)
            crops = [
                transforms.RandomResizedCrop.get_params(whole, (crop_scale_min, 1.0), ratio) for _ in chosen
            ]
            flips = [bool(flip and torch.rand(()) < 0.5) for _ in chosen]
            views = [
                load_view(files[i], crop, mirrored, resolution, mean, std)
                for i, crop, mirrored in zip(chosen.tolist(), crops, flips, strict=True)
            ]
            inputs = torch.stack(views)
            partners, box = torch.arange(len(chosen)), (0, 0, 0, 0)
            if cutmix:
                partners = torch.randperm(len(chosen))
                box = cutmix_box(resolution, float(np.random.default_rng(epoch).beta(1, 1)))
                inputs = mix(inputs, partners, box)
            logits = teacher(inputs.to(device)).half().cpu()
            torch.save(
                [chosen, crops, flips, partners, box, logits], folder / f"epoch_{epoch}/batch_{number}.pt"
            )


# ---- evaluate -----------------------------------------------------------------------------------


def epochs_tested(epochs: int) -> list[int]:
    """The epochs after which the released code tests: every tenth from the first on, and the last.

    >>> epochs_tested(25)
    [0, 10, 20, 24]
    """
    return sorted({*range(0, epochs, 10), epochs - 1})


def evaluate(
    student: nn.Module,
    files: Sequence[str],
    folder: Path,
    test: Files,
    resolution: int,
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    temperature: float,
) -> tuple[Tensor, list[float], float]:
    """Train on `relabel`'s files and test now and then: the last test's logits, each epoch's loss, and the
    seconds of all tests."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
    )
    curve, testing = [], 0.0
    for epoch in range(epochs):
        student.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        total = count = 0
        for number in range(len(list((folder / f"epoch_{epoch}").iterdir()))):
            path = folder / f"epoch_{epoch}/batch_{number}.pt"
            chosen, crops, flips, partners, box, logits = torch.load(path, weights_only=False)
            views = [
                load_view(files[i], crop, mirrored, resolution, mean, std)
                for i, crop, mirrored in zip(chosen.tolist(), crops, flips, strict=True)
            ]
            inputs = mix(torch.stack(views), partners, box).to(device)
            output = F.log_softmax(student(inputs) / temperature, 1)
            wanted = F.softmax(logits.float().to(device) / temperature, 1)
            loss = F.kl_div(output, wanted, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, count = total + loss.item() * len(inputs), count + len(inputs)
        curve.append(total / count)
        if epoch not in epochs_tested(epochs):
            continue
        start = time.perf_counter()
        student.eval()
        with torch.no_grad():
            tested = [
                student(images.to(device)).cpu() for images, _ in DataLoader(test, batch_size=TEST_BATCH)
            ]
        testing += time.perf_counter() - start
    return torch.cat(tested), curve, testing
