"""Tables, figures and the page: everything is drawn from artefacts, and from nothing else."""

# ---- accuracy tables -------------------------------------------------------------------------


@functools.cache
def table_cells(table):
    """The cells of an accuracy table: wildcards of `evaluate_student`, a list of seeds beside each."""
    spec, cells = config["tables"][table], []
    seeds = spec.get("seeds", config["student_seeds"])
    for dataset in known("datasets", spec["datasets"]):
        settings = resolve_lists(spec, dataset, table)
        for method in expand_methods(settings["methods"]):
            real = entry("methods", method, dataset)["kind"] == "real"
            recipes = [REAL["recipe"]] if real else list(known("recipes", settings["recipes"]))
            ipcs = [REAL["ipc"]] if real else settings["ipc"]
            for recipe, ipc, student in itertools.product(recipes, ipcs, known("students", settings["students"])):
                place = {"dataset": dataset, "recipe": recipe, "method": method, "ipc": str(ipc), "student": student}
                cells.append({**place, "seeds": seeds})
    return cells


def known(block, listed):
    """The names in `listed`, each checked to be an entry of `block`."""
    for name in listed:
        if name not in config[block]:
            raise WorkflowError(f"config: {block}: {unknown(name, config[block])}")
        yield name


def resolve_lists(spec, dataset, name):
    try:
        return resolve(spec, dataset, f"tables.{name}")
    except ConfigError as error:
        raise WorkflowError(f"config: {error}") from None


def evaluations(table):
    """The evaluation files of a table, cell by cell and seed by seed."""
    return [EVALUATION.format(**cell, seed=s) for cell in table_cells(table) for s in range(cell["seeds"])]


RULES_BEFORE = (
    "pretrain_teacher",
    "extract_features",
    "compute_barycenter",
    "recover_images",
    "select_images",
    "gather_images",
    "relabel_images",
    "evaluate_student",
    "evaluate_all_real",
)


def expected_digests(cells):
    """rule → digests of settings and code that an artefact of these cells may carry in its lineage.

    What a table is made of must have been made by this configuration; anything else is refused.
    """
    found = {rule: set() for rule in RULES_BEFORE}

    def expect(rule, **wildcards):
        found[rule].add(digest([SETTINGS[rule](SimpleNamespace(**wildcards)), code_of(rule)]))

    for cell in cells:
        w = {k: v for k, v in cell.items() if k != "seeds"}
        method = entry("methods", w["method"], w["dataset"])
        kind = method["kind"]
        for teacher in {labeller_of(SimpleNamespace(**w)), teacher_of(SimpleNamespace(**w))}:
            expect("pretrain_teacher", **w, teacher=teacher)
        expect("extract_features", **w)
        if kind == "real":
            expect("evaluate_all_real", **w)
            continue
        if method.get("barycenter"):
            expect("compute_barycenter", **w, barycenter=method["barycenter"])
        if kind == "recover":
            for shard in range(shard_total(SimpleNamespace(**w))):
                expect("recover_images", **w, shard=shard)
        elif kind == "select":
            expect("select_images", **w)
        for rule in ("gather_images", "relabel_images", "evaluate_student"):
            expect(rule, **w)
    return {rule: sorted(digests) for rule, digests in found.items() if digests}


def label_of(block, name):
    return config[block].get(name, {}).get("label", name)


def titles_of(datasets):
    return {d: config["datasets"][d].get("title", d) for d in datasets}


@settings_for
def tabulate_accuracy_settings(w):
    cells = table_cells(w.table)
    spec = config["tables"][w.table]
    return {
        "name": w.table,
        "title": spec.get("title", w.table),
        "cells": cells,
        "expected": expected_digests(cells),
        "labels": {
            "datasets": titles_of({c["dataset"] for c in cells}),
            "methods": {c["method"]: label_of("methods", c["method"]) for c in cells},
            "students": {c["student"]: label_of("students", c["student"]) for c in cells},
            "recipes": {c["recipe"]: label_of("recipes", c["recipe"]) for c in cells},
        },
        "swept": {m: config["methods"][m]["swept"] for m in {c["method"] for c in cells} if "swept" in config["methods"][m]},
    }


rule tabulate_accuracy:
    input:
        evaluations=lambda w: evaluations(w.table),
        published=workflow.source_path("../report/published.csv"),
    output:
        csv=report(TABLE + ".csv", category="Tables", caption="../report/table.rst", labels={"table": "{table}", "format": "CSV"}),
        md=TABLE + ".md",
        tex=TABLE + ".tex",
    params:
        settings=settings_of("tabulate_accuracy"),
        code=code_of("tabulate_accuracy"),
        job=describe_job,
    log:
        log_of("tabulate_accuracy", "{table}"),
    benchmark:
        benchmark_of("tabulate_accuracy", "{table}")
    message:
        "Table {wildcards.table}"
    shell:
        JOB


