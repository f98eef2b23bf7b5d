"""Embed every real image and measure the teacher's BatchNorm statistics, in one pass."""

import os

import numpy as np

from wmdd_core.artifacts import write_json, write_tensors
from wmdd_core.features import extract_features
from wmdd_core.models import freeze
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import in_order, load_teacher, open_images, read_description

BATCH_SIZE = 250
"""Images in a forward pass: memory, not meaning."""


def main(job: Job) -> None:
    device = job.device()
    description = read_description(job)
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    store = open_images(job, description, "train")
    inputs = [description["header"], teacher_header]
    progress = job.progress(inputs)

    # The memory map lives beside the checkpoint, so that what is done survives a kill.
    partial = job.checkpoint(".npy")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(store), teacher.classifier.in_features)
    resuming = partial.exists() and job.checkpoint().exists()
    features = np.lib.format.open_memmap(
        partial,
        mode="r+" if resuming else "w+",
        dtype=None if resuming else np.float32,
        shape=None if resuming else shape,
    )
    statistics = extract_features(
        freeze(teacher),
        lambda start: in_order(store, description, device, start, BATCH_SIZE),
        features,
        len(description["classes"]),
        progress=progress,
    ).statistics()
    features.flush()

    header = job.header(inputs)
    os.makedirs(os.path.dirname(job.output["features"]), exist_ok=True)
    os.replace(partial, job.output["features"])
    counts = description["train"]["per_class"]
    offsets = np.cumsum([0, *counts]).tolist()
    write_json(job.output["index"], {"offsets": offsets, "dimension": shape[1]}, header)
    tensors = {
        f"{name}.{part}": value for name, layer in statistics.items() for part, value in vars(layer).items()
    }
    write_tensors(job.output["statistics"], tensors, {**header, "layers": list(statistics)})
    progress.finish()


if __name__ == "__main__":
    run(main)
