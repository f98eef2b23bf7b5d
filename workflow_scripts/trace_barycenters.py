"""W₂² of each class's barycenter after each iteration of Algorithm 2, above the k-means bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from inspect import signature

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from wmdd_core.artifacts import read_array, read_json, write_csv
from wmdd_core.barycenter import wasserstein_barycenter
from wmdd_core.errors import UserError
from wmdd_core.seeding import derive_seed, numpy_generator
from workflow_scripts.checks import check_lineage, check_place
from workflow_scripts.drawing import COLOURS, OTHERS, new_figure, save
from workflow_scripts.job import Job, run

CLASSES_TRACED = 10
ITERATIONS = 50
PAPER_ITERATIONS = 10
"""K in the paper."""

TICKS = (0, 1, 2, 5, 10, 20, 50, 100, 200)

KMEANS = "kmeans"
KMEANS_RUNS = 10

RANDOM = "random_points"
DEFAULT_START = signature(wasserstein_barycenter).parameters["initialisation"].default

BROKEN = (0, (3, 1.5))


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


def starts_of(barycenter: Mapping) -> dict[str, Mapping]:
    """Start → settings: the entry's own, and random points, from which the iterations have work to do."""
    own = barycenter.get("initialisation", DEFAULT_START)
    return {own: barycenter, RANDOM: {**barycenter, "initialisation": RANDOM, "restarts": 1}}


def trace_class(points: np.ndarray, size: int, settings: Mapping, names: tuple) -> list[dict]:
    """The lines of one class and size: k-means, then each barycenter at the start and after each iteration.

    settings: `iterations`, run until one gains nothing, whatever an entry says of when to stop, and
    `barycenters` (name → settings). All of them draw from one generator, that of `compute_barycenter`.
    """
    import sklearn.cluster  # noqa: F401 - or the first class would be charged with it

    started = time.perf_counter()
    bound = kmeans_bound(points, size, derive_seed(*names, "k-means bound"))
    lines = [{"barycenter": KMEANS, "w2_squared": bound, "seconds": time.perf_counter() - started}]
    until = {"max_iterations": settings["iterations"], "tolerance": 0}
    for name, barycenter in settings["barycenters"].items():
        for start, chosen in starts_of(barycenter).items():
            found = wasserstein_barycenter(
                points, size, generator=numpy_generator(*names), **{**chosen, **until}
            )
            place = {"barycenter": name, "start": start, "seconds": found.seconds}
            history = enumerate(found.history.tolist())
            lines += [{**place, "iteration": k, "w2_squared": value} for k, value in history]
    for line in lines:
        line["excess_percent"] = 100 * (line["w2_squared"] / bound - 1) if bound else float("nan")
    return lines


# ---- the figure ------------------------------------------------------------------------------


def curves(own: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """Excess in per cent, iterations × classes; a trace that ended early stays where it is."""
    table = own.pivot(index="iteration", columns="class", values="excess_percent")
    return table.reindex(range(iterations + 1)).ffill()


def colours_of(barycenters: Mapping[str, Mapping]) -> dict[str, str]:
    """Learned weights have WMDD's colour."""
    others = iter(OTHERS)
    return {n: COLOURS["wmdd"] if s["weights"] == "learned" else next(others) for n, s in barycenters.items()}


def draw(table: pd.DataFrame, barycenters: Mapping[str, Mapping], iterations: int) -> Figure:
    """A panel for each size: excess over the best k-means run, a thin line a class, a thick one the mean.

    Broken lines are means from random points; the times are means over classes from the entry's own start.
    """
    sizes, colours = list(dict.fromkeys(table.ipc)), colours_of(barycenters)
    figure = new_figure(max(5.0, 2.9 * len(sizes)), 3.3)
    grid = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(grid, sizes, strict=True):
        own = table[table.ipc == size]
        for name, colour in colours.items():
            for start in starts_of(barycenters[name]):
                lines = curves(own[(own.barycenter == name) & (own.start == start)], iterations)
                style = {"color": colour, "linewidth": 1.8, "linestyle": BROKEN if start == RANDOM else "-"}
                if start != RANDOM:
                    axes.plot(lines, color=colour, alpha=0.35, linewidth=0.6)
                axes.plot(lines.mean(axis=1, skipna=False), **style)
        finish_panel(axes, iterations)
        write_seconds(axes, own, {**colours, KMEANS: "black"})
        axes.set_title(f"{size} image{'s' * (size != 1)} per class", loc="left")
    # Room for the times above the lines.
    grid[0].set_ylim(top=20 * max(1, table.excess_percent.max()))
    grid[0].set_ylabel("W₂² above k-means (%)")
    handles = [Line2D([], [], linewidth=2, label=f"{n} weights", color=c) for n, c in colours.items()]
    handles.append(Line2D([], [], label="from random points", color="#777777", linestyle=BROKEN))
    bound = f"best of {KMEANS_RUNS} k-means runs"
    handles.append(Line2D([], [], label=bound, color="black", linewidth=1.2))
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if len(sizes) > 2 else 2)
    return figure


def write_seconds(axes: Axes, own: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Seconds per class in each one's colour, in the upper right corner."""
    first = own[own.start != RANDOM].groupby(["barycenter", "class"]).seconds.first()
    for place, (name, colour) in enumerate(colours.items()):
        if name not in first:  # an entry that itself starts from random points
            continue
        text = f"{first[name].mean():.2g} s per class"
        at = (0.98, 0.97 - 0.075 * place)
        axes.text(*at, text, color=colour, ha="right", va="top", fontsize=7.5, transform=axes.transAxes)


def finish_panel(axes: Axes, iterations: int) -> None:
    axes.axhline(0, color="black", linewidth=1.2, zorder=1)
    if iterations >= PAPER_ITERATIONS:
        axes.axvline(PAPER_ITERATIONS, ymax=0.75, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator([k for k in TICKS if k <= iterations]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("iteration K")
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.yaxis.set_major_formatter(ScalarFormatter())


# ---- the job ---------------------------------------------------------------------------------


def traced_classes(figure: Mapping, offsets: Sequence[int]) -> list[int]:
    """The classes that the figure names, or the first ten; each must have as many images as atoms."""
    total, most = len(offsets) - 1, max(figure["ipc"])
    chosen = list(figure.get("classes", range(min(CLASSES_TRACED, total))))
    for c in chosen:
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
    features, offsets = read_array(job.input["features"]), index["offsets"]
    iterations = figure.get("iterations", ITERATIONS)
    lines = []
    for c in traced_classes(figure, offsets):
        points = np.asarray(features[offsets[c] : offsets[c + 1]], dtype=np.float64)
        for size in figure["ipc"]:
            names = (settings["seed"], settings["dataset"], "barycenter", c, size)
            found = trace_class(points, size, {**settings, "iterations": iterations}, names)
            lines += [{"class": c, "ipc": size, **line} for line in found]
        print(f"class {c}: done", flush=True)
    columns = ["class", "ipc", "barycenter", "start", "iteration", "w2_squared", "excess_percent", "seconds"]
    table = pd.DataFrame(lines)[columns].astype({"iteration": "Int64"})
    save(draw(table, settings["barycenters"], iterations), job.output)
    write_csv(job.output["csv"], table, "%.8g")


if __name__ == "__main__":
    run(main)
