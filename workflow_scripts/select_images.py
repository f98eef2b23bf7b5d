"""Select real images as a distilled set: at random, or those nearest to each class's k-means centres."""

import numpy as np
import torch
from torch import Tensor

from wmdd_core.artifacts import read_json, write_tensors
from wmdd_core.augmentation import normalise
from wmdd_core.data import ImageStore
from wmdd_core.errors import UserError
from wmdd_core.seeding import derive_seed, torch_generator
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import open_images


def check_class_sizes(description: dict, dataset: str, ipc: int) -> None:
    """Raise `UserError` for a class with fewer than `ipc` training images."""
    for name, count in zip(description["classes"], description["train"]["per_class"], strict=True):
        if count < ipc:
            raise UserError(
                f"class {name!r} of {dataset} has {count} training images, fewer than ipc {ipc}; lower ipc"
            )


def random_rows(store: ImageStore, c: int, seed: int, dataset: str) -> Tensor:
    """All images of class `c` in a random order: a prefix of it is a random selection of any size."""
    rows = torch.from_numpy(np.flatnonzero(store.labels == c))
    return rows[torch.randperm(len(rows), generator=torch_generator(seed, dataset, "select", c))]


def draw_random(
    store: ImageStore, labels: Tensor, index: Tensor, seed: int, dataset: str, mean: Tensor, std: Tensor
) -> Tensor:
    """Normalised real images (M, 3, R, R) for classes `labels` (M,) and numbers `index` (M,) within them."""
    orders = {c: random_rows(store, c, seed, dataset) for c in labels.unique().tolist()}
    chosen = [orders[c][i] for c, i in zip(labels.tolist(), index.tolist(), strict=True)]
    return normalise(store.read(torch.stack(chosen).numpy()), mean, std)


def nearest_rows(features: np.ndarray, count: int, seed: int) -> Tensor:
    """The rows of `features` (n, D) nearest to `count` k-means centres, each row used once."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances

    centres = KMeans(count, n_init=10, random_state=seed % 2**32).fit(features).cluster_centers_
    distances = pairwise_distances(features, centres)
    chosen: list[int] = []
    for column in distances.T:
        column = column.copy()
        column[chosen] = np.inf
        chosen.append(int(column.argmin()))
    return torch.tensor(chosen)


def main(job: Job) -> None:
    dataset, ipc, seed = job.wildcards["dataset"], int(job.wildcards["ipc"]), job.settings["seed"]
    description = job.description()
    check_class_sizes(description, dataset, ipc)
    store = open_images(job, description, "train")
    inputs, rows = [description["header"]], []
    if job.settings["selection"] == "kmeans":
        features, index = np.load(job.input["features"], mmap_mode="r"), read_json(job.input["index"])
        inputs.append(index["header"])
        for c in range(len(description["classes"])):
            first, last = index["offsets"][c : c + 2]
            points = np.asarray(features[first:last], dtype=np.float64)
            rows.append(first + nearest_rows(points, ipc, derive_seed(seed, dataset, "kmeans", c)))
    else:
        rows = [random_rows(store, c, seed, dataset)[:ipc] for c in range(len(description["classes"]))]

    count = len(rows) * ipc
    tensors = {
        "images": store.read(torch.cat(rows).numpy()),
        "labels": torch.arange(len(rows)).repeat_interleave(ipc),
        "index": torch.arange(ipc).repeat(len(rows)),
        "weights": torch.full((count,), 1 / ipc, dtype=torch.float64),
    }
    write_tensors(job.output["shard"], tensors, job.header(inputs))


if __name__ == "__main__":
    run(main)
