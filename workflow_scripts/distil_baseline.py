"""Distil with a baseline: DM (mean features of random networks) or DC (gradients of networks in training)."""

import torch

from wmdd_core.artifacts import write_tensors
from wmdd_core.augmentation import normalise
from wmdd_core.baselines import distil_dc, distil_dm, noise_images
from wmdd_core.models import build_model
from workflow_scripts.job import Job, run
from workflow_scripts.pretrain_teacher import network_of
from workflow_scripts.real_images import normalisation, open_images
from workflow_scripts.select_images import check_class_sizes, draw_random


def main(job: Job) -> None:
    settings = dict(job.settings)
    kind, seed, network = settings.pop("kind"), settings.pop("seed"), settings.pop("network")
    settings["strategy"] = settings.pop("augmentation")
    dataset, ipc, device = job.wildcards["dataset"], int(job.wildcards["ipc"]), job.device
    description = job.description()
    classes = len(description["classes"])
    mean, std = normalisation(description)
    store = open_images(job, description, "train")
    rows = {c: torch.from_numpy((store.labels == c).nonzero()[0]) for c in range(classes)}
    labels, index = torch.arange(classes).repeat_interleave(ipc), torch.arange(ipc).repeat(classes)

    def real(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = rows[c][torch.randperm(len(rows[c]), generator=generator)[:count]]
        return normalise(store.read(chosen.numpy()).to(device), mean, std)

    def build_network(network_seed: int) -> torch.nn.Module:
        return build_model(**network_of(network, description), seed=network_seed).to(device)

    match kind:
        case "dm":
            check_class_sizes(description, dataset, ipc)
            initial, distil = draw_random(store, labels, index, seed, dataset, mean, std), distil_dm
        case "dc":
            initial, distil = noise_images(len(labels), description["resolution"], (seed, dataset)), distil_dc
        case _:
            raise AssertionError(kind)
    inputs = [description["header"]]
    progress = job.progress(inputs)
    images, losses = distil(
        real, initial.to(device), labels, build_network, settings, (seed, dataset, kind), progress
    )
    tensors = {
        "images": images,
        "labels": labels,
        "index": index,
        "weights": torch.full((len(labels),), 1 / ipc, dtype=torch.float64),
        "feature_loss": losses.reshape(len(losses), -1),
    }
    write_tensors(job.output["shard"], tensors, job.header(inputs))
    progress.finish()


if __name__ == "__main__":
    run(main)
