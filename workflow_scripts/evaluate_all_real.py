"""The ceiling: train a student on all real images with hard labels; test it on the real test set."""

from wmdd_core.artifacts import write_json
from wmdd_core.device import precision
from wmdd_core.models import build_model
from wmdd_core.seeding import derive_seed
from wmdd_core.training import accuracy, fit, hard_label_loss, test_batches
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import (
    network_of,
    normalisation,
    open_images,
    resident,
    schedule_of,
    training_batches,
)


def main(job: Job) -> None:
    recipe, device = job.settings["recipe"], job.device
    description = job.description()
    mean, std = normalisation(description)
    inputs = [description["header"]]
    names = (job.settings["seed"], job.wildcards["dataset"], "all real", job.wildcards["seed"])
    model = build_model(**network_of(job.settings["student"], description), seed=derive_seed(*names)).to(
        device
    )
    progress = job.progress(inputs)
    batches = training_batches(job, description, names, recipe, job.settings["flip"], device)
    curve = fit(
        model,
        schedule_of(recipe),
        batches,
        hard_label_loss,
        precision=precision(job.settings, device),
        progress=progress,
    )
    test, test_labels = resident(open_images(job, description, "test"), device)
    tested = accuracy(
        model, test_batches(test, test_labels, mean, std, device), precision=precision(job.settings, device)
    )
    content = {**tested, "labels": "hard", "train_loss": curve.train_loss[-1]}
    write_json(job.output["evaluation"], content, job.header(inputs))
    progress.finish()
    print(f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % on {tested['count']} test images")


if __name__ == "__main__":
    run(main)
