"""One self-contained page of all tables and figures, with how to rebuild each and what made them."""

from __future__ import annotations

import base64
import json
import os
import shlex
import struct
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from wmdd_core.artifacts import read_json, write_text
from wmdd_core.errors import UserError
from wmdd_core.machine import memory_and_system, processor_name
from workflow_scripts.job import Job, listed, run
from workflow_scripts.plain_tables import MISSING, Row, from_markdown, numeric_columns, read_rows
from workflow_scripts.tabulate_accuracy import COLUMNS, describe, fold, measured, pivot

TITLES = {"index": "WMDD results", "paper": "WMDD: the paper's tables and figures"}
PIXEL_RATIO = 2
"""Figures are drawn at twice the pixels that they take on a screen of ordinary density."""

FORMATS = {"table": ("csv", "md", "tex"), "figure": ("png", "pdf", "csv")}

CAPTIONS = {
    "accuracy": "Top-1 accuracy on real images kept for testing over the number of images per class: mean and"
    " sample standard deviation. A dashed line is the ceiling, a student trained on all real images; hollow"
    " markers are published figures.",
    "gallery": "Distilled images beside real training images, a class in each row, in the order in which they"
    " are stored. Where a set holds more images of a class than there is room for, the first are shown.",
}


# ---- tables ----------------------------------------------------------------------------------

TEMPLATE = Path(__file__).parent.parent / "report" / "page.html"
"""The page's template; the rule's settings hold a digest of this file."""


def cell(text: str, numeric: bool = True, published: str = "", span: int = 1, aligned: bool = False) -> dict:
    """A cell as the template prints it; `aligned` leaves room for a published figure that others have."""
    shown = {"text": text, "missing": text == MISSING, "numeric": numeric}
    return {**shown, "published": published, "span": span, "aligned": aligned}


def placed(line: Iterable[tuple[Row | None, int]]) -> Iterable[tuple[int, Row | None, int]]:
    """The cells of a line, each with the number of its first column."""
    place = 0
    for row, span in line:
        yield place, row, span
        place += span


def accuracy_cells(line: Sequence[tuple[Row | None, int]], aligned: set[int]) -> list[dict]:
    """The cells of one line; aligned: the columns that hold published figures."""
    return [
        cell(
            measured(row) if row else "",
            published=row["published_top1"] if row else "",
            span=span,
            aligned=span == 1 and place in aligned,
        )
        for place, row, span in placed(line)
    ]


def accuracy_table(rows: Sequence[Row], labels: Mapping, swept: Mapping) -> dict:
    """Head, groups of rows and note of an accuracy table, as the template prints them."""
    table = pivot(rows, labels, swept)
    folded = fold(table)
    lines = [line for _, members in folded.groups for _, line in members]
    aligned = {
        p for line in lines for p, row, span in placed(line) if span == 1 and row and row["published_top1"]
    }
    groups = [
        {"title": title, "rows": [{"stub": s, "cells": accuracy_cells(line, aligned)} for s, line in members]}
        for title, members in folded.groups
    ]
    return {
        "stub": table.stub,
        "spans": [{"text": d, "span": n} for d, n in folded.spans],
        "columns": [
            {"text": t, "numeric": True, "aligned": n in aligned} for n, t in enumerate(folded.columns)
        ],
        "groups": groups,
        "notes": [describe(rows, labels)],
    }


def plain_table(text: str) -> dict:
    """Any other table and its notes, from the Markdown that `plain_tables.write_table` writes."""
    shown, notes = from_markdown(text)
    numeric, (head, *lines) = numeric_columns(shown)[1:], shown
    rows = [
        {"stub": line[:1], "cells": [cell(t, numeric=n) for t, n in zip(line[1:], numeric, strict=True)]}
        for line in lines
    ]
    columns = [{"text": t, "numeric": n, "aligned": False} for t, n in zip(head[1:], numeric, strict=True)]
    return {
        "stub": head[:1],
        "spans": [],
        "columns": columns,
        "groups": [{"title": "", "rows": rows}],
        "notes": notes,
    }


def heading(name: str) -> str:
    return name.replace("_", " ")


# ---- the page --------------------------------------------------------------------------------


def image_of(path: str) -> dict:
    """A PNG as a data URI with its size on the page."""
    content = Path(path).read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"{path} is no PNG image; delete it and run snakemake again")
    width, height = struct.unpack(">II", content[16:24])
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"uri": uri, "width": round(width / PIXEL_RATIO), "height": round(height / PIXEL_RATIO)}


def command_of(name: str, settings: Mapping) -> str:
    """The command that makes a table or figure of this run again."""
    given = {"--configfile": settings["laid_over"], "--config": settings["overridden"]}
    options = (part for option, values in given.items() if values for part in (option, *values))
    return shlex.join(["snakemake", "--cores", "2", name, *options])


def build_item(item: Mapping, path: str, page: str, settings: Mapping) -> dict:
    """What the template needs to show one table or figure."""
    name, kind = item["name"], item["kind"]
    folder = os.path.dirname(page)
    files = [os.path.splitext(path)[0] + "." + f for f in FORMATS[kind]]
    shown = {
        "name": name,
        "kind": kind,
        "title": item.get("title", heading(name).capitalize()),
        "caption": item.get("caption", ""),
        "command": command_of(name, settings),
        "links": [
            (os.path.relpath(f, folder), Path(f).suffix[1:].upper()) for f in files if os.path.exists(f)
        ],
    }
    if kind == "figure":
        default = CAPTIONS.get(settings["config"]["figures"].get(name, {}).get("kind"), "")
        return {**shown, "caption": shown["caption"] or default, "image": image_of(path)}
    rows = read_rows(path)
    if rows and set(COLUMNS) <= set(rows[0]):
        return {**shown, "table": accuracy_table(rows, settings["labels"], settings["swept"])}
    return {**shown, "table": plain_table(Path(path).with_suffix(".md").read_text(encoding="utf-8"))}


def numbered(items: Iterable[dict]) -> list[dict]:
    """The items as "Table 1", "Figure 1", "Table 2", …"""
    counts: dict[str, int] = {}
    found = []
    for item in items:
        counts[item["kind"]] = counts.get(item["kind"], 0) + 1
        found.append({**item, "number": f"{item['kind'].capitalize()} {counts[item['kind']]}"})
    return found


def hardware() -> str:
    """The machine that builds the page, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores, {memory_and_system()}"


def main(job: Job) -> None:
    settings, page = job.settings, job.output["page"]
    header = job.header()
    items = numbered(
        build_item(item, path, page, settings)
        for item, path in zip(settings["items"], listed(job.input["parts"]), strict=True)
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        title=TITLES.get(settings["page"], "WMDD results"),
        items=items,
        warnings=[
            f"{description['header']['wildcards']['dataset']}: {warning}"
            for description in map(read_json, listed(job.input.get("descriptions", [])))
            for warning in description["warnings"]
        ],
        config=json.dumps(settings["config"], indent=2, ensure_ascii=False),
        commit=header["commit"],
        versions=header["versions"],
        hardware=hardware(),
        built=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )
    write_text(page, text)
    print(f"{page}: {len(items)} items, {len(text) / 2**20:.1f} MiB")


if __name__ == "__main__":
    run(main)