# ---- figures ---------------------------------------------------------------------------------


def figures_of_kind(kind):
    return names(n for n, f in config["figures"].items() if f["kind"] == kind)


def figure_of(w):
    return config["figures"][w.figure]


def appearance():
    """Names of methods and datasets as people read them; a method has one colour everywhere."""
    return {
        "methods": {m: label_of("methods", m) for m in config["methods"]},
        "datasets": titles_of(config["datasets"]),
    }


@settings_for
def plot_accuracy_settings(w):
    return {"figure": figure_of(w), "labels": appearance()}


rule plot_accuracy:
    input:
        table=lambda w: TABLE.format(table=figure_of(w)["table"]) + ".csv",
    output:
        png=report(FIGURE + ".png", category="Figures", caption="../report/figure.rst", labels={"figure": "{figure}"}),
        pdf=FIGURE + ".pdf",
        csv=FIGURE + ".csv",
    wildcard_constraints:
        figure=figures_of_kind("accuracy"),
    params:
        settings=settings_of("plot_accuracy"),
        code=code_of("plot_accuracy"),
        job=describe_job,
    log:
        log_of("plot_accuracy", "{figure}"),
    benchmark:
        benchmark_of("plot_accuracy", "{figure}")
    message:
        "Figure {wildcards.figure}"
    shell:
        JOB


def gallery_input(w):
    figure = figure_of(w)
    (dataset,) = known("datasets", figure["datasets"])
    sets = {
        "images": [
            DISTILLED.format(dataset=dataset, method=m, ipc=i)
            for i in figure["ipc"]
            for m in expand_methods(figure["methods"])
        ],
        "description": DESCRIPTION.format(dataset=dataset),
    }
    train = real_images(SimpleNamespace(dataset=dataset))
    return {**sets, **({"train": train} if train else {})}


@settings_for
def plot_gallery_settings(w):
    return {"figure": figure_of(w), "labels": appearance()}


rule plot_gallery:
    input:
        unpack(gallery_input),
    output:
        png=report(FIGURE + ".png", category="Figures", caption="../report/figure.rst", labels={"figure": "{figure}"}),
        pdf=FIGURE + ".pdf",
        csv=FIGURE + ".csv",
    wildcard_constraints:
        figure=figures_of_kind("gallery"),
    params:
        settings=settings_of("plot_gallery"),
        code=code_of("plot_gallery"),
        job=describe_job,
    log:
        log_of("plot_gallery", "{figure}"),
    benchmark:
        benchmark_of("plot_gallery", "{figure}")
    message:
        "Figure {wildcards.figure}"
    shell:
        JOB


# ---- the page --------------------------------------------------------------------------------


def page_items(page):
    """The tables and figures of a page, in order, each with what the page says of it."""
    items = []
    for name in config["page"] if page == "index" else config.get("paper", []):
        if name in config["tables"]:
            spec, kind = config["tables"][name], "table"
        elif name in config["figures"]:
            spec, kind = config["figures"][name], "figure"
        else:
            raise WorkflowError(f"config: page: {unknown(name, [*config['tables'], *config['figures']])}")
        items.append({"name": name, "kind": kind, **pick(spec, "title", "caption")})
    return items


def page_input(w):
    files = {"template": workflow.source_path("../report/page.html"), "parts": []}
    for item in page_items(w.page):
        if item["kind"] == "table":
            files["parts"].append(TABLE.format(table=item["name"]) + ".csv")
        else:
            files["parts"].append(FIGURE.format(figure=item["name"]) + ".png")
    return files


@settings_for
def build_page_settings(w):
    return {"page": w.page, "items": page_items(w.page), "config": config}


rule build_page:
    input:
        unpack(page_input),
    output:
        page=report(PAGE, category="Page", caption="../report/page.rst"),
    params:
        settings=settings_of("build_page"),
        code=code_of("build_page"),
        job=describe_job,
    log:
        log_of("build_page", "{page}"),
    benchmark:
        benchmark_of("build_page", "{page}")
    message:
        "Page {output.page}"
    shell:
        JOB


# `snakemake main`, `snakemake gallery`: each table and figure has a target of its own name.
for _name in config["tables"]:

    rule:
        name:
            _name
        input:
            TABLE.format(table=_name) + ".csv",


for _name in config["figures"]:

    rule:
        name:
            _name
        input:
            FIGURE.format(figure=_name) + ".png",


rule all_paper:
    input:
        PAGE.format(page="paper"),
