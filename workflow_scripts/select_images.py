"""Select real images as a distilled set: at random, or those nearest to each class's k-means centres."""

import numpy as np
import torch
from torch import Tensor

from wmdd_core.artifacts import read_array, read_json, write_tensors
from wmdd_core.seeding import derive_seed
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import check_class_sizes, open_images, random_rows


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
        features, index = read_array(job.input["features"]), read_json(job.input["index"])
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
