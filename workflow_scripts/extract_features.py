"""Embed every real image and measure the teacher's BatchNorm statistics, in one pass."""

import numpy as np

from wmdd_core.artifacts import write_json, write_tensors
from wmdd_core.features import extract_features
from wmdd_core.models import freeze
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import in_order, leave_cores_to_decoding, load_teacher, open_images


def main(job: Job) -> None:
    device = job.device
    description = job.description()
    teacher, teacher_header = load_teacher(job.input["teacher"], device)
    store = open_images(job, description, "train")
    if not job.input.get("train"):
        leave_cores_to_decoding(device)
    inputs = [description["header"], teacher_header]
    progress = job.progress(inputs)

    shape = (len(store), teacher.classifier.in_features)
    features = progress.array(np.float32, shape)
    statistics = extract_features(
        freeze(teacher),
        lambda start: in_order(store, description, device, start, job.threads),
        features,
        len(description["classes"]),
        progress=progress,
    ).statistics()
    features.flush()

    header = job.header(inputs)
    counts = description["train"]["per_class"]
    offsets = np.cumsum([0, *counts]).tolist()
    write_json(job.output["index"], {"offsets": offsets, "dimension": shape[1]}, header)
    tensors = {
        f"{name}.{part}": value for name, layer in statistics.items() for part, value in vars(layer).items()
    }
    write_tensors(job.output["statistics"], tensors, {**header, "layers": list(statistics)})
    progress.finish(job.output["features"])


if __name__ == "__main__":
    run(main)
