"""Real and distilled images in the features of a network trained on both, as t-SNE maps (Fig. 6, App. G)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from wmdd_core.artifacts import write_csv
from wmdd_core.device import precision
from wmdd_core.metrics import coverage, mean_between_distance, mean_within_distance
from wmdd_core.models import Classifier, build_model, freeze
from wmdd_core.progress import Progress
from wmdd_core.seeding import derive_seed, numpy_generator
from wmdd_core.terms import CLASSES_SHOWN
from wmdd_core.training import fit, hard_label_loss, real_batches
from workflow_scripts.distilled_sets import DistilledSet, embed_images, read_distilled_sets, real_of_class
from workflow_scripts.job import Job, run
from workflow_scripts.real_images import network_of, normalisation, open_images, resident, schedule_of

REAL_SHOWN = 100
"""Most real images drawn of a class."""

NEIGHBOURS = 5
"""Neighbours of `coverage`, as in the metric's publication."""

PERPLEXITY = 30


# ---- network and features --------------------------------------------------------------------


def train_on_mixture(
    settings: Mapping,
    own: DistilledSet,
    real: Tensor,
    labels: Tensor,
    description: Mapping,
    progress: Progress | None = None,
) -> Classifier:
    """A network trained from scratch on real and distilled images together, hard labels, frozen.

    `real` is uint8 (N, 3, R, R), `labels` (N,). Each image counts once; equal seeds for all methods.
    """
    device = real.device
    dataset = description["header"]["wildcards"]["dataset"]
    names = (settings["seed"], dataset, "tsne network")
    mean, std = normalisation(description)
    batches = real_batches(
        torch.cat([real, own.images.to(device)]),
        torch.cat([labels, own.labels.to(device)]),
        settings["schedule"]["batch_size"],
        mean,
        std,
        names,
        crop_scale_min=settings["schedule"]["crop_scale_min"],
        flip=settings["flip"],
    )
    model = build_model(**network_of(settings["student"], description), seed=derive_seed(*names)).to(device)
    fit(
        model,
        schedule_of(settings["schedule"]),
        batches,
        hard_label_loss,
        precision=precision(settings, device),
        progress=progress,
    )
    return freeze(model)


@dataclass(frozen=True)
class Embedded:
    """Features of the shown classes' images: real (N, D) and distilled (M, D) with their labels, float64."""

    method: str
    real: np.ndarray
    real_labels: np.ndarray
    copied: np.ndarray
    """(N,) bool: real images that are in the distilled set, too."""
    distilled: np.ndarray
    distilled_labels: np.ndarray


def drawn_evenly(labels: np.ndarray, count: int, names: tuple) -> np.ndarray:
    """Up to `count` row numbers of each class in `labels` (N,), drawn by seed, ascending."""
    chosen = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        drawn = numpy_generator(*names, int(c)).permutation(len(rows))[:count]
        chosen.append(rows[np.sort(drawn)])
    return np.concatenate(chosen)


# ---- numbers ---------------------------------------------------------------------------------


def summarise(embedded: Embedded, names: tuple) -> dict[str, float]:
    """What the picture suggests, in the features themselves, not on the map.

    within: mean distance between a class's distilled features, averaged over classes; between: mean
    distance between the classes' centroids of distilled features. Both networks have a scale of their
    own, so the same of the real features stand beside these. coverage: share of a class's real features
    that a distilled one covers (`metrics.coverage`), averaged over classes, without those that are in the
    set themselves; `coverage_random`: the same for as many real images drawn at random, over the others.
    """
    covered, by_chance = [], []
    for c in np.unique(embedded.distilled_labels):
        own = embedded.real_labels == c
        distilled = embedded.distilled[embedded.distilled_labels == c]
        covered.append(covered_share(embedded.real[own & ~embedded.copied], distilled))
        order = numpy_generator(*names, "coverage", int(c)).permutation(np.flatnonzero(own))
        drawn, others = order[: len(distilled)], order[len(distilled) :]
        by_chance.append(covered_share(embedded.real[others], embedded.real[drawn]))
    return {
        "within": mean_within_distance(embedded.distilled, embedded.distilled_labels),
        "within_real": mean_within_distance(embedded.real, embedded.real_labels),
        "between": mean_between_distance(embedded.distilled, embedded.distilled_labels),
        "between_real": mean_between_distance(embedded.real, embedded.real_labels),
        "coverage": float(np.mean(covered)),
        "coverage_random": float(np.mean(by_chance)),
    }


def covered_share(real: np.ndarray, points: np.ndarray) -> float:
    """`metrics.coverage` of `real` (N, D) by `points` (M, D); nan where real ones lack neighbours."""
    return coverage(real, points, NEIGHBOURS) if len(real) > NEIGHBOURS else np.nan


def flatten(points: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of `points` (N, D) to the plane, started from their principal components: float64 (N, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    found = TSNE(init="pca", perplexity=perplexity, random_state=seed % 2**32).fit_transform(
        points.astype(np.float32)
    )
    return found.astype(np.float64)


def map_points(embedded: Embedded, shown: np.ndarray, seed: int) -> pd.DataFrame:
    """The map of the `shown` real points and all distilled ones: kind, class, x, y."""
    places = flatten(np.concatenate([embedded.real[shown], embedded.distilled]), seed)
    return pd.DataFrame(
        {
            "method": embedded.method,
            "kind": ["real"] * len(shown) + ["distilled"] * len(embedded.distilled),
            "class": np.concatenate([embedded.real_labels[shown], embedded.distilled_labels]),
            "x": places[:, 0],
            "y": places[:, 1],
        }
    )


# ---- the job ---------------------------------------------------------------------------------


def shown_classes(figure: Mapping, total: int) -> list[int]:
    """The classes that the figure names, or the first of them."""
    return sorted(figure.get("classes", range(min(CLASSES_SHOWN, total))))


def main(job: Job) -> None:
    figure, device, description = job.settings["figure"], job.device, job.description()
    classes = shown_classes(figure, len(description["classes"]))
    store = open_images(job, description, "train")
    real, labels = resident(store, device)
    names = (job.settings["seed"], description["header"]["wildcards"]["dataset"], "tsne")
    shown_real = [real_of_class(store, c) for c in classes]
    lines, maps, progresses = [], [], []
    for own in read_distilled_sets(job, description):
        headers = [description["header"], own.header]
        progresses.append(job.progress(headers, method=own.method, ipc=own.ipc))
        model = train_on_mixture(job.settings, own, real, labels, description, progresses[-1])
        found = [embed_images(model, images, description, device).numpy() for images in shown_real]
        rows = torch.cat([own.rows(c) for c in classes])
        pixels = {image.tobytes() for image in own.images[rows].numpy()}
        embedded = Embedded(
            own.method,
            np.concatenate(found),
            np.repeat(classes, [len(f) for f in found]),
            np.array([image.tobytes() in pixels for images in shown_real for image in images.numpy()]),
            embed_images(model, own.images[rows], description, device).numpy(),
            own.labels[rows].numpy(),
        )
        shown = drawn_evenly(embedded.real_labels, figure.get("images", REAL_SHOWN), (*names, "shown"))
        maps.append(map_points(embedded, shown, derive_seed(*names, "map")))
        lines.append({"method": own.method, "ipc": int(own.ipc), **summarise(embedded, names)})
    write_csv(job.output["csv"], pd.DataFrame(lines), "%.6g")
    write_csv(job.output["points"], pd.concat(maps), "%.4f")
    for progress in progresses:
        progress.finish()


if __name__ == "__main__":
    run(main)
