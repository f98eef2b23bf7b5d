"""Squeeze: train a teacher on the real images (Table 6a of the paper)."""

from wmdd_core.artifacts import write_json, write_tensors, write_text
from wmdd_core.models import build_model
from wmdd_core.seeding import derive_seed
from wmdd_core.training import Schedule, accuracy, fit, hard_label_loss, real_batches, test_batches
from workflow_scripts.job import Job, precision, run
from workflow_scripts.real_images import normalisation, open_images, read_description, resident


def network_of(settings: dict, description: dict) -> dict:
    """What `build_model` needs to build this network, but for the seed."""
    shape = {k: settings[k] for k in ("architecture", "width", "depth", "norm") if k in settings}
    return {**shape, "classes": len(description["classes"]), "resolution": description["resolution"]}


def schedule_of(settings: dict) -> Schedule:
    """The part of the settings that says how to optimise."""
    keys = ("epochs", "optimizer", "learning_rate", "momentum", "weight_decay", "smoothing")
    return Schedule(**{k: settings[k] for k in keys if k in settings})


def main(job: Job) -> None:
    settings, device = job.settings, job.device()
    description = read_description(job)
    train, train_labels = resident(open_images(job, description, "train"), device)
    test, test_labels = resident(open_images(job, description, "test"), device)
    mean, std = normalisation(description)
    names = (settings["seed"], job.wildcards["dataset"], "teacher", job.wildcards["teacher"])

    network = network_of(settings, description)
    model = build_model(**network, seed=derive_seed(*names)).to(device)
    progress = job.progress([description["header"]])
    batches = real_batches(
        train,
        train_labels,
        settings["batch_size"],
        mean,
        std,
        names,
        crop_scale_min=settings["crop_scale_min"],
        flip=settings["flip"],
        device=device,
    )

    def tested() -> dict:
        batches = test_batches(test, test_labels, mean, std, device)
        return accuracy(model, batches, precision=precision(device))

    curve = fit(
        model,
        schedule_of(settings),
        batches,
        hard_label_loss,
        test=lambda: tested()["top1"],
        test_every=max(1, settings["epochs"] // 20),
        precision=precision(device),
        progress=progress,
    )
    metrics = tested()
    curve.top1[-1] = metrics["top1"]

    header = job.header([description["header"]], network=network, device=str(device.type))
    write_tensors(job.output["checkpoint"], model.state_dict(), header)
    write_json(job.output["metrics"], metrics, header)
    rows = [f"{e},{loss:.6f},{'' if top1 is None else f'{top1:.4f}'}" for e, loss, top1 in curve.rows()]
    write_text(job.output["curve"], "\n".join(["epoch,train_loss,top1", *rows]) + "\n")
    progress.finish()
    print(f"top-1 {metrics['top1']:.2f} % on {metrics['count']} test images")


if __name__ == "__main__":
    run(main)
