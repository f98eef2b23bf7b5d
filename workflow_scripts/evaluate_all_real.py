"""The ceiling: train a student on all real images with hard labels; test it on the real test set."""

from wmdd_core.device import precision
from wmdd_core.models import build_model
from wmdd_core.seeding import derive_seed
from wmdd_core.training import fit, hard_label_loss
from workflow_scripts.evaluate_student import write_evaluation
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import network_of, schedule_of, training_batches


def main(job: Job) -> None:
    settings, device, description = job.settings, job.device, job.description()
    inputs = [description["header"]]
    names = (settings["seed"], job.wildcards["dataset"], "all real", job.wildcards["seed"])
    student = build_model(**network_of(settings["student"], description), seed=derive_seed(*names)).to(device)
    progress = job.progress(inputs)
    curve = fit(
        student,
        schedule_of(settings["recipe"]),
        training_batches(job, description, names, settings["recipe"]),
        hard_label_loss,
        precision=precision(settings, device),
        progress=progress,
    )
    write_evaluation(job, student, curve, "hard", description, inputs)
    progress.finish()


if __name__ == "__main__":
    run(main)
