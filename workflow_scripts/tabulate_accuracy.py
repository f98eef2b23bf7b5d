"""Accuracy tables: mean and deviation over students or sets, cell by cell, beside the published figures.

A table is made of evaluations of this configuration and of nothing else: an artefact of another cell,
of other settings, code or data is refused by its file name.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wmdd_core.artifacts import read_json, write_csv, write_text
from wmdd_core.errors import UserError
from wmdd_core.metrics import format_mean_sd, mean_and_sd
from wmdd_core.terms import tell_apart
from workflow_scripts.checks import ALL, check_dataset, check_lineage, check_place
from workflow_scripts.job import Job, listed, run
from workflow_scripts.plain_tables import MISSING, Row, escape, read_rows, symbol

COLUMNS = (
    "dataset",
    "ipc",
    "method",
    "student",
    "recipe",
    "labels",
    "n_sets",
    "n_seeds",
    "top1_mean",
    "top1_sd",
    "top5_mean",
    "top5_sd",
    "published_top1",
    "published_source",
)
PLACE = ("dataset", "recipe", "method", "ipc", "student")

# ---- read and check --------------------------------------------------------------------------

PUBLISHED = Path(__file__).parent.parent / "report" / "published.csv"
"""Published figures; the rule's settings hold a digest of this file."""


def read_evaluation(path: str) -> dict | None:
    """An evaluation with its header, or None where there is no file."""
    if not Path(path).exists():
        return None
    try:
        content = read_json(path)
        content["header"]["wildcards"], content["header"]["lineage"]
        content["top1"], content["top5"], content["labels"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no evaluation of a student ({error}); delete it and run snakemake again"
        ) from error
    return content


def read_cells(paths: Sequence[str], cells: Sequence[Mapping], expected: Mapping) -> list[list[dict]]:
    """The checked evaluations of each set of `cells`; `paths` holds them set by set and seed by seed."""
    paths, first, found = iter(paths), {}, []
    for cell in cells:
        found.append([])
        for seed in range(cell["seeds"]):
            path = next(paths)
            evaluation = read_evaluation(path)
            if evaluation is None:
                continue
            header = evaluation["header"]
            check_place(path, header, {**{k: cell[k] for k in PLACE}, "seed": str(seed)})
            check_lineage(path, header, expected)
            check_dataset(path, header, first)
            found[-1].append(evaluation)
    return found


def read_published(path: str) -> dict[tuple[str, ...], Row]:
    """`PLACE` → published figure; two figures for one place are an error."""
    found = {}
    for row in read_rows(path):
        key = tuple(row[k] for k in PLACE)
        if key in found:
            raise UserError(f"{path} has two figures for {', '.join(key)}; keep one")
        found[key] = row
    return found


# ---- the table -------------------------------------------------------------------------------


def merge_sets(
    cells: Sequence[Mapping], evaluations: Sequence[list[dict]]
) -> Iterable[tuple[dict[str, str], list[list[dict]]]]:
    """The place of each line of the table, with the evaluations of each of its sets.

    A cell names its set (`wmdd@1`) and the method's entry (`wmdd`); the sets of one line follow each other.
    """

    def place(pair: tuple[Mapping, list[dict]]) -> dict[str, str]:
        return {k: pair[0]["entry" if k == "method" else k] for k in PLACE}

    for line, pairs in itertools.groupby(zip(cells, evaluations, strict=True), place):
        yield line, [found for _, found in pairs]


def summarise(place: Mapping[str, str], sets: Sequence[Sequence[Mapping]], published: Mapping) -> Row:
    """One line: mean and sample deviation; empty, never zero, where there is no evaluation.

    Over the students of a single set; of several, over the sets, each by the mean of its students.
    """
    row = dict.fromkeys(COLUMNS, "") | dict(place)
    several, sets = len(sets) > 1, [found for found in sets if found]
    evaluations = [e for found in sets for e in found]
    row["labels"] = "/".join(dict.fromkeys(e["labels"] for e in evaluations))
    row["n_sets"], row["n_seeds"] = str(len(sets)), str(len(evaluations))
    for key in ("top1", "top5"):
        values = [[e[key] for e in found] for found in sets]
        values = [statistics.fmean(v) for v in values] if several else list(itertools.chain(*values))
        if values:
            mean, sd = mean_and_sd(values)
            row[f"{key}_mean"] = f"{mean:.4f}"
            row[f"{key}_sd"] = "" if sd is None else f"{sd:.4f}"
    figure = published.get(tuple(place[k] for k in PLACE))
    if figure:
        row["published_top1"], row["published_source"] = figure["top1"], figure["source"]
    return row


