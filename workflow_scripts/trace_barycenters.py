"""W₂² of each class's barycenter after each iteration of Algorithm 2, above the k-means bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from wmdd_core.artifacts import read_json, write_text
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.seeding import derive_seed, numpy_generator
from workflow_scripts.drawing import COLOURS, OTHERS, new_figure, save
from workflow_scripts.job import Job, run
from workflow_scripts.tabulate_accuracy import check_lineage, check_place

CLASSES_TRACED = 10
ITERATIONS = 50
PAPER_ITERATIONS = 10
"""K in the paper."""

TICKS = (1, 2, 5, 10, 20, 50, 100, 200)

KMEANS = "kmeans"
KMEANS_RUNS = 10


# ---- numbers ---------------------------------------------------------------------------------


def kmeans_bound(points: np.ndarray, size: int, seed: int) -> float:
    """The best of ten k-means runs to convergence, as W₂² between `points` (N, D) and their centres.

    The least W₂² of any barycenter of `size` atoms with free weights is the k-means optimum; the best
    of ten runs is close to it from above, so a trace may end a little below.
    """
    from sklearn.cluster import KMeans

    # With as many centres as points scikit-learn's own distances are zero only up to rounding.
    found = KMeans(size, n_init=KMEANS_RUNS, tol=0, random_state=seed % 2**32).fit(points)
    return max(0.0, float(found.inertia_)) / len(points)


def trace(points: np.ndarray, size: int, settings: Mapping, iterations: int, generator) -> tuple[list, float]:
    """(W₂² after each iteration, seconds) of one way to compute the barycenter of `points` (N, D).

    Runs all `iterations`, whatever the entry says of when to stop.
    """
    settings = {**settings, "max_iterations": iterations, "tolerance": 0}
    found = wasserstein_barycenter(points, size, generator=generator, **settings)
    return [float(v) for v in found.history], found.seconds


def trace_class(points: np.ndarray, size: int, settings: Mapping, names: tuple) -> list[dict]:
    """The lines of one class and size: k-means first, then each barycenter, iteration by iteration.

    settings: `iterations` and `barycenters` (name → settings). All of them start from one generator, the
    one that `compute_barycenter` uses.
    """
    started = time.monotonic()
    bound = kmeans_bound(points, size, derive_seed(*names, "k-means bound"))
    lines = [{"barycenter": KMEANS, "w2_squared": bound, "seconds": time.monotonic() - started}]
    for name, barycenter in settings["barycenters"].items():
        history, seconds = trace(points, size, barycenter, settings["iterations"], numpy_generator(*names))
        lines += [
            {"barycenter": name, "iteration": k, "w2_squared": value, "seconds": seconds}
            for k, value in enumerate(history, 1)
        ]
    for line in lines:
        line["excess_percent"] = 100 * (line["w2_squared"] / bound - 1) if bound else float("nan")
    return lines


# ---- the figure ------------------------------------------------------------------------------


def curves(own: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """Excess in per cent, iterations × classes; a trace that ended early stays where it is."""
    table = own.pivot(index="iteration", columns="class", values="excess_percent")
    return table.reindex(range(1, iterations + 1)).ffill()


def style_of(name: str, number: int, settings: Mapping) -> dict:
    """Learned weights have WMDD's colour, uniform ones another."""
    if settings["weights"] == "learned":
        return {"color": COLOURS["wmdd"]}
    return {"color": COLOURS["sre2l"] if settings["weights"] == "uniform" else OTHERS[number]}


def draw(table: pd.DataFrame, barycenters: Mapping[str, Mapping], iterations: int) -> Figure:
    """A panel for each size: excess over the best k-means run, a thin line a class, a thick one the mean."""
    sizes = list(dict.fromkeys(table.ipc))
    styles = {n: style_of(n, i, s) for i, (n, s) in enumerate(barycenters.items())}
    figure = new_figure(max(5.0, 2.9 * len(sizes)), 3.3)
    grid = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(grid, sizes, strict=True):
        own = table[table.ipc == size]
        for name, style in styles.items():
            lines = curves(own[own.barycenter == name], iterations)
            axes.plot(lines, alpha=0.3, linewidth=0.6, **style)
            axes.plot(lines.mean(axis=1, skipna=False), linewidth=2, **style)
        finish_panel(axes, iterations)
        axes.set_title(f"{size} image{'s' * (size != 1)} per class", loc="left")
    grid[0].set_ylabel("W₂² above k-means (%)")
    seconds = table.groupby(["barycenter", "class", "ipc"]).seconds.first().groupby("barycenter").mean()
    handles = [
        Line2D([], [], linewidth=2, label=f"{n} weights ({seconds[n]:.2g} s per class)", **style)
        for n, style in styles.items()
    ]
    bound = f"best of {KMEANS_RUNS} k-means runs ({seconds[KMEANS]:.2g} s per class)"
    handles.append(Line2D([], [], color="black", linestyle=(0, (5, 2)), linewidth=1.2, label=bound))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(sizes) > 2 else 1)
    return figure


def finish_panel(axes: Axes, iterations: int) -> None:
    axes.axhline(0, color="black", linestyle=(0, (5, 2)), linewidth=1.2)
    if iterations >= PAPER_ITERATIONS:
        axes.axvline(PAPER_ITERATIONS, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([k for k in TICKS if k <= iterations]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("iteration K")


# ---- the job ---------------------------------------------------------------------------------


def traced_classes(figure: Mapping, offsets: Sequence[int]) -> list[int]:
    """The classes that the figure names, or the first ten; each must have as many images as atoms."""
    total, most = len(offsets) - 1, max(figure["ipc"])
    chosen = list(figure.get("classes", range(min(CLASSES_TRACED, total))))
    for c in chosen:
        if c >= total:
            raise UserError(f"classes: {c} is not a class of this dataset; it has {total}, numbered from 0")
        if offsets[c + 1] - offsets[c] < most:
            raise UserError(
                f"class {c} has {offsets[c + 1] - offsets[c]} images, fewer than {most} per class; lower ipc"
            )
    return chosen


def main(job: Job) -> None:
    settings, figure = job.settings, job.settings["figure"]
    index = read_json(job.input["index"])
    check_place(job.input["index"], index["header"], {"dataset": settings["dataset"]})
    check_lineage(job.input["index"], index["header"], settings["expected"])
    features, offsets = np.load(job.input["features"], mmap_mode="r"), index["offsets"]
    iterations = figure.get("iterations", ITERATIONS)
    lines = []
    for c in traced_classes(figure, offsets):
        points = np.asarray(features[offsets[c] : offsets[c + 1]], dtype=np.float64)
        for size in figure["ipc"]:
            names = (settings["seed"], settings["dataset"], "barycenter", c, size)
            found = trace_class(points, size, {**settings, "iterations": iterations}, names)
            lines += [{"class": c, "ipc": size, **line} for line in found]
        print(f"class {c}: {sum({x['seconds'] for x in lines if x['class'] == c}):.1f} s", flush=True)
    columns = ["class", "ipc", "barycenter", "iteration", "w2_squared", "excess_percent", "seconds"]
    table = pd.DataFrame(lines)[columns].astype({"iteration": "Int64"})
    save(draw(table, settings["barycenters"], iterations), job.output)
    write_text(job.output["csv"], table.to_csv(index=False, lineterminator="\n", float_format="%.8g"))


if __name__ == "__main__":
    run(main)
