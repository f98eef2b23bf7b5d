"""Reading distilled sets and embedding images, for the scripts that compare sets with real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wmdd_core.artifacts import read_tensors
from wmdd_core.augmentation import normalise
from wmdd_core.data import ImageStore
from wmdd_core.device import images_per_pass
from wmdd_core.models import Classifier
from workflow_scripts.checks import check_dataset, check_lineage, check_place
from workflow_scripts.job import Job, listed
from workflow_scripts.real_images import normalisation


@dataclass(frozen=True)
class DistilledSet:
    """One method's images at one size; weights sum to 1 in each class."""

    method: str
    ipc: str
    images: Tensor
    """uint8 (M, 3, R, R), sorted by class."""
    labels: Tensor
    """int64 (M,)."""
    weights: Tensor
    """float32 (M,)."""
    header: dict

    def rows(self, c: int) -> Tensor:
        """The numbers of class `c`'s images."""
        return (self.labels == c).nonzero()[:, 0]


def check_artefact(job: Job, description: Mapping, path: str, header: Mapping) -> None:
    """Raise `UserError` unless `path` is of this dataset, this data and this configuration."""
    check_place(path, header, description["header"]["wildcards"])
    first: dict = {}
    check_dataset(job.input["description"], description["header"], first)
    check_dataset(path, header, first)
    check_lineage(path, header, job.settings["expected"])


def read_distilled_sets(job: Job, description: Mapping) -> list[DistilledSet]:
    """The checked sets among the inputs."""
    found = []
    for path in listed(job.input["images"]):
        tensors, header = read_tensors(path)
        check_artefact(job, description, path, header)
        place = header["wildcards"]
        found.append(DistilledSet(place["method"], place["ipc"], **tensors, header=header))
    return found


def real_of_class(store: ImageStore, c: int) -> Tensor:
    """All real images of class `c`, uint8 (n, 3, R, R)."""
    return store.read(np.flatnonzero(store.labels == c))


@torch.no_grad()
def embed_images(model: Classifier, images: Tensor, description: Mapping, device: torch.device) -> Tensor:
    """Features of whole, unaugmented images by a frozen network: uint8 (N, 3, R, R) → float64 (N, D), CPU."""
    mean, std = normalisation(description)
    batches = (normalise(part.to(device), mean, std) for part in images.split(images_per_pass(device)))
    return torch.cat([model.features(batch).double().cpu() for batch in batches])