@dataclass(frozen=True)
class Pivot:
    """A table for people.

    stub: names of the leading columns; columns: (dataset, ipc) as they are read;
    groups: (title or "", [(stub texts, one CSV line or None for each column)]).
    """

    stub: list[str]
    columns: list[tuple[str, str]]
    groups: list[tuple[str, list[tuple[list[str], list[Row | None]]]]]


def pivot(rows: Sequence[Row], labels: Mapping, swept: Mapping) -> Pivot:
    """Methods as rows, dataset × images per class as columns, groups where students or recipes differ.

    labels: block → name → what people read; swept: method → {key, value} of the members of a sweep.
    """
    datasets = names_read(rows, "dataset", labels)
    order = list(datasets)
    columns = sorted(
        {(r["dataset"], r["ipc"]) for r in rows},
        key=lambda c: (order.index(c[0]), c[1] == ALL, _number(c[1])),
    )
    methods = list(dict.fromkeys(r["method"] for r in rows))
    head, stubs = stubs_of(methods, labels.get("methods", {}), swept)
    return Pivot(
        head,
        [(datasets[d], ALL if i == ALL else f"IPC {i}") for d, i in columns],
        [
            (title, [(stubs[m], [line.get(c) for c in columns]) for m, line in lines.items()])
            for title, lines in grouped(rows, labels).items()
        ],
    )


def names_read(rows: Sequence[Row], key: str, labels: Mapping) -> dict[str, str]:
    """Name → what people read, for the datasets, students or recipes (`key`) of the lines, in their order."""
    read = labels.get(f"{key}s", {})
    return tell_apart({n: read.get(n, n) for n in dict.fromkeys(r[key] for r in rows)})


def grouped(rows: Sequence[Row], labels: Mapping) -> dict[str, dict[str, dict[tuple[str, str], Row]]]:
    """Title → method → (dataset, images per class) → line.

    The ceiling has a recipe of its own; it heads each group of its student.
    """
    students, recipes = names_read(rows, "student", labels), names_read(rows, "recipe", labels)
    distilled = [r for r in rows if r["ipc"] != ALL]
    several_recipes = len({r["recipe"] for r in distilled}) > 1
    groups: dict[str, dict[str, dict]] = {}
    for row in rows:
        own = [r["recipe"] for r in distilled if r["student"] == row["student"]] if row["ipc"] == ALL else []
        for recipe in dict.fromkeys(own or [row["recipe"]]):
            parts = [students[row["student"]]] if len(students) > 1 else []
            parts += [f"recipe {recipes[recipe]}"] if several_recipes else []
            line = groups.setdefault(", ".join(parts), {}).setdefault(row["method"], {})
            line[row["dataset"], row["ipc"]] = row
    return groups


def stubs_of(
    methods: Sequence[str], names: Mapping[str, str], swept: Mapping
) -> tuple[list[str], dict[str, list[str]]]:
    """Heads of the leading columns, and method → what stands there: its name, and a sweep's value."""
    single = tell_apart({m: names.get(m, m) for m in methods if m not in swept})  # others have their values
    keys = {swept[m]["key"] for m in methods if m in swept}
    if not keys:
        return ["Method"], {m: [single[m]] for m in methods}

    def value(member: Mapping) -> str:
        return f"{member['value']}" if len(keys) == 1 else f"{symbol(member['key'])} = {member['value']}"

    head = symbol(next(iter(keys))) if len(keys) == 1 else "setting"
    return ["Method", head], {
        m: [names.get(m, m), value(swept[m])] if m in swept else [single[m], ""] for m in methods
    }


@dataclass(frozen=True)
class Folded:
    """A `Pivot` whose ceilings span the columns of their dataset, where there are others.

    spans: (dataset, number of columns); columns: images per class;
    groups: as in `Pivot`, a cell being (CSV line or None, number of columns).
    """

    spans: list[tuple[str, int]]
    columns: list[str]
    groups: list[tuple[str, list[tuple[list[str], list[tuple[Row | None, int]]]]]]


