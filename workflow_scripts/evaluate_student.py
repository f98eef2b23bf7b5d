"""Train a student from scratch on a distilled set and its labels alone; test it on the real test set."""

import numpy as np

from wmdd_core.artifacts import read_json, read_tensors, write_json
from wmdd_core.models import build_model
from wmdd_core.relabeling import (
    ViewSettings,
    hard_label_batches,
    mixed_label_loss,
    soft_label_batches,
    soft_label_loss,
)
from wmdd_core.seeding import derive_seed
from wmdd_core.training import Schedule, accuracy, fit, test_batches
from workflow_scripts.job import Job, precision, run
from workflow_scripts.pretrain_teacher import network_of
from workflow_scripts.real_images import normalisation, open_images, read_description, resident


def main(job: Job) -> None:
    recipe, device = job.settings["recipe"], job.device()
    description = read_description(job)
    mean, std = normalisation(description)
    tensors, distilled_header = read_tensors(job.input["images"])
    inputs = [description["header"], distilled_header]
    images = tensors["images"].to(device)
    ipc = int(job.wildcards["ipc"])
    weights = tensors["weights"] * ipc if recipe.get("weighted", True) else tensors["weights"] * 0 + 1
    names = (job.settings["views"]["seed"], job.wildcards["dataset"], "student", job.wildcards["seed"])
    common = {
        "settings": ViewSettings(**job.settings["views"]),
        "batch_size": min(recipe["batch_size"], len(images)),
        "mean": mean,
        "std": std,
        "seed_names": names,
    }
    if recipe["labels"] == "soft":
        inputs.append(read_json(job.input["labels_header"])["header"])
        batches = soft_label_batches(images, weights, np.load(job.input["labels"], mmap_mode="r"), **common)
        loss = soft_label_loss(recipe["temperature"])
    else:
        batches = hard_label_batches(images, weights, tensors["labels"], **common)
        loss = mixed_label_loss

    progress = job.progress(inputs)
    model = build_model(**network_of(job.settings["student"], description), seed=derive_seed(*names)).to(
        device
    )
    keys = ("epochs", "optimizer", "learning_rate", "momentum", "weight_decay", "smoothing")
    schedule = Schedule(**{k: recipe[k] for k in keys if k in recipe}, decay_matrices_only=True)
    curve = fit(model, schedule, batches, loss, precision=precision(device), progress=progress)
    test, test_labels = resident(open_images(job, description, "test"), device)
    tested = accuracy(model, test_batches(test, test_labels, mean, std, device), precision=precision(device))
    content = {**tested, "labels": recipe["labels"], "train_loss": curve.train_loss[-1]}
    write_json(job.output["evaluation"], content, job.header(inputs))
    progress.finish()
    print(f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % on {tested['count']} test images")


if __name__ == "__main__":
    run(main)
