"""The input files and the settings of the rules that report: tables, figures, the page."""

import itertools
from types import SimpleNamespace

from snakemake.utils import update_config

from wmdd_core.terms import CLASSES_SHOWN, tell_apart

# ---- accuracy, galleries ---------------------------------------------------------------------


@functools.cache
def table_cells(table):
    """The sets of an accuracy table: wildcards of `evaluate_student`, the method's entry, a number of seeds.

    The sets of one cell follow each other.
    """
    spec, cells = config["tables"][table], []
    seeds = spec.get("seeds", config["student_seeds"])
    for dataset in spec["datasets"]:
        settings = resolved(spec, dataset, f"tables.{table}")
        for method in expand_methods(settings["methods"]):
            kind = entry("methods", method, dataset)["kind"]
            recipes = [REAL["recipe"]] if kind == "real" else list(settings["recipes"])
            ipcs = [REAL["ipc"]] if kind == "real" else settings["ipc"]
            sets = 1 if kind in ("real", "external") else spec.get("sets", config.get("distilled_sets", 1))
            for recipe, ipc, student, number in itertools.product(
                recipes, ipcs, settings["students"], range(sets)
            ):
                place = {
                    "dataset": dataset,
                    "recipe": recipe,
                    "method": set_name(method, number),
                    "ipc": str(ipc),
                    "student": student,
                }
                cells.append({**place, "entry": method, "seeds": seeds})
    return cells


def evaluations(cells):
    """The evaluation files of cells, cell by cell and seed by seed."""
    return [EVALUATION.format(**cell, seed=s) for cell in cells for s in range(cell["seeds"])]


def made_by(step, w):
    """A digest of the settings and the code of a job."""
    return digest([SETTINGS[step](w), code_of(step)])


def expected_digests(jobs):
    """rule → digests of settings and code that artefacts of these jobs may have in their lineage.

    jobs: (rule, wildcards). What a table is made of must have been made by this configuration; anything
    else is refused.
    """
    found, seen, left = {}, set(), list(jobs)
    while left:
        step, place = left.pop()
        if (step, *place.items()) in seen:
            continue
        seen.add((step, *place.items()))
        w = SimpleNamespace(**place)
        found.setdefault(lineage_name(step, place), set()).add(made_by(step, w))
        left += steps_before(step, w)
    return {name: sorted(digests) for name, digests in found.items()}


def evaluating(cells):
    """The jobs, without their seeds, that train the students of these cells."""
    return [("evaluate_all_real" if c["ipc"] == REAL["ipc"] else "evaluate_student", c) for c in cells]


def swept_of(methods):
    """method → its sweep's entry, key and value, for those of `methods` that are members of one."""
    return {m: config["methods"][m]["swept"] for m in methods if "swept" in config["methods"][m]}


def label_of(block, name):
    return config[block].get(name, {}).get("label", name)


def held_out(datasets):
    """Those of the datasets whose tests run on a part of the training set."""
    return sorted(d for d in datasets if dataset_of(d).get("validation_fraction"))


def titles_of(datasets):
    return {d: config["datasets"][d].get("title", d) for d in datasets}


@settings_for
def tabulate_accuracy_settings(w):
    cells = table_cells(w.table)
    spec = config["tables"][w.table]
    return {
        "published": content_of("report/published.csv"),
        "title": spec.get("title", w.table),
        "cells": cells,
        "expected": expected_digests(evaluating(cells)),
        "labels": {
            "datasets": titles_of({c["dataset"] for c in cells}),
            "methods": {c["entry"]: label_of("methods", c["entry"]) for c in cells},
            "students": {c["student"]: label_of("students", c["student"]) for c in cells},
            "recipes": {c["recipe"]: label_of("recipes", c["recipe"]) for c in cells},
            "held_out": held_out({c["dataset"] for c in cells}),
        },
        "swept": swept_of(c["entry"] for c in cells),
    }


def figures_of_kind(kind):
    return names(n for n, f in config["figures"].items() if f["kind"] == kind)