def fold(table: Pivot) -> Folded:
    """Drop the columns "all" where a dataset has others, and let their cells span these."""
    datasets = list(dict.fromkeys(d for d, _ in table.columns))
    blocks = []
    for dataset in datasets:
        places = [n for n, c in enumerate(table.columns) if c[0] == dataset]
        ceilings = [n for n in places if table.columns[n][1] == ALL]
        kept = [n for n in places if n not in ceilings] or places
        blocks.append((dataset, kept, ceilings))

    def cells(line: list[Row | None]) -> Iterable[tuple[Row | None, int]]:
        for _, kept, ceilings in blocks:
            spanning = [line[n] for n in ceilings if line[n] is not None]
            yield from [(spanning[0], len(kept))] if spanning else [(line[n], 1) for n in kept]

    return Folded(
        [(d, len(kept)) for d, kept, _ in blocks],
        [table.columns[n][1] for _, kept, _ in blocks for n in kept],
        [(t, [(stub, list(cells(line))) for stub, line in members]) for t, members in table.groups],
    )


def _number(ipc: str) -> int:
    return int(ipc) if ipc.isdigit() else 0


def measured(row: Row) -> str:
    """ "87.3 ± 0.4", "87.3" for a single seed, "–" where nothing was measured."""
    if not row["top1_mean"]:
        return MISSING
    return format_mean_sd(float(row["top1_mean"]), float(row["top1_sd"]) if row["top1_sd"] else None)


def cell_text(row: Row | None) -> str:
    """A cell with the published figure in parentheses; empty where the table asks for nothing."""
    if row is None:
        return ""
    return measured(row) + (f" ({row['published_top1']})" if row["published_top1"] else "")


def describe(rows: Sequence[Row], labels: Mapping) -> str:
    """What the numbers are, as a sentence or two under the table."""
    distilled = [r for r in rows if r["ipc"] != ALL]
    text = f"Top-1 accuracy (%) on {tested_on(rows, labels)}{deviations(rows)}"
    for word, block, key in (("student", "students", "student"), ("recipe", "recipes", "recipe")):
        names = list(dict.fromkeys(r[key] for r in distilled))
        if len(names) == 1:
            text += f"; {word} {labels.get(block, {}).get(names[0], names[0])}"
    kinds = list(dict.fromkeys(r["labels"] for r in distilled if r["labels"]))
    text += f"; {' and '.join(kinds)} labels." if kinds else "."
    if {r["ipc"] for r in rows} - {ALL}:
        text += " IPC: images per class."
    if len(distilled) < len(rows):
        text += " Students on all real images are trained with hard labels and their own recipe."
    if any(not r["top1_mean"] for r in rows):
        text += f" {MISSING}: not measured."
    sources = sorted({r["published_source"] for r in rows if r["published_source"]})
    if sources:
        text += f" In parentheses: the published figure ({', '.join(sources)})."
    return text


def tested_on(rows: Sequence[Row], labels: Mapping) -> str:
    """The images that the numbers are of; `labels["held_out"]` are datasets whose test set is left unread."""
    datasets = list(dict.fromkeys(r["dataset"] for r in rows))
    held_out = [d for d in datasets if d in labels.get("held_out", ())]
    part = "a held-out part of the training set"
    if len(held_out) == len(datasets):
        return part
    names = ", ".join(labels.get("datasets", {}).get(d, d) for d in held_out)
    return "the real test set" + (f" ({names}: {part})" if held_out else "")


def deviations(rows: Sequence[Row]) -> str:
    """What the mean and the deviation of the cells are taken over."""
    filled = [r for r in rows if r["n_seeds"] != "0"]
    several = [r for r in filled if int(r["n_sets"]) > 1]
    if not filled:
        return ""
    students = _span(int(r["n_seeds"]) / int(r["n_sets"]) for r in several or filled)
    over = ", mean ± sample standard deviation over"
    if not several and students == "1":
        return ", one student trained from scratch for each cell"
    if not several:
        return f"{over} {students} students trained from scratch on the same images"
    sets = _span(int(r["n_sets"]) for r in several)
    each = "with one student" if students == "1" else f"by the mean of {students} students"
    rest = "; of a single set, over its students" if several != filled else ""
    return f"{over} {sets} sets of images made with different seeds, each {each} trained from scratch{rest}"


