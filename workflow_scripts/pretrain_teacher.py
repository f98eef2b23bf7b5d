"""Squeeze: train a teacher on the real images (Table 6a of the paper), or load one.

With several GPUs (WMDD_GPUS) a process on each trains its part of every batch: see `fit`.
"""

import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from wmdd_core.artifacts import read_tensors, write_json, write_tensors, write_text
from wmdd_core.device import precision
from wmdd_core.errors import UserError
from wmdd_core.models import Classifier, build_model, load_weights
from wmdd_core.progress import STOPS
from wmdd_core.seeding import derive_seed
from wmdd_core.sources import UnreadableImage
from wmdd_core.training import Curve, accuracy, fit, hard_label_loss, test_batches
from workflow_scripts.job import GPU_FULL, Job, gpu_is_full, run
from workflow_scripts.real_images import (
    network_of,
    normalisation,
    open_images,
    resident,
    schedule_of,
    training_batches,
)


def load_published(model: Classifier, architecture: str, weights: str) -> None:
    """Load a checkpoint of the user's, or torchvision's published ImageNet weights, strictly."""
    if weights == "torchvision":
        from torchvision.models import get_model

        try:
            found = get_model(architecture, weights="DEFAULT").state_dict()
        except OSError as error:  # of the download; a disk that is full is told by its own errors
            if error.errno is not None:
                raise
            raise UserError(
                f"teachers.*.weights: torchvision's weights cannot be fetched ({error}); fetch them into the"
                " folder that TORCH_HOME names, where there is a network"
            ) from error
        load_weights(model, found, "torchvision")
        return
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"teachers.*.weights: there is no file {path}; give a .safetensors or .pt file of weights"
        )
    if path.suffix == ".safetensors":
        found = read_tensors(path)[0]
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
            told = str(error).partition("\n")[0]
            raise UserError(
                f"{path} holds no weights that can be read ({told}); save a network's state_dict()"
            ) from error
    load_weights(model, {k.removeprefix("module."): v for k, v in found.items()}, str(path))


def main(job: Job) -> None:
    gpus = int(os.environ.get("WMDD_GPUS", 1))
    if gpus == 1 or "weights" in job.settings:
        return train(job)
    if gpus > job.settings["batch_size"]:
        raise UserError(
            f"batch_size: {job.settings['batch_size']} is below the number of GPUs, {gpus}; use fewer"
        )
    if job.device_name not in ("auto", "cpu"):
        raise UserError(f"device: {job.device_name} is one GPU for {gpus} processes; set device: auto")
    seen = torch.cuda.device_count() if job.device_name == "auto" else 0
    if 0 < seen < gpus:
        raise UserError(f"{gpus} GPUs are to share a batch, and PyTorch sees {seen}; ask for as many")
    launch(job, gpus)


def launch(job: Job, processes: int) -> None:
    """Run `train_part` in this many processes of this machine with torchrun's launcher.

    This process holds the job's lock meanwhile and uses no GPU.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
    )
    try:
        elastic_launch(config, train_part)(replace(job, threads=max(1, job.threads // processes)))
    except ChildFailedError as error:
        told = error.get_first_failure()[1].message  # of an exception a mapping, of a signal text
        name, _, text = told["message"].partition(": ") if isinstance(told, dict) else (told, "", "")
        if GPU_FULL.search(text):
            raise UserError(gpu_is_full(text)) from None
        if name not in (UserError.__name__, UnreadableImage.__name__):
            raise
        raise UserError(text) from None


def train_part(job: Job) -> None:
    """One of the processes that train together."""
    dist.init_process_group("nccl" if job.device.type == "cuda" else "gloo")
    try:
        train(job)
    finally:
        dist.destroy_process_group()


def normalised_together(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with BatchNorm over the whole batch instead of each process's part, as in one process."""
    together = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in together.modules()):
        raise UserError("BatchNorm over several processes needs GPUs; train with one process on a CPU")
    return together


def train(job: Job) -> None:
    """Train or load the teacher, test it and write it; of several processes the first writes."""
    settings, device, description = job.settings, job.device, job.description()
    test, test_labels = resident(open_images(job, description, "test"), device)
    mean, std = normalisation(description)
    names = (settings["seed"], job.wildcards["dataset"], "teacher", job.wildcards["teacher"])

    network = network_of(settings, description)
    model = build_model(**network, seed=derive_seed(*names)).to(device)

    def tested() -> dict:
        batches = test_batches(test, test_labels, mean, std, device)
        return accuracy(model, batches, precision=precision(settings, device))

    first = not dist.is_initialized() or dist.get_rank() == 0
    progress = job.progress([description["header"]]) if first else None
    if dist.is_initialized():
        model = normalised_together(model, device)
        if first:
            # They end the others at once, and with them the epoch; the state of the last one is saved.
            for number in STOPS:
                signal.signal(number, signal.SIG_DFL)
            progress.save_every = 0
    if "weights" in settings:
        load_published(model, settings["architecture"], settings["weights"])
        curve = Curve()
    else:
        curve = fit(
            model,
            schedule_of(settings),
            training_batches(job, description, names, settings),
            hard_label_loss,
            test=lambda: tested()["top1"],
            test_every=max(1, settings["epochs"] // 20),
            precision=precision(settings, device),
            progress=progress,
        )
    metrics = tested()
    if not first:
        return
    if curve.top1:
        curve.top1[-1] = metrics["top1"]

    header = job.header([description["header"]], network=network)
    write_tensors(job.output["checkpoint"], model.state_dict(), header)
    write_json(job.output["metrics"], metrics, header)
    rows = [f"{e},{loss:.6f},{'' if top1 is None else f'{top1:.4f}'}" for e, loss, top1 in curve.rows()]
    write_text(job.output["curve"], "\n".join(["epoch,train_loss,top1", *rows]) + "\n")
    progress.finish()
    print(f"top-1 {metrics['top1']:.2f} % on {metrics['count']} test images")


if __name__ == "__main__":
    run(main)
