"""What several scripts do with a dataset's images, its description, and networks trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from wmdd_core.artifacts import read_tensors
from wmdd_core.augmentation import normalise
from wmdd_core.data import ImageStore
from wmdd_core.errors import UserError
from wmdd_core.models import Classifier, build_model, load_weights
from wmdd_core.seeding import torch_generator
from wmdd_core.sources import open_described
from wmdd_core.training import Batch, FileCrops, Schedule, file_batches, outlive_stops, real_batches
from workflow_scripts.job import Job

IMAGES_PER_PASS = 64  # fits a CPU's caches; a GPU waits for decoding, and larger passes only take memory


def open_images(job: Job, description: dict, split: str) -> ImageStore:
    """The images of a split, sorted by class: from the decoded file among the inputs, or its own."""
    path = job.input.get(split)
    if path:
        return ImageStore.from_array(path, labels_of(description, split))
    source = open_described(description, split, job.input["description"])
    return ImageStore.from_source(source, description["resolution"])


def labels_of(description: dict, split: str) -> np.ndarray:
    """Class indices (N,) of a split, in the order of its images."""
    counts = description[split]["per_class"]
    return np.repeat(np.arange(len(counts)), counts)


def resident(store: ImageStore, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images, uint8 (N, 3, R, R), and labels (N,) on `device`."""
    images = store.read(slice(None))
    return images.to(device), torch.as_tensor(store.labels).to(device)


def normalisation(description: dict) -> tuple[Tensor, Tensor]:
    """Channel means and deviations in 0..1 units, float32 (3,)."""
    return torch.tensor(description["mean"]), torch.tensor(description["std"])


def check_class_sizes(description: dict, dataset: str, ipc: int) -> None:
    """Raise `UserError` for a class with fewer than `ipc` training images."""
    for name, count in zip(description["classes"], description["train"]["per_class"], strict=True):
        if count < ipc:
            raise UserError(
                f"class {name!r} of {dataset} has {count} training images, fewer than ipc {ipc}; lower ipc"
            )


def random_rows(store: ImageStore, c: int, seed: int, dataset: str) -> Tensor:
    """All images of class `c` in a random order: a prefix of it is a random selection of any size."""
    rows = torch.from_numpy(np.flatnonzero(store.labels == c))
    return rows[torch.randperm(len(rows), generator=torch_generator(seed, dataset, "select", c))]


def draw_random(
    store: ImageStore, labels: Tensor, index: Tensor, seed: int, dataset: str, mean: Tensor, std: Tensor
) -> Tensor:
    """Normalised real images (M, 3, R, R) for classes `labels` (M,) and numbers `index` (M,) within them."""
    orders = {c: random_rows(store, c, seed, dataset) for c in labels.unique().tolist()}
    chosen = [orders[c][i] for c, i in zip(labels.tolist(), index.tolist(), strict=True)]
    return normalise(store.read(torch.stack(chosen).numpy()), mean, std)


def training_batches(
    job: Job, description: dict, names: tuple, settings: dict
) -> Callable[[int], Iterator[Batch]]:
    """Epochs of augmented training images: from memory where they are decoded, else from files.

    `settings` has `batch_size` and `crop_scale_min`; whether to flip is a setting of the job.
    """
    (mean, std), device = normalisation(description), job.device
    crops = {"crop_scale_min": settings["crop_scale_min"], "flip": job.settings["flip"]}
    if job.input.get("train"):
        images, labels = resident(open_images(job, description, "train"), device)
        return real_batches(images, labels, settings["batch_size"], mean, std, names, **crops)
    leave_cores_to_decoding(device)
    source = open_described(description, "train", job.input["description"])
    files = FileCrops(source, description["resolution"], names, **crops)
    return file_batches(files, settings["batch_size"], mean, std, workers=job.threads, device=device)


def leave_cores_to_decoding(device: torch.device) -> None:
    """One thread for a network on a CPU: how many processes decode beside it must not change its rounding."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def in_order(
    store: ImageStore, description: dict, device: torch.device, start: int, workers: int = 1
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position, normalised images, labels) from image `start` on, a pass at a time.

    More than one worker are processes that read ahead, in order, while the network is at work.
    """
    (mean, std), size = normalisation(description), IMAGES_PER_PASS
    passes = [range(p, min(p + size, len(store))) for p in range(start, len(store), size)]
    images_of_passes = torch.utils.data.DataLoader(
        store,
        batch_size=None,
        sampler=passes,
        num_workers=workers if workers > 1 else 0,
        worker_init_fn=outlive_stops,
        pin_memory=device.type == "cuda",
    )
    for chosen, images in zip(passes, images_of_passes, strict=True):
        images = images.to(device, non_blocking=True)
        yield chosen.start, normalise(images, mean, std), torch.as_tensor(store.labels[chosen])


def load_teacher(path: str, device: torch.device) -> tuple[Classifier, dict]:
    """A teacher and the header of its checkpoint; the header says how to build it."""
    weights, header = read_tensors(path)
    model = build_model(**header["network"], seed=0)
    load_weights(model, weights, path)
    return model.to(device), header


def network_of(settings: dict, description: dict) -> dict:
    """What `build_model` needs to build this network, but for the seed."""
    shape = {k: settings[k] for k in ("architecture", "width", "depth", "norm") if k in settings}
    return {**shape, "classes": len(description["classes"]), "resolution": description["resolution"]}


def schedule_of(settings: Mapping, decay_matrices_only: bool = False) -> Schedule:
    """The part of the settings that says how to optimise."""
    keys = ("epochs", "optimizer", "learning_rate", "momentum", "weight_decay", "smoothing")
    given = {k: settings[k] for k in keys if k in settings}
    return Schedule(**given, decay_matrices_only=decay_matrices_only)
