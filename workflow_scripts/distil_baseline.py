"""Distil with a baseline: DM (mean features of random networks) or DC (gradients of networks in training)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from wmdd_core.artifacts import write_tensors
from wmdd_core.augmentation import normalise, quantise
from wmdd_core.baselines import DcSettings, DmSettings, distil_dc, distil_dm, noise_images
from wmdd_core.data import ImageStore
from wmdd_core.models import build_model
from wmdd_core.progress import Progress
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import (
    check_class_sizes,
    draw_random,
    network_of,
    normalisation,
    open_images,
)


def distil(
    kind: str,
    settings: Mapping,
    description: Mapping,
    store: ImageStore,
    ipc: int,
    network: Mapping,
    names: tuple,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """A shard's tensors, of all classes in order: uint8 images (M, 3, R, R), labels, losses and so on.

    `network` is what `build_model` needs but for the seed; `names` are (seed, dataset). The real images are
    held in memory, since each iteration reads a batch of every class.
    """
    store = store.in_memory()
    classes, (mean, std) = len(description["classes"]), normalisation(description)
    rows = {c: np.flatnonzero(store.labels == c) for c in range(classes)}
    labels, index = torch.arange(classes).repeat_interleave(ipc), torch.arange(ipc).repeat(classes)

    def real(c: int, count: int, generator: torch.Generator) -> Tensor:
        chosen = rows[c][torch.randperm(len(rows[c]), generator=generator)[:count].numpy()]
        return normalise(store.read(chosen).to(device), mean, std)

    def build_network(seed: int) -> torch.nn.Module:
        return build_model(**network, seed=seed).to(device)

    match kind:
        case "dm":
            check_class_sizes(description, names[1], ipc)
            initial = draw_random(store, labels, index, *names, mean, std)
            loop, chosen = distil_dm, DmSettings(**settings)
        case "dc":
            initial = noise_images(len(labels), description["resolution"], names)
            loop, chosen = distil_dc, DcSettings(**settings)
        case _:
            raise AssertionError(kind)
    images, losses = loop(real, initial.to(device), labels, build_network, chosen, (*names, kind), progress)
    return {
        "images": quantise(images, mean, std),
        "labels": labels,
        "index": index,
        "weights": torch.full((len(labels),), 1 / ipc, dtype=torch.float64),
        "feature_loss": losses.reshape(len(losses), -1),
    }


def main(job: Job) -> None:
    settings = dict(job.settings)
    kind, seed, network = settings.pop("kind"), settings.pop("seed"), settings.pop("network")
    description, ipc = job.description(), int(job.wildcards["ipc"])
    store, names = open_images(job, description, "train"), (seed, job.wildcards["dataset"])
    inputs = [description["header"]]
    device, progress = job.device, job.progress(inputs)
    network = network_of(network, description)
    tensors = distil(kind, settings, description, store, ipc, network, names, device, progress)
    write_tensors(job.output["shard"], tensors, job.header(inputs))
    progress.finish()


if __name__ == "__main__":
    run(main)
