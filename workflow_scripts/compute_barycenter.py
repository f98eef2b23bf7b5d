"""Compute the Wasserstein barycenter of each class of a block (Algorithm 2)."""

import numpy as np

from wmdd_core.artifacts import read_array, read_json, write_arrays
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.seeding import numpy_generator
from workflow_scripts.job import Job, run


def main(job: Job) -> None:
    settings = dict(job.settings)
    seed, ipc = settings.pop("seed"), int(job.wildcards["ipc"])
    index = read_json(job.input["index"])
    features = read_array(job.input["features"])
    first, _, last = job.wildcards["block"].partition("-")
    classes = range(int(first), int(last or first) + 1)

    found = []
    for c in classes:
        points = np.asarray(features[index["offsets"][c] : index["offsets"][c + 1]], dtype=np.float64)
        if len(points) < ipc:
            raise UserError(
                f"class {c} of {job.wildcards['dataset']} has {len(points)} images, fewer than ipc {ipc};"
                " lower ipc"
            )
        generator = numpy_generator(seed, job.wildcards["dataset"], "barycenter", c, ipc)
        barycenter = wasserstein_barycenter(points, ipc, generator=generator, **settings)
        found.append(barycenter)
        state = "converged" if barycenter.converged else "stopped"
        print(
            f"class {c}: W2² {barycenter.objective:.6g}, {state} after {barycenter.iterations} iterations,"
            f" {barycenter.seconds:.2f} s"
        )

    longest = max(len(b.history) for b in found)
    history = np.full((len(found), longest), np.nan)
    for row, barycenter in zip(history, found, strict=True):
        row[: len(barycenter.history)] = barycenter.history
    arrays = {
        "classes": np.array(classes),
        "support": np.stack([b.support for b in found]),
        "weights": np.stack([b.weights for b in found]),
        "objective": np.array([b.objective for b in found]),
        "history": history,
        "converged": np.array([b.converged for b in found]),
    }
    # Seconds go to the log and the benchmark file: equal work shall give equal bytes.
    write_arrays(job.output["barycenter"], arrays, job.header([index["header"]]))


if __name__ == "__main__":
    run(main)