def _span(numbers: Iterable[float]) -> str:
    """ "3", or "2 to 3"."""
    found = sorted(set(numbers))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def provenance(evaluations: Sequence[Mapping]) -> str:
    """Commit, seeds and versions of what a table is made of, as one line."""
    headers = [e["header"] for e in evaluations]
    if not headers:
        return "No evaluation was found."
    commits = dict.fromkeys(h["commit"] for h in headers)
    seeds = sorted({int(h["wildcards"]["seed"]) for h in headers})
    versions = dict.fromkeys(f"{k} {v}" for h in headers for k, v in sorted(h["versions"].items()))
    devices: dict[str, set[str]] = {}
    for rule, device in (found for h in headers for found in h.get("devices", {}).items()):
        devices.setdefault(device, set()).add(rule)
    used = (
        list(devices) if len(devices) == 1 else [f"{d} ({', '.join(sorted(r))})" for d, r in devices.items()]
    )
    return (
        f"Made from {len(headers)} evaluations; student seeds {', '.join(map(str, seeds))};"
        f" device {', '.join(used) or 'unknown'}; commit {', '.join(commits)}; {', '.join(versions)}."
    )


# ---- formats ---------------------------------------------------------------------------------


def as_markdown(table: Pivot, title: str, *notes: str) -> str:
    """A pipe table with its notes."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |"

    width = len(table.stub) + len(table.columns)
    lines = [f"# {title}", "", line([*table.stub, *(f"{d}, {i}" for d, i in table.columns)])]
    lines.append(line(["---"] * len(table.stub) + ["---:"] * len(table.columns)))
    for group, members in table.groups:
        if group:
            lines.append(line([f"**{group}**", *[""] * (width - 1)]))
        lines += [line([*stub, *map(cell_text, cells)]) for stub, cells in members]
    return "\n".join([*lines, *(part for note in notes for part in ("", note))]) + "\n"


def as_latex(table: Pivot, *notes: str) -> str:
    """A `tabular` to be \\input into a paper that loads booktabs."""
    stub, folded = len(table.stub), fold(table)
    width = stub + len(folded.columns)

    def line(texts: Iterable[str]) -> str:
        return " & ".join(texts) + r" \\"

    def spanning(text: str, columns: int, where: str) -> str:
        return f"\\multicolumn{{{columns}}}{{{where}}}{{{text}}}" if columns > 1 else text

    rules, start = [], stub + 1
    for _, columns in folded.spans:
        rules.append(f"\\cmidrule(lr){{{start}-{start + columns - 1}}}")
        start += columns
    lines = [*(f"% {note}" for note in notes), "% needs \\usepackage{booktabs}"]
    lines += [f"\\begin{{tabular}}{{{'l' * stub}{'r' * len(folded.columns)}}}", "\\toprule"]
    lines.append(line([*[""] * stub, *(spanning(escape(d), n, "c") for d, n in folded.spans)]))
    lines += [" ".join(rules), line(map(escape, [*table.stub, *folded.columns]))]
    for title, members in folded.groups:
        lines.append("\\midrule")
        if title:
            lines.append(line([spanning(f"\\emph{{{escape(title)}}}", width, "l")]))
        for names, cells in members:
            texts = (spanning(escape(cell_text(row)), columns, "c") for row, columns in cells)
            lines.append(line([*map(escape, names), *texts]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def main(job: Job) -> None:
    settings = job.settings
    cells, labels = settings["cells"], settings["labels"]
    evaluations = read_cells(listed(job.input["evaluations"]), cells, settings["expected"])
    published = read_published(PUBLISHED)
    rows = [  # what is published was tested on the test set
        summarise(place, sets, {} if place["dataset"] in labels.get("held_out", ()) else published)
        for place, sets in merge_sets(cells, evaluations)
    ]

    table = pivot(rows, labels, settings["swept"])
    notes = (describe(rows, labels), provenance([e for found in evaluations for e in found]))
    write_csv(job.output["csv"], pd.DataFrame(rows, columns=list(COLUMNS)))
    write_text(job.output["md"], as_markdown(table, settings["title"], *notes))
    write_text(job.output["tex"], as_latex(table, *notes))
    print(as_markdown(table, settings["title"]))


if __name__ == "__main__":
    run(main)