@functools.cache
def figure_named(name):
    """What the configuration says of a figure, and of one dataset if it is of one."""
    spec = config["figures"][name]
    if len(spec.get("datasets", [])) != 1:
        return spec
    (dataset,) = spec["datasets"]
    settings = resolved(spec, dataset, f"figures.{name}")
    for c in settings.get("classes", []):
        if c >= (total := class_total(dataset)):
            stop(f"figures.{name}.classes: {c} is not a class of {dataset}; it has {total}, numbered from 0")
    return settings


def figure_of(w):
    return figure_named(w.figure)


def appearance():
    """Names of methods and datasets as people read them; a method has one colour everywhere."""
    return {
        "datasets": titles_of(config["datasets"]),
        **{
            block: {name: label_of(block, name) for name in config[block]}
            for block in ("methods", "students", "recipes")
        },
    }


@functools.cache
def making_table(table):
    """What an accuracy table is made by: one whose job failed leaves no file to be older than."""
    return made_by("tabulate_accuracy", SimpleNamespace(table=table))


def drawn_cells(w):
    """The cells of distilled sets in a figure's table."""
    figure, table = figure_of(w), figure_of(w)["table"]
    cells = [c for c in table_cells(table) if c["ipc"] != REAL["ipc"]]
    if not cells:
        stop(f"figures.{w.figure}: the table {table} has no distilled set; give it a method that makes one")
    for key in ("student", "recipe"):
        known = dict.fromkeys(c[key] for c in cells)
        if key in figure and figure[key] not in known:
            told = f"is not in the table {table}, which has {', '.join(known)}"
            stop(f"figures.{w.figure}.{key}: {figure[key]} {told}")
    return cells


@settings_for
def plot_accuracy_settings(w):
    drawn_cells(w)
    return {"figure": figure_of(w), "labels": appearance(), "table": making_table(figure_of(w)["table"])}


@settings_for
def plot_sweep_settings(w):
    swept, table = swept_of(c["entry"] for c in drawn_cells(w)), figure_of(w)["table"]
    for member in swept.values():
        if isinstance(member["value"], bool) or not isinstance(member["value"], (int, float)):
            stop(
                f"figures.{w.figure}: the sweep {member['entry']} has no axis, as its {member['key']} is"
                f" {member['value']!r}, no number; show it as a table"
            )
    keys = sorted({member["key"] for member in swept.values()})
    if len(keys) != 1:
        told = f"sweeps of {' and '.join(keys)}" if keys else "no sweep"
        stop(f"figures.{w.figure}: the table {table} holds {told}; give it sweeps of one key")
    return {**plot_accuracy_settings(w), "swept": swept, "key": keys[0]}


def gallery_input(w):
    dataset = single(w, "datasets")
    return {
        "images": [DISTILLED.format(**place) for place in figure_sets(w)],
        "description": DESCRIPTION.format(dataset=dataset),
        "train": real_images(dataset),
    }


@settings_for
def plot_gallery_settings(w):
    methods = list(expand_methods(figure_of(w)["methods"]))
    return {
        "figure": pick(figure_of(w), "classes", "images"),
        "labels": {m: label_of("methods", m) for m in methods},
        "swept": swept_of(methods),
        "expected": expected_digests(making_sets(w)),
    }


# ---- tables ----------------------------------------------------------------------------------

TABLE_KINDS = ("efficiency", "cost", "hyperparameters")
"""Kinds of entries under `figures` that make tables: measurements, costs and settings beside accuracy."""


def is_table(name):
    """Whether an item of the page is a table, of accuracies or of one of `TABLE_KINDS`."""
    return name in config["tables"] or config["figures"][name]["kind"] in TABLE_KINDS


def item_files(name):
    """The files of a table or figure; the first is the one that the page is made of."""
    if is_table(name):
        return [f"{TABLE}.{suffix}".format(table=name) for suffix in ("csv", "md", "tex")]
    return [f"{FIGURE}.{suffix}".format(figure=name) for suffix in ("png", "pdf", "csv")]


def every_core(wildcards):
    """All cores, so that nothing else runs beside the job; on a cluster, those of its allocation."""
    given = workflow.resource_settings.cores  # none for --report
    return given if workflow.local_exec and given else 1


