"""Take over a distilled set that was made elsewhere, after checking its classes and numbers."""

import hashlib

import numpy as np
import torch

from wmdd_core.artifacts import write_tensors
from wmdd_core.data import read_image_folder
from wmdd_core.digests import digest
from wmdd_core.errors import UserError
from workflow_scripts.job import Job, run


def main(job: Job) -> None:
    description, ipc = job.description(), int(job.wildcards["ipc"])
    path, classes = job.settings["external"].replace("{ipc}", str(ipc)), description["classes"]
    images, labels, weights = read_image_folder(path, classes, description["resolution"])
    for name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True):
        if count != ipc:
            raise UserError(
                f"{path} holds {count} images of class {name!r}, and ipc is {ipc}; correct one of them"
            )
    header = job.header([description["header"]])
    # What follows depends on the images that were found, not only on where they lay.
    header["lineage"][job.rule] = digest(
        [header["lineage"][job.rule], *(hashlib.sha256(a.tobytes()).hexdigest() for a in (images, weights))]
    )
    tensors = {
        "images": torch.from_numpy(images),
        "labels": torch.from_numpy(labels),
        "index": torch.arange(ipc).repeat(len(classes)),
        "weights": torch.from_numpy(weights),
    }
    write_tensors(job.output["shard"], tensors, header)


if __name__ == "__main__":
    run(main)
