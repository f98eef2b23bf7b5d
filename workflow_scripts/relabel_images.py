"""Relabel: the teacher's logits on each epoch's view of each distilled image (FKD)."""

import os

import numpy as np

from wmdd_core.artifacts import read_tensors, write_json
from wmdd_core.relabeling import ViewSettings, label_views
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import load_teacher, normalisation, read_description


def main(job: Job) -> None:
    settings, device = job.settings, job.device()
    description = read_description(job)
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    tensors, distilled_header = read_tensors(job.input["images"])
    images = tensors["images"].to(device)
    inputs = [description["header"], teacher_header, distilled_header]
    progress = job.progress(inputs)

    partial = job.checkpoint(".npy")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shape = (settings["epochs"], len(images), len(description["classes"]))
    resuming = partial.exists() and job.checkpoint().exists()
    labels = np.lib.format.open_memmap(
        partial,
        mode="r+" if resuming else "w+",
        dtype=None if resuming else np.float16,
        shape=None if resuming else shape,
    )
    label_views(
        teacher,
        images,
        ViewSettings(**settings["views"]),
        *normalisation(description),
        labels,
        teacher_mode=settings["teacher_mode"],
        batch_size=settings.get("batch_size", 100),
        progress=progress,
    )
    labels.flush()
    os.makedirs(os.path.dirname(job.output["labels"]), exist_ok=True)
    os.replace(partial, job.output["labels"])
    content = {"shape": list(shape), "axes": ["epoch", "image", "class"], "holds": "teacher logits, float16"}
    write_json(job.output["header"], content, job.header(inputs))
    progress.finish()


if __name__ == "__main__":
    run(main)