def efficiency_methods(w):
    """The methods that are timed, as wildcards of sets of one image per class."""
    dataset, found = single(w, "datasets"), []
    for method in expand_methods(figure_of(w)["methods"]):
        place = SimpleNamespace(dataset=dataset, method=method, ipc="1")
        if method_of(place)["kind"] not in ("recover", "dm", "dc"):
            stop(f"figures.{w.figure}.methods: {method} optimises no images; remove it")
        if teacher_of(place) != labeller_of(dataset):
            stop(f"figures.{w.figure}.methods: {method} has a teacher of its own; all must share one network")
        found.append(place)
    return found


def efficiency_barycenter(w):
    """The one entry of `barycenters` that the timed methods use, or None."""
    used = {method_of(p).get("barycenter") for p in efficiency_methods(w) if needs_atoms(method_of(p))}
    if len(used) > 1:
        stop(f"figures.{w.figure}.methods use the barycenters {', '.join(sorted(used))}; give those of one")
    return next(iter(used), None)


def measure_efficiency_input(w):
    dataset, barycenter = single(w, "datasets"), efficiency_barycenter(w)
    place = {"dataset": dataset, "teacher": labeller_of(dataset), "ipc": 1}
    files = {
        "description": DESCRIPTION.format(**place),
        "train": real_images(dataset),
        "teacher": TEACHER.format(**place),
    }
    if barycenter:
        blocks = dict.fromkeys(block_of(c, dataset) for c in range(class_total(dataset)))
        files["barycenters"] = [BARYCENTER.format(**place, barycenter=barycenter, block=b) for b in blocks]
    recovered = [m for m in map(method_of, efficiency_methods(w)) if m["kind"] == "recover"]
    if any(map(uses_statistics, recovered)):
        files["statistics"] = BN_STATISTICS.format(**place)
    if any(map(uses_features, recovered)):
        files |= stored_features(dataset)
    return files


@settings_for
def measure_efficiency_settings(w):
    def settings(place):
        if method_of(place)["kind"] == "recover":
            return {"kind": "recover", **without(recover_images_settings(place), "sharding", "seed")}
        return without(distil_baseline_settings(place), "network", "seed")

    dataset, barycenter = single(w, "datasets"), efficiency_barycenter(w)
    return {
        "dataset": dataset,
        "methods": {p.method: settings(p) for p in efficiency_methods(w)},
        "barycenter": entry("barycenters", barycenter, dataset) if barycenter else None,
        "iterations": figure_of(w).get("iterations", 100),
        "seed": config["seed"],
    }


@settings_for
def tabulate_efficiency_settings(w):
    dataset, methods = single(w, "datasets"), [p.method for p in efficiency_methods(w)]
    return {
        "title": figure_of(w).get("title", w.figure),
        "dataset": dataset,
        "dataset_title": titles_of([dataset])[dataset],
        "methods": methods,  # in their order, which is none of the measurement
        "labels": method_labels(methods),
        "projected_iterations": figure_of(w).get("projected_iterations", 2000),
        "published": content_of("report/published_efficiency.csv"),
        "measured": measuring(w),
    }


def cost_cells(w):
    """The cells of the cost table: wildcards of `evaluate_student` but for the recipe."""
    cells, spec = [], figure_of(w)
    for dataset in spec["datasets"]:
        settings = resolved(pick(spec, "methods", "ipc"), dataset, f"figures.{w.figure}")
        for ipc, method in itertools.product(settings["ipc"], list(expand_methods(settings["methods"]))):
            if entry("methods", method, dataset)["kind"] == "real":
                stop(f"figures.{w.figure}.methods: {method} makes no distilled set; remove it")
            place = {"dataset": dataset, "method": method, "ipc": str(ipc), "student": spec["student"]}
            cells.append({**place, "seeds": config["student_seeds"]})
    return cells


def cost_recipes(w):
    """soft, hard → the recipe of the figure with such labels."""
    dataset, *_ = figure_of(w)["datasets"]
    found = {entry("recipes", r, dataset)["labels"]: r for r in figure_of(w)["recipes"]}
    if sorted(found) != ["hard", "soft"] or len(figure_of(w)["recipes"]) != 2:
        stop(f"figures.{w.figure}.recipes: give two recipes, one with soft and one with hard labels")
    return found


