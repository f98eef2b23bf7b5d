"""Gather the shards of a distilled set into one file, a header and a folder of PNGs."""

import shutil
from pathlib import Path

import numpy as np

from wmdd_core.artifacts import read_tensors, replacing, write_json, write_tensors, write_text
from wmdd_core.errors import UserError
from workflow_scripts.job import Job, listed, run

LOSSES = ("feature_loss", "ce_loss", "bn_loss")
"""Terms of the loss, as shards and their sum name them."""


def folder_name(name: str) -> str:
    """A class's folder: its own name, which is a folder's name for most sources; `/` becomes `_`."""
    return name.replace("/", "_")


def write_png(path: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
    """uint8 images as an ImageFolder, `<class>/<number>.png`."""
    from PIL import Image

    with replacing(path) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        numbers = dict.fromkeys(range(len(classes)), 0)
        for image, label in zip(images, labels.tolist(), strict=True):
            folder = Path(temporary) / folder_name(classes[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{numbers[label]:04d}.png")
            numbers[label] += 1


def write_losses(path: str, shards: list[dict], every: int = 10) -> None:
    """The loss terms of the set, summed over shards and classes, each tenth iteration as CSV."""
    names = [n for n in LOSSES if n in shards[0]]
    lines = [",".join(["iteration", *names])]
    if names:
        summed = np.stack([sum(s[n].sum(1, dtype=np.float64) for s in shards) for n in names], 1)
        steps = sorted({*range(0, len(summed), every), len(summed) - 1})
        lines += [",".join([str(i + 1), *(f"{v:.6g}" for v in summed[i].tolist())]) for i in steps]
    write_text(path, "\n".join(lines) + "\n")


def main(job: Job) -> None:
    description, method = job.description(), job.wildcards["method"]
    ipc, classes = int(job.wildcards["ipc"]), description["classes"]
    labels, side = np.repeat(np.arange(len(classes)), ipc), description["resolution"]
    images, weights = np.empty((len(labels), 3, side, side), np.uint8), np.zeros(len(labels))
    places, losses, headers = [], [], []
    remedy = f"delete {Path(listed(job.input['shards'])[0]).parent} and run snakemake again"
    # One shard at a time: a set of ImageNet-1K is 15 GB.
    for path in listed(job.input["shards"]):
        shard, header = read_tensors(path, "np")
        place = shard["labels"] * ipc + shard["index"]
        known = place < len(labels)  # others are told below
        images[place[known]], weights[place[known]] = shard["images"][known], shard["weights"][known]
        places.append(place)
        losses.append({name: values for name, values in shard.items() if name in LOSSES})
        headers.append(header)
    if not np.array_equal(np.sort(np.concatenate(places)), np.arange(len(labels))):
        raise UserError(f"the shards of {method} do not hold {ipc} images of each class; {remedy}")
    weights /= np.bincount(labels, weights)[labels]

    header = job.header(
        [description["header"], *headers],
        method=headers[0]["settings"],
        classes=classes,
        images_per_class=ipc,
        value_range="uint8, 0 to 255; feed (x / 255 − mean) / std to a network",
        mean=description["mean"],
        std=description["std"],
        png_folders=[folder_name(name) for name in classes],
    )
    tensors = {"images": images, "labels": labels, "weights": weights.astype(np.float32)}
    write_tensors(job.output["images"], tensors, header)
    write_json(job.output["header"], {"tensors": {n: list(t.shape) for n, t in tensors.items()}}, header)
    write_losses(job.output["losses"], losses)
    write_png(job.output["png"], images, labels, classes)
    print(f"{len(images)} images of {images.shape[-1]} pixels")


if __name__ == "__main__":
    run(main)
