"""Recover a shard of distilled images: match barycenters and per-class BatchNorm statistics (Eq. 15)."""

import numpy as np
import torch

from wmdd_core.artifacts import read_arrays, read_json, read_tensors, write_tensors
from wmdd_core.batchnorm import LayerStatistics
from wmdd_core.device import precision
from wmdd_core.errors import UserError
from wmdd_core.models import freeze
from wmdd_core.recovery import RecoverySettings, Shard, recover_images
from wmdd_core.sharding import shard_members
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import load_teacher, normalisation, open_images
from workflow_scripts.select_images import check_class_sizes, draw_random


def read_barycenters(job: Job, classes: list[int]) -> tuple[dict[int, tuple], list[dict]]:
    """Class → (support (M, D), weights (M,)) from the blocks among the inputs, and their headers."""
    atoms, headers = {}, []
    for path in job.input["barycenters"]:
        arrays, header = read_arrays(path)
        headers.append(header)
        for c, support, weights in zip(arrays["classes"], arrays["support"], arrays["weights"], strict=True):
            atoms[int(c)] = support, weights
    return {c: atoms[c] for c in classes}, headers


def build_shard(job: Job, classes: list[int], numbers: list[int], layout: str) -> tuple[Shard, list[dict]]:
    """The shard of these classes and image numbers, and the headers of what it is made from."""
    tensors, header = read_tensors(job.input["statistics"])
    headers = [header]
    statistics = {
        name: LayerStatistics(*(tensors[f"{name}.{p}"] for p in ("mean", "var", "global_mean", "global_var")))
        for name in header["layers"]
    }
    pairs = torch.tensor([(row, i) for row in range(len(classes)) for i in numbers])
    atoms, real_features = None, None
    weights = torch.ones(len(pairs), dtype=torch.float64)
    if "barycenters" in job.input:
        barycenters, found = read_barycenters(job, classes)
        headers += found
        atoms = torch.from_numpy(np.concatenate([barycenters[c][0][numbers] for c in classes]))
        weights = torch.from_numpy(np.concatenate([barycenters[c][1][numbers] for c in classes]))
    if "features" in job.input:
        offsets = read_json(job.input["index"])["offsets"]
        features = np.load(job.local("features"), mmap_mode="r")

        def real_features(c: int, count: int, generator: torch.Generator) -> torch.Tensor:
            size = offsets[c + 1] - offsets[c]
            chosen = torch.randperm(size, generator=generator)[:count].sort().values
            return torch.from_numpy(np.array(features[offsets[c] + chosen.numpy()]))

    group, index = pairs.unbind(1)
    batch = index - numbers[0] if layout == "one_per_class" else None
    return Shard(
        torch.tensor(classes), group, index, weights, statistics, atoms, real_features, batch
    ), headers


def main(job: Job) -> None:
    settings = dict(job.settings)
    seed, sharding, start = settings.pop("seed"), settings.pop("sharding"), settings.pop("start")
    settings.pop("precision", None)  # `precision` reads it from the job's
    device = job.device
    description = job.description()
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    mean, std = normalisation(description)
    place = (int(job.wildcards["ipc"]), sharding["batch_size"], sharding["batch_layout"])
    members = shard_members(sharding["classes"], *place, int(job.wildcards["shard"]))
    shard, headers = build_shard(job, *members, sharding["batch_layout"])
    if not shard.statistics and settings["bn_term"] != "none":
        raise UserError(
            f"teacher {teacher_header['wildcards']['teacher']} has no BatchNorm layer; set bn_term: none"
        )
    inputs = [description["header"], teacher_header, *headers]
    initial = None
    if start == "real":
        check_class_sizes(description, job.wildcards["dataset"], int(job.wildcards["ipc"]))
        store = open_images(job, description, "train")
        initial = draw_random(
            store, shard.classes[shard.group], shard.index, seed, job.wildcards["dataset"], mean, std
        )
    progress = job.progress(inputs)
    recovered = recover_images(
        freeze(teacher),
        shard,
        RecoverySettings(**settings),
        resolution=description["resolution"],
        mean=mean,
        std=std,
        seed_names=(seed, job.wildcards["dataset"]),
        device=device,
        initial=initial,
        precision=precision(job.settings, device),
        progress=progress,
    )
    tensors = {
        "images": recovered.images,
        "labels": shard.classes[shard.group],
        "index": shard.index,
        "weights": shard.weights,
        **recovered.losses,
    }
    write_tensors(job.output["shard"], tensors, job.header(inputs))
    progress.finish()


if __name__ == "__main__":
    run(main)