def tabulate_cost_input(w):
    cells = cost_cells(w)
    tested = {labels: [{**c, "recipe": recipe} for c in cells] for labels, recipe in cost_recipes(w).items()}
    return {
        "soft": evaluations(tested["soft"]),
        "hard": evaluations(tested["hard"]),
        "images": [DISTILLED.format(**cell) for cell in cells],
        "png": [DISTILLED_PNG.format(**cell) for cell in cells],
        "labels": [LABELS.format(**cell) for cell in tested["soft"]],
    }


def cost_benchmarks(cell, recipe):
    """step → its benchmark files, as a path with {} and what stands there: names, or so many numbers.

    Benchmark files are no inputs: one that was lost is shown as missing, and costs no job its rerun. They are
    thousands where classes are.
    """
    place = SimpleNamespace(**cell)
    method, place.teacher = method_of(place), teacher_of(place)
    folder = f"{cell['method']}/ipc{cell['ipc']}"
    student = f"{cell['dataset']}/{recipe}/{folder}/{cell['student']}"
    found = {
        "recovery": (f"{MAKERS[method['kind']]}/{cell['dataset']}/{folder}/shard{{}}", len(shards_of(place))),
        "relabel": (f"relabel_images/{cell['dataset']}/{recipe}/{folder}", 1),
        "training": (f"evaluate_student/{student}/seed{{}}", cell["seeds"]),
    }
    if needs_atoms(method):
        blocks = dict.fromkeys(block_of(c, cell["dataset"]) for c in range(class_total(cell["dataset"])))
        part = f"{cell['dataset']}/{place.teacher}/{method['barycenter']}/ipc{cell['ipc']}"
        found["barycenters"] = (f"compute_barycenter/{part}/class{{}}", list(blocks))
    return {step: [f"{BENCHMARKS}/{path}.tsv", parts] for step, (path, parts) in found.items()}


@settings_for
def tabulate_cost_settings(w):
    cells, recipes = cost_cells(w), cost_recipes(w)
    return {
        "title": figure_of(w).get("title", w.figure),
        "cells": [{**cell, "benchmarks": cost_benchmarks(cell, recipes["soft"])} for cell in cells],
        "recipes": recipes,
        "expected": {
            labels: expected_digests(evaluating({**cell, "recipe": recipe} for cell in cells))
            for labels, recipe in recipes.items()
        },
        "labels": {
            "datasets": tell_apart(titles_of({c["dataset"] for c in cells})),
            "methods": method_labels(c["method"] for c in cells),
            "held_out": held_out({c["dataset"] for c in cells}),
        },
    }


@functools.cache
def preset_config(name):
    """A preset laid over config.yaml as Snakemake merges them, and prepared; `default` is config.yaml alone."""
    merged = {}
    for file in ["config.yaml", *([] if name == "default" else [f"presets/{name}.yaml"])]:
        update_config(merged, read_yaml(file))
    try:
        return prepare(merged, read_yaml("schemas/config.schema.yaml"))
    except ConfigError as error:
        stop(f"preset {name}: {error}")


def read_yaml(path):
    """A YAML file of this project."""
    try:
        with open(os.path.join(workflow.basedir, path), encoding="utf-8") as file:
            return yaml.safe_load(file)
    except FileNotFoundError:
        stop(f"there is no file {path}; `default` is config.yaml, other names are those of presets/")


@settings_for
def tabulate_hyperparameters_settings(w):
    """What squeeze and recover read, for each dataset that each of the presets defines."""
    columns = []
    for preset in figure_of(w)["presets"]:
        merged = preset_config(preset)
        for method in figure_of(w)["methods"]:
            if method not in merged["methods"]:
                stop(f"figures.{w.figure}.methods: the preset {preset} has no method {method}; remove it")
            if merged["methods"][method]["kind"] != "recover":
                stop(
                    f"figures.{w.figure}.methods: {method} is not recovered by the loop of Table 6; remove it"
                )
        own = read_yaml("config.yaml" if preset == "default" else f"presets/{preset}.yaml")
        datasets = {
            name: resolved(merged["datasets"][name], name, f"{preset}: datasets.{name}")
            for name in own.get("datasets", {})
        }
        if not datasets:
            stop(f"figures.{w.figure}.presets: {preset} defines no dataset; remove it")
        titles = tell_apart({name: dataset.get("title", name) for name, dataset in datasets.items()})
        for name, dataset in datasets.items():
            columns.append(
                {
                    "preset": preset,
                    "dataset": name,
                    "title": titles[name],
                    "resolution": dataset["resolution"],
                    "squeeze": resolved(merged["teachers"][dataset["teacher"]], name, f"{preset}: teachers"),
                    "recover": {
                        m: resolved(merged["methods"][m], name, f"{preset}: methods.{m}")
                        for m in figure_of(w)["methods"]
                    },
                }
            )
    return {
        "title": figure_of(w).get("title", w.figure),
        "columns": columns,
        "labels": method_labels(figure_of(w)["methods"]),
    }


