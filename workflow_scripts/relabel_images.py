"""Relabel: the teacher's logits on each epoch's view of each distilled image (FKD)."""

import numpy as np

from wmdd_core.artifacts import read_tensors, write_json
from wmdd_core.device import images_per_pass, precision
from wmdd_core.relabeling import ViewSettings, label_views
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import load_teacher, normalisation


def main(job: Job) -> None:
    settings, device = job.settings, job.device
    description = job.description()
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    tensors, distilled_header = read_tensors(job.input["images"])
    images = tensors["images"].to(device)
    inputs = [description["header"], teacher_header, distilled_header]
    progress = job.progress(inputs)

    shape = (settings["epochs"], len(images), len(description["classes"]))
    labels = progress.array(np.float16, shape)
    views = ViewSettings(**settings["views"])
    label_views(
        teacher,
        images,
        views,
        *normalisation(description),
        labels,
        teacher_mode=settings["teacher_mode"],
        batch_size=settings.get("batch_size", images_per_pass(device)),
        precision=precision(settings, device),
        progress=progress,
    )
    labels.flush()
    content = {
        "shape": list(shape),
        "axes": ["epoch", "image", "class"],
        "holds": "teacher logits, float16",
        "views": views.sample(len(images), images.shape[-1]),
    }
    write_json(job.output["header"], content, job.header(inputs))
    progress.finish(job.output["labels"])


if __name__ == "__main__":
    run(main)
