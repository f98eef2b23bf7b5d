"""Recover a shard of distilled images: match barycenters and per-class BatchNorm statistics (Eq. 15)."""

from collections.abc import Mapping

import numpy as np
import torch

from wmdd_core.artifacts import read_arrays, read_json, read_tensors, write_tensors
from wmdd_core.augmentation import quantise
from wmdd_core.batchnorm import LayerStatistics
from wmdd_core.device import precision
from wmdd_core.models import Classifier, freeze
from wmdd_core.progress import Progress
from wmdd_core.recovery import Recovered, RecoverySettings, Shard, recover_images
from wmdd_core.sharding import shard_members
from wmdd_core.terms import MEASURED_BN_TERMS, SET_TERMS
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import (
    check_class_sizes,
    draw_random,
    load_teacher,
    normalisation,
    open_images,
)


def read_barycenters(job: Job, classes: list[int]) -> tuple[dict[int, tuple], list[dict]]:
    """Class → (support (M, D), weights (M,)) from the blocks among the inputs, and their headers."""
    atoms, headers = {}, []
    for path in job.input["barycenters"]:
        arrays, header = read_arrays(path)
        headers.append(header)
        for c, support, weights in zip(arrays["classes"], arrays["support"], arrays["weights"], strict=True):
            atoms[int(c)] = support, weights
    return {c: atoms[c] for c in classes}, headers


def read_statistics(path: str) -> tuple[dict[str, LayerStatistics], dict]:
    """The real images' BatchNorm statistics by layer, and the header of their file."""
    tensors, header = read_tensors(path)
    parts = ("mean", "var", "global_mean", "global_var")
    return {n: LayerStatistics(*(tensors[f"{n}.{p}"] for p in parts)) for n in header["layers"]}, header


def build_shard(
    job: Job, settings: Mapping, classes: list[int], numbers: list[int], batch_layout: str
) -> tuple[Shard, list[dict]]:
    """The shard of these classes and image numbers, and the headers of what it is made from."""
    headers, statistics = [], {}
    if settings["bn_term"] in MEASURED_BN_TERMS:
        statistics, header = read_statistics(job.input["statistics"])
        headers.append(header)
    pairs = torch.tensor([(row, i) for row in range(len(classes)) for i in numbers])
    atoms, real_features = None, None
    weights = torch.ones(len(pairs), dtype=torch.float64)
    if settings["feature_term"] == "barycenter":
        barycenters, found = read_barycenters(job, classes)
        headers += found
        atoms = torch.from_numpy(np.concatenate([barycenters[c][0][numbers] for c in classes]))
        weights = torch.from_numpy(np.concatenate([barycenters[c][1][numbers] for c in classes]))
    if settings["feature_term"] in SET_TERMS:
        stored = read_json(job.input["index"])
        headers.append(stored["header"])
        offsets = stored["offsets"]
        features = job.mapped("features")

        def real_features(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
            size = offsets[c + 1] - offsets[c]
            chosen = torch.randperm(size, generator=generator)[:count].sort().values
            return torch.from_numpy(np.array(features[offsets[c] + chosen.numpy()]))

    group, index = pairs.unbind(1)
    batch = index - numbers[0] if batch_layout == "one_per_class" else None
    return Shard(
        torch.tensor(classes), group, index, weights, statistics, atoms, real_features, batch
    ), headers


def recover(
    job: Job,
    description: dict,
    teacher: Classifier,
    shard: Shard,
    settings: dict,
    names: tuple[int | str, str],
    progress: Progress,
) -> Recovered:
    """Recover the images of `shard`. `settings`: `RecoverySettings` and `start`; `names`: (seed, dataset)."""
    mean, std = normalisation(description)
    initial = None
    if settings["start"] == "real":
        store = open_images(job, description, "train")
        initial = draw_random(store, shard.classes[shard.group], shard.index, *names, mean, std)
    return recover_images(
        freeze(teacher),
        shard,
        RecoverySettings(**{k: v for k, v in settings.items() if k != "start"}),
        resolution=description["resolution"],
        mean=mean,
        std=std,
        seed_names=names,
        device=job.device,
        initial=initial,
        precision=precision(job.settings, job.device),
        progress=progress,
    )


def main(job: Job) -> None:
    settings = dict(job.settings)
    seed, sharding = settings.pop("seed"), settings.pop("sharding")
    settings.pop("precision", None)  # `precision` reads it from the job's
    description = job.description()
    teacher, teacher_header = load_teacher(job.input["teacher"], job.device)
    names, ipc = (seed, job.wildcards["dataset"]), int(job.wildcards["ipc"])
    if settings["start"] == "real":
        check_class_sizes(description, job.wildcards["dataset"], ipc)
    members = shard_members(ipc=ipc, shard=int(job.wildcards["shard"]), **sharding)
    shard, headers = build_shard(job, settings, *members, sharding["batch_layout"])
    inputs = [description["header"], teacher_header, *headers]
    progress = job.progress(inputs)
    recovered = recover(job, description, teacher, shard, settings, names, progress)
    tensors = {
        "images": quantise(recovered.images, *normalisation(description)),
        "labels": shard.classes[shard.group],
        "index": shard.index,
        "weights": shard.weights,
        **recovered.losses,
    }
    write_tensors(job.output["shard"], tensors, job.header(inputs))
    progress.finish()


if __name__ == "__main__":
    run(main)