def page_items(page):
    """The tables and figures of a page, in order, each with what the page says of it."""
    items = []
    for name in config["page"] if page == "index" else config.get("paper", []):
        spec = config["tables" if name in config["tables"] else "figures"][name]
        kind = "table" if is_table(name) else "figure"
        items.append({"name": name, "kind": kind, **pick(spec, "title", "caption")})
    return items


def descriptions_of(items):
    """The descriptions of the datasets that tables and figures are of."""
    tables = config["tables"]
    specs = [tables.get(name) or config["figures"][name] for name in items]
    datasets = {d for s in specs for d in (tables[s["table"]] if "table" in s else s).get("datasets", [])}
    return [DESCRIPTION.format(dataset=d) for d in config["datasets"] if d in datasets]


def target_files(items):
    """What a target asks for: its tables and figures, and the descriptions that all they show rests on.

    One that could not be made anew, of other images for instance, is gone, and what was made of the old one is
    younger than all its inputs: it would count as up to date.
    """
    return [*(file for name in items for file in item_files(name)), *descriptions_of(items)]


def page_names(page):
    return [item["name"] for item in page_items(page)]


def page_input(w):
    items = page_names(w.page)
    return {"parts": [item_files(name)[0] for name in items], "descriptions": descriptions_of(items)}


def displayed(path):
    """A file as the user would name it: from the project's folder or from here, where it lies below."""
    for folder in (workflow.basedir, os.curdir):
        relative = os.path.relpath(path, folder)
        if not relative.startswith(os.pardir):
            return relative
    return str(path)


@settings_for
def build_page_settings(w):
    return {
        "page": w.page,
        "labels": {**appearance(), "held_out": held_out(config["datasets"])},
        "swept": swept_of(config["methods"]),
        "items": page_items(w.page),
        "config": config,
        "laid_over": [displayed(path) for path in workflow.overwrite_configfiles],
        "overridden": [
            f"{key}={value if isinstance(value, str) else canonical(value)}"
            for key, value in (workflow.config_settings.config or {}).items()
        ],
        "template": content_of("report/page.html"),
    }


# ---- analysis --------------------------------------------------------------------------------


def single(w, key):
    """The one value that a figure lists under `key`."""
    values = figure_of(w).get(key, [])
    if len(values) != 1:
        stop(f"figures.{w.figure}.{key} lists {len(values)} values; give this kind of figure exactly one")
    return values[0]


def figure_sets(w):
    """The distilled sets that a figure compares, as wildcards: size by size, method by method."""
    dataset, methods = single(w, "datasets"), list(expand_methods(figure_of(w)["methods"]))
    for method in methods:
        if entry("methods", method, dataset)["kind"] == "real":
            stop(f"figures.{w.figure}.methods: {method} makes no distilled set; remove it")
    return [{"dataset": dataset, "method": m, "ipc": str(i)} for i in figure_of(w)["ipc"] for m in methods]


def making_sets(w, recipe=None):
    """The jobs, (rule, wildcards), that make the sets of a figure, and their labels if there is a recipe."""
    if not recipe:
        return [("gather_images", place) for place in figure_sets(w)]
    return [("relabel_images", {**place, "recipe": recipe}) for place in figure_sets(w)]


def method_labels(methods):
    """method → what people read; methods of one label, of a sweep for instance, are told apart."""
    return tell_apart({m: label_of("methods", m) for m in methods})


