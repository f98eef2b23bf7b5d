"""Train a student from scratch on a distilled set and its labels alone; test it on the real test set."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wmdd_core.artifacts import read_array, read_json, read_tensors, write_json
from wmdd_core.device import precision
from wmdd_core.models import Classifier, build_model, freeze
from wmdd_core.progress import Progress
from wmdd_core.relabeling import (
    ViewSettings,
    hard_label_batches,
    mixed_label_loss,
    soft_label_batches,
    soft_label_loss,
)
from wmdd_core.seeding import derive_seed
from wmdd_core.training import Curve, accuracy, fit, test_batches
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import (
    load_teacher,
    network_of,
    normalisation,
    open_images,
    resident,
    schedule_of,
)


def train_student(
    settings: Mapping,
    distilled: Mapping[str, Tensor],
    labeller: str | Classifier | None,
    description: Mapping,
    seed: str,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Classifier, Curve]:
    """A student trained by `settings["recipe"]`, and its learning curve.

    `distilled` has uint8 `images` (M, 3, R, R), `labels` (M,) and `weights` (M,), which sum to 1 in
    each class. `labeller` is the path of their soft labels, the teacher that labels each view as it comes,
    or None for hard labels.
    """
    recipe, mean, std = settings["recipe"], *normalisation(description)
    images, weights = distilled["images"].to(device), distilled["weights"]
    weights = weights / weights.mean() if recipe.get("weighted", True) else torch.ones_like(weights)
    names = (settings["views"]["seed"], description["header"]["wildcards"]["dataset"], "student", seed)
    common = {
        "settings": ViewSettings(**settings["views"]),
        "batch_size": min(recipe["batch_size"], len(images)),
        "mean": mean,
        "std": std,
        "seed_names": names,
    }
    if labeller is None:
        batches, loss = hard_label_batches(images, weights, distilled["labels"], **common), mixed_label_loss
    else:
        logits = read_array(labeller) if isinstance(labeller, str) else freeze(labeller)
        batches = soft_label_batches(images, weights, logits, **common, precision=precision(settings, device))
        loss = soft_label_loss(recipe["temperature"])
    student = build_model(**network_of(settings["student"], description), seed=derive_seed(*names)).to(device)
    curve = fit(
        student,
        schedule_of(recipe, decay_matrices_only=True),
        batches,
        loss,
        precision=precision(settings, device),
        progress=progress,
    )
    return student, curve


def write_evaluation(
    job: Job, student: Classifier, curve: Curve, labels: str, description: Mapping, inputs: list[dict]
) -> None:
    """Test a student on the real test set and write that, with the kind of `labels` it was trained on.

    `inputs` are the headers of what it was made from.
    """
    test, test_labels = resident(open_images(job, description, "test"), job.device)
    batches = test_batches(test, test_labels, *normalisation(description), job.device)
    tested = accuracy(student, batches, precision=precision(job.settings, job.device))
    content = {**tested, "labels": labels, "train_loss": curve.train_loss[-1]}
    write_json(job.output["evaluation"], content, job.header(inputs))
    print(f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % on {tested['count']} test images")


def main(job: Job) -> None:
    device, description = job.device, job.description()
    distilled, distilled_header = read_tensors(job.input["images"])
    inputs = [description["header"], distilled_header]
    labeller = job.input.get("labels")
    if labeller:
        path, images = job.input["labels_header"], distilled["images"]
        labelled = read_json(path)
        ViewSettings(**job.settings["views"]).check(labelled["views"], len(images), images.shape[-1], path)
        inputs.append(labelled["header"])
    elif "teacher" in job.input:
        labeller, teacher_header = load_teacher(job.input["teacher"], device)
        inputs.append(teacher_header)
    progress, seed = job.progress(inputs), job.wildcards["seed"]
    student, curve = train_student(job.settings, distilled, labeller, description, seed, device, progress)
    write_evaluation(job, student, curve, job.settings["recipe"]["labels"], description, inputs)
    progress.finish()


if __name__ == "__main__":
    run(main)