def stored_features(dataset):
    """The features of the dataset's own teacher, and where each class begins in them."""
    place = {"dataset": dataset, "teacher": labeller_of(dataset)}
    return {"features": FEATURES.format(**place), "index": FEATURE_INDEX.format(**place)}


MEASURED_BY = {
    "distances": "measure_distances",
    "tsne": "embed_tsne",
    "efficiency": "measure_efficiency",
}


def measuring(w):
    """What the measurement that is drawn or tabulated is made by, as `making_table`."""
    return made_by(MEASURED_BY[figure_of(w)["kind"]], w)


def measure_distances_input(w):
    dataset, figure = single(w, "datasets"), figure_of(w)
    files = {
        "description": DESCRIPTION.format(dataset=dataset),
        "teacher": TEACHER.format(dataset=dataset, teacher=labeller_of(dataset)),
        **stored_features(dataset),
        "images": [DISTILLED.format(**s) for s in figure_sets(w)],
    }
    if "student" in figure:
        files["train"] = real_images(dataset)
        recipe = figure["recipe"]
        labels = entry("recipes", recipe, dataset)["labels"]
        if labels == "online":
            stop(f"figures.{w.figure}.recipe: {recipe} stores no labels; give one with labels: soft or hard")
        if labels == "soft":
            files |= {
                "labels": [LABELS.format(**s, recipe=recipe) for s in figure_sets(w)],
                "labels_header": [LABELS_HEADER.format(**s, recipe=recipe) for s in figure_sets(w)],
            }
    return files


@settings_for
def measure_distances_settings(w):
    dataset, figure = single(w, "datasets"), figure_of(w)
    teacher = labeller_of(dataset)
    measured_by = ("extract_features", {"dataset": dataset, "teacher": teacher})
    recipe = figure["recipe"] if "student" in figure else None
    settings = {"expected": expected_digests([measured_by, *making_sets(w, recipe)])}
    if not recipe:
        return settings
    place = {**figure_sets(w)[0], "recipe": recipe, "student": figure["student"]}  # alike for all sets
    return {**settings, **evaluate_student_settings(SimpleNamespace(**place))}


@settings_for
def plot_distances_settings(w):
    methods = list(dict.fromkeys(s["method"] for s in figure_sets(w)))
    return {
        "labels": method_labels(methods),
        "methods": methods,  # in their order, which is none of the measurement
        "ipc": figure_of(w)["ipc"],
        "measured": measuring(w),
    }


def embed_tsne_input(w):
    dataset = single(w, "datasets")
    return {
        "description": DESCRIPTION.format(dataset=dataset),
        "images": [DISTILLED.format(**s) for s in figure_sets(w)],
        "train": real_images(dataset),
    }


@settings_for
def embed_tsne_settings(w):
    dataset, figure = single(w, "datasets"), figure_of(w)
    single(w, "ipc")
    if len(figure.get("classes", [])) > CLASSES_SHOWN:
        stop(f"figures.{w.figure}.classes: a map has colours for {CLASSES_SHOWN} classes; name no more")
    teacher = labeller_of(dataset)
    schedule = without(entry("teachers", teacher, dataset), "architecture", "width", "depth", "weights")
    if "epochs" not in schedule:
        stop(f"figures.{w.figure}: teachers.{teacher} has no schedule to train with; give it epochs")
    return {
        "figure": pick(figure, "classes", "images"),
        "expected": expected_digests(making_sets(w)),
        "schedule": schedule,
        "student": network_entry("students", figure["student"], dataset),
        "flip": flips(dataset),
        "seed": config["seed"],
    }


@settings_for
def plot_tsne_settings(w):
    return plot_distances_settings(w)


def trace_barycenters_input(w):
    return stored_features(single(w, "datasets"))


@settings_for
def trace_barycenters_settings(w):
    dataset = single(w, "datasets")
    teacher = labeller_of(dataset)
    place = {"dataset": dataset, "teacher": teacher}
    return {
        "figure": {"ipc": figure_of(w)["ipc"], **pick(figure_of(w), "classes", "iterations")},
        "barycenters": {b: entry("barycenters", b, dataset) for b in figure_of(w)["barycenters"]},
        "expected": expected_digests([("extract_features", place)]),
        "dataset": dataset,
        "seed": config["seed"],
    }
