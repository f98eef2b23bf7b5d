"""The report: tables from artefacts, refusals, published figures, figures, the page."""

from __future__ import annotations

import html
import html.parser
import io
import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wmdd_core.artifacts import make_header, write_json, write_tensors
from wmdd_core.errors import UserError
from workflow_scripts import build_page, drawing, plot_accuracy, plot_gallery, plot_sweep, tabulate_accuracy
from workflow_scripts.checks import check_place
from workflow_scripts.drawing import (
    COLOURS,
    base_name,
    colour_of,
    line_styles,
    names_of,
    new_figure,
    save,
    shortened,
)
from workflow_scripts.job import Job
from workflow_scripts.plain_tables import as_markdown, write_table
from workflow_scripts.tabulate_accuracy import as_latex, fold, pivot, read_rows

REPORT = Path(__file__).parent.parent / "report"
PUBLISHED = REPORT / "published.csv"
TOP1 = {0: 61.25, 1: 64.5, 2: 60.0}
LABELS = {
    "datasets": {"imagenette": "ImageNette", "digits": "Digits"},
    "methods": {"wmdd": "WMDD", "sre2l": "SRe²L", "all_real": "all real data"},
    "students": {"resnet18": "ResNet-18"},
    "recipes": {"wmdd": "WMDD"},
}


def make_job(rule: str, files: dict, output: dict, settings: dict, **wildcards: str) -> Job:
    return Job(rule, wildcards, files, output, settings, "code", "cpu", 1, "unused")


def make_cell(
    dataset="imagenette", method="wmdd", ipc="10", student="resnet18", recipe="wmdd", seeds=3
) -> dict:
    place = {"dataset": dataset, "recipe": recipe, "method": method, "ipc": ipc, "student": student}
    return {**place, "entry": method.partition("@")[0], "seeds": seeds}


class Results:
    """A folder of evaluations and the job that tabulates them."""

    def __init__(self, root: Path, cells: list[dict]) -> None:
        self.root, self.cells, self.expected = root, cells, {}
        for cell in cells:
            for seed in range(cell["seeds"]):
                self.write(cell, seed)

    def path(self, cell: dict, seed: int) -> Path:
        return self.root.joinpath(*(cell[k] for k in tabulate_accuracy.PLACE), f"seed{seed}.json")

    def write(self, cell: dict, seed: int, top1: float | None = None, known: bool = True, **changes) -> Path:
        """Write one evaluation; `changes` are to its place, its settings and its dataset."""
        place = {k: changes.get(k, cell[k]) for k in tabulate_accuracy.PLACE}
        data = make_header(
            "describe_dataset", {"dataset": cell["dataset"]}, {"data": changes.get("data", 0)}, ""
        )
        relabel = make_header(
            "relabel_images", place, {"temperature": changes.get("temperature", 20)}, "", [data]
        )
        wildcards = {**place, "seed": str(seed)}
        if cell["ipc"] == "all":
            wildcards = {k: wildcards[k] for k in ("dataset", "method", "student", "seed")}
        header = make_header("evaluate_student", wildcards, {}, "", [relabel], changes.get("device", "cpu"))
        if known:
            for rule in ("relabel_images", "evaluate_student"):
                self.expected.setdefault(rule, set()).add(header["lineage"][rule])
        top1 = TOP1[seed] if top1 is None else top1
        labels = "hard" if cell["ipc"] == "all" else "soft"
        write_json(
            self.path(cell, seed), {"top1": top1, "top5": top1 + 20, "count": 9, "labels": labels}, header
        )
        return self.path(cell, seed)

    def tabulate(self, **changes) -> dict[str, Path]:
        paths = [str(self.path(c, s)) for c in self.cells for s in range(c["seeds"])]
        output = {k: str(self.root / f"main.{k}") for k in ("csv", "md", "tex")}
        settings = {
            "name": "main",
            "title": "Main results",
            "cells": self.cells,
            "expected": {k: sorted(v) for k, v in self.expected.items()},
            "labels": LABELS,
            "swept": {},
            **changes,
        }
        files = {"evaluations": paths, "published": str(PUBLISHED)}
        tabulate_accuracy.main(make_job("tabulate_accuracy", files, output, settings, table="main"))
        return {k: Path(v) for k, v in output.items()}


# ---- tables ----------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds(tmp_path):
    (row,) = read_rows(Results(tmp_path, [make_cell()]).tabulate()["csv"])
    values = list(TOP1.values())
    assert float(row["top1_mean"]) == pytest.approx(statistics.mean(values), abs=1e-4)
    assert float(row["top1_sd"]) == pytest.approx(statistics.stdev(values), abs=1e-4)
    assert float(row["top5_mean"]) == pytest.approx(statistics.mean(values) + 20, abs=1e-4)
    assert (row["n_seeds"], row["labels"]) == ("3", "soft")


def test_of_several_sets_the_deviation_is_over_sets_each_by_the_mean_of_its_students(tmp_path):
    cells = [make_cell(method=m, seeds=2) for m in ("wmdd", "wmdd@1", "wmdd@2", "sre2l")]
    results = Results(tmp_path, cells)
    accuracies = [(61.0, 63.0), (70.0, 72.0), (65.0, 65.5)]
    for cell, pair in zip(cells, accuracies, strict=False):
        for seed, top1 in enumerate(pair):
            results.write(cell, seed, top1=top1)
    output = results.tabulate()
    row, other = read_rows(output["csv"])
    means = [statistics.mean(pair) for pair in accuracies]
    assert (row["method"], row["n_sets"], row["n_seeds"]) == ("wmdd", "3", "6")
    assert float(row["top1_mean"]) == pytest.approx(statistics.mean(means), abs=1e-4)
    assert float(row["top1_sd"]) == pytest.approx(statistics.stdev(means), abs=1e-4)
    assert row["published_top1"] == "64.8"
    assert (other["method"], other["n_sets"], other["n_seeds"]) == ("sre2l", "1", "2")
    assert float(other["top1_sd"]) == pytest.approx(statistics.stdev([TOP1[0], TOP1[1]]), abs=1e-4)
    text = output["md"].read_text()
    assert "over 3 sets of images made with different seeds, each by the mean of 2 students" in text
    assert "of a single set, over its students" in text


def test_of_a_lost_set_nothing_is_counted(tmp_path):
    cells = [make_cell(method=m, seeds=2) for m in ("wmdd", "wmdd@1", "wmdd@2")]
    results = Results(tmp_path, cells)
    for seed in range(2):
        results.path(cells[1], seed).unlink()
        results.write(cells[2], seed, top1=80.0)
    (row,) = read_rows(results.tabulate()["csv"])
    assert (row["n_sets"], row["n_seeds"]) == ("2", "4")
    means = [statistics.mean([TOP1[0], TOP1[1]]), 80.0]
    assert float(row["top1_mean"]) == pytest.approx(statistics.mean(means), abs=1e-4)


def test_of_several_sets_the_one_that_is_left_has_no_deviation(tmp_path):
    cells = [make_cell(method=m, seeds=2) for m in ("wmdd", "wmdd@1")]
    results = Results(tmp_path, cells)
    for seed in range(2):
        results.path(cells[1], seed).unlink()
    (row,) = read_rows(results.tabulate()["csv"])
    assert (row["n_sets"], row["n_seeds"], row["top1_sd"], row["top5_sd"]) == ("1", "2", "", "")
    assert float(row["top1_mean"]) == pytest.approx(statistics.mean([TOP1[0], TOP1[1]]), abs=1e-4)


def test_another_set_in_the_place_of_one_is_refused(tmp_path):
    cells = [make_cell(), make_cell(method="wmdd@1")]
    results = Results(tmp_path, cells)
    results.path(cells[1], 0).write_bytes(results.path(cells[0], 0).read_bytes())
    with pytest.raises(UserError, match="made for method 'wmdd', not 'wmdd@1'"):
        results.tabulate()


def test_published_figure_is_joined_by_dataset_method_size_student_and_recipe(tmp_path):
    cells = [make_cell(), make_cell(dataset="digits"), make_cell(student="convnet"), make_cell(ipc="7")]
    cells.append(make_cell(method="all_real", ipc="all", recipe="own"))
    cells.append(make_cell(recipe="hard"))
    output = Results(tmp_path, cells).tabulate()
    rows = read_rows(output["csv"])
    assert [r["published_top1"] for r in rows] == ["64.8", "", "", "", "89.9", ""]
    assert [r["published_source"] for r in rows] == ["WMDD paper", "", "", "", "WMDD paper", ""]
    assert "61.9 ± 2.3 (64.8)" in output["md"].read_text()
    assert r"61.9 $\pm$ 2.3 (64.8)" in output["tex"].read_text()


def test_a_table_names_the_devices_it_was_computed_on(tmp_path):
    results = Results(tmp_path, [make_cell()])
    assert "; device cpu; commit" in results.tabulate()["md"].read_text()
    results.write(make_cell(), 1, device="cuda")
    assert "; device cpu (evaluate_student), cuda (evaluate_student);" in results.tabulate()["md"].read_text()


def test_missing_cell_is_missing_and_never_zero(tmp_path):
    lost = make_cell(method="sre2l", dataset="digits")
    results = Results(tmp_path, [make_cell(dataset="digits"), lost])
    for seed in range(3):
        results.path(lost, seed).unlink()
    output = results.tabulate()
    row = read_rows(output["csv"])[1]
    assert row["n_seeds"] == "0"
    assert {row[k] for k in ("top1_mean", "top1_sd", "top5_mean", "top5_sd", "labels")} == {""}
    assert "| SRe²L | – |" in output["md"].read_text()
    assert "–: not measured" in output["md"].read_text()
    assert r"SRe$^2$L & -- \\" in output["tex"].read_text()


def test_a_lost_seed_lowers_the_count(tmp_path):
    results = Results(tmp_path, [make_cell()])
    results.path(make_cell(), 2).unlink()
    (row,) = read_rows(results.tabulate()["csv"])
    assert row["n_seeds"] == "2"
    assert float(row["top1_sd"]) == pytest.approx(statistics.stdev([TOP1[0], TOP1[1]]), abs=1e-4)


def test_single_seed_has_no_deviation(tmp_path):
    output = Results(tmp_path, [make_cell(dataset="digits", seeds=1)]).tabulate()
    (row,) = read_rows(output["csv"])
    assert (row["top1_mean"], row["top1_sd"], row["top5_sd"]) == ("61.2500", "", "")
    table = [line for line in output["md"].read_text().splitlines() if line.startswith("| WMDD")]
    assert table == ["| WMDD | 61.2 |"]
    assert "±" not in output["md"].read_text()


@pytest.mark.parametrize(
    "key, value", [("method", "sre2l"), ("dataset", "digits"), ("ipc", "1"), ("student", "vit")]
)
def test_artefact_of_another_cell_is_refused_by_name(tmp_path, key, value):
    results = Results(tmp_path, [make_cell()])
    path = results.write(make_cell(), 1, **{key: value})
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{key} '{value}'") as refusal:
        results.tabulate()
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "main.csv").exists()


def test_artefact_of_another_seed_is_refused_by_name(tmp_path):
    results = Results(tmp_path, [make_cell()])
    results.path(make_cell(), 1).write_bytes(results.path(make_cell(), 2).read_bytes())
    with pytest.raises(UserError, match=r"seed1\.json was made for seed '2', not '1'"):
        results.tabulate()


@pytest.mark.parametrize("key", ["recipe", "ipc"])
def test_only_a_student_on_all_real_data_may_lack_its_recipe_and_size(key):
    place = {"dataset": "digits", "recipe": "own", "ipc": "10"}
    lacking = {"wildcards": {k: v for k, v in place.items() if k != key}}
    with pytest.raises(UserError, match=f"a.json was made for {key} None, not '{place[key]}'"):
        check_place("a.json", lacking, place)
    check_place("a.json", {"wildcards": {"dataset": "digits"}}, {**place, "ipc": "all"})


def test_artefact_of_other_settings_is_refused_by_name(tmp_path):
    results = Results(tmp_path, [make_cell()])
    path = results.write(make_cell(), 2, temperature=4, known=False)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .* of relabel_images .*snakemake"):
        results.tabulate()


def test_step_that_the_configuration_does_not_have_is_refused(tmp_path):
    results = Results(tmp_path, [make_cell()])
    del results.expected["relabel_images"]
    with pytest.raises(UserError, match="seed0.json .* of relabel_images"):
        results.tabulate()


def test_cells_of_different_versions_of_a_dataset_are_refused(tmp_path):
    results = Results(tmp_path, [make_cell(), make_cell(ipc="1")])
    path = results.write(make_cell(ipc="1"), 0, data=1)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} and .*seed0\.json .*dataset 'imagenette'"):
        results.tabulate()


@pytest.mark.parametrize("content", ["{", "[]", '{"top1": 3}', "\x00"])
def test_file_that_is_no_evaluation_is_refused_by_name(tmp_path, content):
    results = Results(tmp_path, [make_cell()])
    results.path(make_cell(), 0).write_text(content)
    with pytest.raises(UserError, match="seed0.json is (no evaluation|damaged)"):
        results.tabulate()


def row_of(method="wmdd", ipc="10", **more) -> dict:
    row = dict.fromkeys(tabulate_accuracy.COLUMNS, "") | make_cell(method=method, ipc=ipc)
    del row["seeds"], row["entry"]
    return {**row, "n_seeds": "1", "top1_mean": "50.0000", **more}


def test_pivot_orders_sizes_by_number_and_lets_the_ceiling_span_them():
    rows = [row_of("all_real", "all", recipe="own"), *(row_of(ipc=i) for i in ("50", "1", "10"))]
    table = pivot(rows, LABELS, {})
    assert [ipc for _, ipc in table.columns] == ["IPC 1", "IPC 10", "IPC 50", "all"]
    folded = fold(table)
    assert folded.spans == [("ImageNette", 3)]
    ((_, [(stub, ceiling), (_, distilled)]),) = folded.groups
    assert stub == ["all real data"]
    assert [span for _, span in ceiling] == [3]
    assert [row["ipc"] for row, _ in distilled] == ["1", "10", "50"]


def test_students_and_datasets_that_read_alike_are_told_apart(tmp_path):
    cells = [
        make_cell(student="resnet18", seeds=1),
        make_cell(student="wide", seeds=1),
        make_cell(dataset="small", student="wide", seeds=1),
    ]
    results = Results(tmp_path, cells)
    for cell, top1 in zip(cells, (11.5, 22.5, 33.5), strict=True):
        results.write(cell, 0, top1)
    students = {"resnet18": "ResNet-18", "wide": "ResNet-18"}
    titles = {"imagenette": "ImageNette", "small": "ImageNette"}
    files = results.tabulate(labels={**LABELS, "students": students, "datasets": titles})
    text, latex = files["md"].read_text(), files["tex"].read_text()
    for name in ("ResNet-18 (resnet18)", "ResNet-18 (wide)", "ImageNette (imagenette)", "ImageNette (small)"):
        assert name in text and name in latex
    for number in ("11.5", "22.5", "33.5"):
        assert number in text and number in latex
    rows = read_rows(files["csv"])
    figure = plot_accuracy.draw(rows, {**LABELS, "students": students, "datasets": titles})
    assert len({axes.get_title(loc="left") for axes in figure.axes}) == len(figure.axes) == 3


def test_pivot_groups_students_and_recipes_and_lists_swept_values():
    swept = {f"wmdd_lambda{v}": {"entry": "wmdd_lambda", "key": "lambda_bn", "value": v} for v in (1, 10)}
    rows = [
        row_of(m, student=s, recipe=r) for s in ("resnet18", "vit") for r in ("wmdd", "small") for m in swept
    ]
    rows += [row_of("all_real", "all", student="vit", recipe="own")]
    table = pivot(rows, LABELS, swept)
    assert table.stub == ["Method", "λ"]
    titles = [t for t, _ in table.groups]
    assert titles == [f"{s}, recipe {r}" for s in ("ResNet-18", "vit") for r in ("WMDD", "small")]
    assert [[stub[1] for stub, _ in g] for _, g in table.groups] == [["1", "10"]] * 2 + [["1", "10", ""]] * 2


def test_methods_of_one_label_are_told_apart_by_their_names():
    """`wmdd_30: {like: wmdd, lambda_bn: 30}` inherits the label."""
    labels = {**LABELS, "methods": {**LABELS["methods"], "wmdd_30": "WMDD"}}
    table = pivot([row_of("wmdd"), row_of("wmdd_30"), row_of("sre2l")], labels, {})
    assert [stub for stub, _ in table.groups[0][1]] == [["WMDD (wmdd)"], ["WMDD (wmdd_30)"], ["SRe²L"]]
    swept = {"wmdd_30": {"entry": "wmdd_lambda", "key": "lambda_bn", "value": 30}}
    table = pivot([row_of("wmdd"), row_of("wmdd_30")], labels, swept)
    assert [stub for stub, _ in table.groups[0][1]] == [["WMDD", ""], ["WMDD", "30"]]


def test_what_was_held_out_of_the_training_set_is_not_called_test_set(tmp_path):
    cells = [make_cell(dataset="digits"), make_cell()]
    for held_out, told in (
        ([], "on the real test set, mean"),
        (["digits"], "on the real test set (Digits: a held-out part of the training set), mean"),
        (["digits", "imagenette"], "on a held-out part of the training set, mean"),
    ):
        labels = {**LABELS, "held_out": held_out}
        text = Results(tmp_path, cells).tabulate(labels=labels)["md"].read_text()
        assert told in text
        assert ("(64.8)" in text) == ("imagenette" not in held_out)  # published, of the test set


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("tench", "tench"),
        ("great_white_shark", "great white shark"),
        ("twenty two characters!", "twenty two characters!"),
        ("great white shark, Carcharodon", "great white shark,…"),
        ("exactly twenty one xy and more", "exactly twenty one xy…"),
        ("PneumonoultramicroscopicCase", "Pneumonoultramicrosco…"),
    ],
)
def test_a_long_title_of_a_class_is_cut_and_never_gone(title, shown):
    assert shortened(title) == shown and len(shown) <= 22


def test_latex_escapes_names():
    text = as_latex(pivot([row_of("a_b & 5%")], {}, {}), "made of 50 % {x}")
    assert r"a\_b \& 5\%" in text
    assert text.count(r"\begin{tabular}{lr}") == text.count(r"\end{tabular}") == 1


def test_published_figures_are_those_of_the_notes():
    published = tabulate_accuracy.read_published(str(PUBLISHED))
    found = {k: float(row["top1"]) for k, row in published.items()}
    assert found["imagenette", "wmdd", "wmdd", "100", "resnet18"] == 87.1
    assert found["imagenet1k", "wmdd", "scdd", "50", "resnet18"] == 53.1
    assert found["tiny-imagenet", "own", "all_real", "all", "resnet18"] == 63.5
    assert all(0 < v < 100 for v in found.values())
    assert all(row["source"] for row in published.values())


def test_two_published_figures_for_one_place_are_refused(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text("dataset,recipe,method,ipc,student,top1,source\nd,r,m,1,s,2.0,a\nd,r,m,1,s,3.0,b\n")
    with pytest.raises(UserError, match="two figures for d, r, m, 1, s"):
        tabulate_accuracy.read_published(str(path))


# ---- figures ---------------------------------------------------------------------------------


def test_characters_that_dejavu_lacks_are_looked_for_in_the_fonts_that_are_there(monkeypatch):
    monkeypatch.setattr(drawing.fontManager, "get_font_names", lambda: ["Arial", "WenQuanYi Zen Hei"])
    assert drawing.font_families() == ["DejaVu Sans", "WenQuanYi Zen Hei"]


def test_a_method_has_one_colour_and_variants_differ_in_marker_or_dashes():
    assert len(set(COLOURS.values())) == len(COLOURS)
    names = ["wmdd", "wmdd_uniform", "wmdd_lambda1", "wmdd_lambda10", "sre2l", "mine", "other"]
    styles = line_styles(names)
    assert line_styles(reversed(names))["wmdd_uniform"]["color"] == styles["wmdd_uniform"]["color"]
    assert styles["wmdd"]["color"] == COLOURS["wmdd"] == colour_of("wmdd")
    assert len({(s["color"], s["marker"], str(s["linestyle"])) for s in styles.values()}) == len(names)
    assert [base_name(n) for n in ("wmdd_lambda100", "dm", "dmx", "kmeans_real")] == [
        "wmdd",
        "dm",
        "dmx",
        "kmeans_real",
    ]


def figure_output(folder: Path) -> dict[str, str]:
    return {k: str(folder / f"figure.{k}") for k in ("png", "pdf", "csv")}


def draw_accuracy(tmp_path: Path, folder: str, **figure) -> dict[str, str]:
    cells = [make_cell(method=m, ipc=i) for m in ("wmdd", "sre2l") for i in ("1", "10")]
    cells.append(make_cell(method="all_real", ipc="all", recipe="own"))
    results = Results(tmp_path, cells)
    results.path(cells[3], 0).unlink(missing_ok=True)
    table = results.tabulate()["csv"]
    output = figure_output(tmp_path / folder)
    settings = {"figure": {"kind": "accuracy", "table": "main", **figure}, "labels": LABELS}
    plot_accuracy.main(make_job("plot_accuracy", {"table": str(table)}, output, settings, figure="accuracy"))
    return output


def test_accuracy_figure_is_the_same_twice_and_keeps_its_numbers(tmp_path):
    first, second = draw_accuracy(tmp_path, "a"), draw_accuracy(tmp_path, "b")
    for kind in first:
        assert Path(first[kind]).read_bytes() == Path(second[kind]).read_bytes()
    assert b"CreationDate" not in Path(first["pdf"]).read_bytes()
    rows = read_rows(first["csv"])
    assert [(r["method"], r["ipc"]) for r in rows][-1] == ("all_real", "all")
    assert float(rows[0]["top1_mean"]) == pytest.approx(statistics.mean(TOP1.values()), abs=1e-4)


def deviations(bars) -> list[list[float]]:
    """Lower and upper end of each error bar."""
    return [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]


def test_the_accuracy_figure_draws_top_1_the_published_figures_and_the_ceiling():
    rows = [
        row_of(ipc="10", top1_mean="60.0", top1_sd="2.0", top5_mean="90.0", published_top1="64.5"),
        row_of(ipc="1", top1_mean="40.0", top1_sd="1.5", top5_mean="80.0", published_top1="44.5"),
        row_of(ipc="5", top1_mean="55.0", top1_sd="1.0", top5_mean="70.0", published_top1="54.5"),
        row_of("all_real", "all", recipe="own", top1_mean="88.0", top5_mean="99.0"),
    ]
    (axes,) = plot_accuracy.draw(rows, LABELS).axes
    (bars,) = axes.containers
    assert list(bars.lines[0].get_xdata()) == [1, 5, 10]
    assert list(bars.lines[0].get_ydata()) == [40, 55, 60]
    assert deviations(bars) == [[38.5, 41.5], [54, 56], [58, 62]]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert [44.5, 54.5, 64.5] in drawn and [88, 88] in drawn


def test_each_recipe_student_and_dataset_has_a_panel_of_its_own_lines_and_the_students_ceiling():
    changes = [{}, {"recipe": "hard"}, {"student": "vit"}, {"dataset": "digits"}]
    rows = [
        row_of(m, i, top1_mean=f"{10 * n + k}.0", **own)
        for n, own in enumerate(changes, 1)
        for k, (m, i) in enumerate(itertools.product(("wmdd", "sre2l"), ("1", "10")))
    ]
    rows += [row_of("all_real", "all", recipe="own", top1_mean="88.0")]
    rows += [row_of("all_real", "all", recipe="own", student="vit", top1_mean="99.0")]
    axes = plot_accuracy.draw(rows, LABELS).axes
    lines = [[bars.lines[0].get_ydata().tolist() for bars in panel.containers] for panel in axes]
    assert lines == [[[10 * n, 10 * n + 1], [10 * n + 2, 10 * n + 3]] for n in (1, 2, 3, 4)]
    level = [
        [y[0] for line in p.lines if (y := list(line.get_ydata())) in ([88, 88], [99, 99])] for p in axes
    ]
    assert level == [[88], [88], [99], []]


def sweep_rows(
    places: list[tuple[str, str]], values=(0.1, 10, 1000), entry="wmdd_lambda"
) -> tuple[list, dict]:
    """A table's lines for each (dataset, ipc) of `places`, with `random` beside them, and the sweep."""
    swept = {f"{entry}{v}": {"entry": entry, "key": "lambda_bn", "value": v} for v in values}
    rows = [row_of(m, i, dataset=d) for d, i in places for m in (*swept, "random")]
    return rows, swept


def test_a_sweep_has_a_panel_for_each_dataset_and_a_line_for_each_size():
    rows, swept = sweep_rows([("digits", "1"), ("digits", "10"), ("imagenette", "1")])
    more, other = sweep_rows([("digits", "1")], values=(1, 2), entry="sre2l_lambda")
    figure = plot_sweep.draw([*rows, *more], {**swept, **other}, "lambda_bn", LABELS)
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title("left") for axes in panels] == ["Digits", "ImageNette"]
    drawn = [[bars.lines[0].get_xdata().tolist() for bars in axes.containers] for axes in panels]
    assert drawn == [[[0.1, 10, 1000], [1, 2], [0.1, 10, 1000]], [[0.1, 10, 1000]]]
    colours = [{b.get_label(): b.lines[0].get_color() for b in axes.containers} for axes in panels]
    (label, colour), *_ = colours[1].items()
    assert colours[0][label] == colour and len(set(colours[0].values())) == 2
    (alone,) = plot_sweep.draw(*sweep_rows([("digits", "1")]), "lambda_bn", LABELS).axes
    assert alone.get_title("left") == ""


def test_a_sweep_draws_top_1_by_value_and_a_line_for_what_is_not_swept():
    rows, swept = sweep_rows([("digits", "1")], values=(10, 0.1, 1000))
    for row, top1 in zip(rows, ("20.5", "21.5", "22.5", "23.5"), strict=True):
        row.update(top1_mean=top1, top1_sd="0.5", top5_mean="90.0", top5_sd="9.0")
    (axes,) = plot_sweep.draw(rows, swept, "lambda_bn", LABELS).axes
    (bars,) = axes.containers
    assert list(bars.lines[0].get_xdata()) == [0.1, 10, 1000]
    assert list(bars.lines[0].get_ydata()) == [21.5, 20.5, 22.5]
    assert deviations(bars) == [[21, 22], [20, 21], [22, 23]]
    assert [23.5, 23.5] in [list(line.get_ydata()) for line in axes.lines]
    assert [text.xy[1] for text in axes.texts] == [23.5]


def test_a_value_of_zero_has_a_place_on_the_axis():
    def scale(*values):
        (axes,) = plot_sweep.draw(*sweep_rows([("digits", "1")], values), "lambda_bn", LABELS).axes
        return axes.get_xscale(), axes.transData.transform([(v, 20) for v in sorted(values)])[:, 0]

    assert scale(0.1, 1)[0] == "log"
    for values in ((0, 0.1, 10), (-1, 0, 1), (0,)):
        name, places = scale(*values)
        assert name == "symlog" and np.isfinite(places).all() and (np.diff(places) > 20).all()


def test_saving_without_dates(tmp_path):
    figure = new_figure(1, 1)
    figure.subplots().plot([0, 1], [0, 1])
    for folder in ("a", "b"):
        save(figure, figure_output(tmp_path / folder))
    for kind in ("png", "pdf"):
        assert (tmp_path / "a" / f"figure.{kind}").read_bytes() == (
            tmp_path / "b" / f"figure.{kind}"
        ).read_bytes()


GALLERY_WEIGHTS = {1: [[1.0]] * 3, 3: [[0.5, 0.3, 0.2], [0.1, 0.25, 0.65], [0.2, 0.4, 0.4]]}


def make_gallery(root: Path, data: int = 0, **figure) -> tuple[Job, np.ndarray]:
    """A gallery of three classes: 9, 5 and 6 real images, one method with 1 and with 3 images."""
    real = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    np.save(root / "train.npy", real)
    header = make_header("describe_dataset", {"dataset": "digits"}, {}, "")
    content = {
        "classes": ["a", "b", "c"],
        "titles": ["first", "second", "third"],
        "train": {"per_class": [9, 5, 6]},
    }
    write_json(root / "description.json", content, header)
    made_from = make_header("describe_dataset", {"dataset": "digits"}, {"data": data} if data else {}, "")
    paths, expected = [], {}
    for ipc in (1, 3):
        wildcards = {"dataset": "digits", "method": "wmdd", "ipc": str(ipc)}
        tensors = {
            "images": (40 * ipc + torch.arange(3 * ipc, dtype=torch.uint8))[:, None, None, None]
            .expand(-1, 3, 8, 8)
            .contiguous(),
            "labels": torch.arange(3).repeat_interleave(ipc),
            "weights": torch.tensor(GALLERY_WEIGHTS[ipc]).flatten(),
        }
        paths.append(str(root / f"images{ipc}.safetensors"))
        made = make_header("gather_images", wildcards, {}, "", [made_from])
        write_tensors(paths[-1], tensors, made)
        for rule, digest in made["lineage"].items():
            expected.setdefault(rule, []).append(digest)
    files = {"images": paths, "description": str(root / "description.json"), "train": str(root / "train.npy")}
    settings = {"figure": figure, "labels": {"wmdd": "WMDD"}, "swept": {}, "expected": expected}
    return make_job("plot_gallery", files, figure_output(root), settings, figure="gallery"), real


def test_gallery_shows_the_stored_pixels_and_lists_them(tmp_path):
    job, real = make_gallery(tmp_path, images=2)
    plot_gallery.main(job)
    rows = read_rows(job.output["csv"])
    for c in "012":
        shown = [
            (r["method"], r["ipc"], r["class"], r["number"], r["weight"]) for r in rows if r["class"] == c
        ]
        first, second, _ = GALLERY_WEIGHTS[3][int(c)]
        assert shown == [
            ("real", "", c, "0", ""),
            ("real", "", c, "1", ""),
            ("wmdd", "1", c, "0", "1"),
            ("wmdd", "3", c, "0", f"{first:g}"),
            ("wmdd", "3", c, "1", f"{second:g}"),
        ]
    # Every real image that is listed is in the picture, each pixel a square of one colour.
    drawn = np.asarray(Image.open(job.output["png"]).convert("RGB"))
    side = plot_gallery.LARGEST // 8
    for number in (0, 1, 9, 10, 14, 15):
        tile = real[number].transpose(1, 2, 0).repeat(side, 0).repeat(side, 1)
        starts = np.argwhere(
            (drawn == tile[0, 0]).all(-1) & (np.roll(drawn, -side, 1) == tile[0, side]).all(-1)
        )
        found = [(drawn[y : y + len(tile), x : x + len(tile)]) for y, x in starts]
        assert any(f.shape == tile.shape and np.array_equal(f, tile) for f in found), number
    description = json.loads(Path(job.input["description"]).read_text())
    block = plot_gallery.distilled_block(job.input["images"][1], job, description, [2, 0], 2)
    assert [images[:, 0, 0, 0].tolist() for images in block.images] == [[126, 127], [120, 121]]


@pytest.mark.parametrize(
    ("key", "value", "title"),
    [("lambda_bn", 0.1, "λ = 0.1"), ("loss_form", "released", "loss form = released")],
)
def test_members_of_a_sweep_are_told_apart_by_their_value(tmp_path, key, value, title):
    job, _ = make_gallery(tmp_path)
    description = json.loads(Path(job.input["description"]).read_text())
    job.settings["swept"] = {"wmdd": {"key": key, "value": value}}
    block = plot_gallery.distilled_block(job.input["images"][0], job, description, [0], 1)
    assert block.title == title
    job.settings["swept"]["other"] = {"key": key, "value": value}  # of another sweep
    block = plot_gallery.distilled_block(job.input["images"][0], job, description, [0], 1)
    assert block.title == f"{title} (wmdd)"


def test_methods_of_one_label_are_told_apart_in_every_figure():
    labels = {"wmdd": "WMDD", "mine": "WMDD", "wmdd_x": "WMDD", "dm": "DM"}
    apart = {"wmdd": "WMDD (wmdd)", "mine": "WMDD (mine)", "wmdd_x": "WMDD (wmdd_x)", "dm": "DM"}
    assert names_of(labels, labels) == plot_gallery.heads_of(labels, {}) == apart
    rows, swept = sweep_rows([("digits", "1")])
    more, other = sweep_rows([("digits", "1")], values=(1, 2), entry="mine")
    (axes,) = plot_sweep.draw(
        [*rows, *more], {**swept, **other}, "lambda_bn", {"methods": dict.fromkeys([*swept, *other], "WMDD")}
    ).axes
    assert [bars.get_label().split(",")[0] for bars in axes.containers] == [
        "WMDD (wmdd_lambda)",
        "WMDD (mine)",
    ]


def test_a_dollar_in_a_class_name_begins_no_formula(tmp_path):
    job, _ = make_gallery(tmp_path)
    path = tmp_path / "description.json"
    path.write_text(path.read_text().replace('"first"', r'"$\\foo$"'), encoding="utf-8")
    plot_gallery.main(job)
    assert read_rows(job.output["csv"])[0]["class_name"] == r"$\foo$"


def test_gallery_is_the_same_twice(tmp_path):
    job, _ = make_gallery(tmp_path)
    plot_gallery.main(job)
    first = {k: Path(v).read_bytes() for k, v in job.output.items()}
    plot_gallery.main(job)
    assert first == {k: Path(v).read_bytes() for k, v in job.output.items()}


def test_gallery_refuses_images_of_other_data(tmp_path):
    job, _ = make_gallery(tmp_path, data=1)
    with pytest.raises(UserError, match="images1.safetensors .*different versions of the dataset 'digits'"):
        plot_gallery.main(job)


def test_large_images_are_reduced_and_many_blocks_take_several_bands():
    assert plot_gallery.image_side(26, 224) == plot_gallery.WIDTH // 26
    assert plot_gallery.image_side(26, 16) % 16 == 0
    assert [plot_gallery.grid_of(n, 2) for n in (1, 2, 3, 10)] == [(2, 1), (1, 1), (1, 2), (1, 5)]
    images = [np.zeros((10, 8, 8, 3), np.uint8)]
    real = plot_gallery.Block("real", "", images, [])
    blocks = [plot_gallery.Block(str(i), g, images, []) for g in ("x", "y") for i in range(3)]
    bands = plot_gallery.bands_of(real, blocks, 2)
    assert [[b.title for b in band] for band in bands] == [["real", "0", "1", "2"]] * 2


# ---- the page --------------------------------------------------------------------------------


class Resources(html.parser.HTMLParser):
    """Collects what a page loads, its ids, and the texts of its table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.ids, self.cells, self.scripts, self._in = [], set(), [], 0, None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.scripts += tag == "script"
        if tag != "a":
            self.loads += [attributes[k] for k in ("src", "href", "srcset", "data") if k in attributes]
        if tag in ("td", "th"):
            self.cells.append("")
            self._in = tag

    def handle_endtag(self, tag):
        if tag == self._in:
            self._in = None

    def handle_data(self, data):
        if self._in:
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path) -> tuple[str, Resources]:
    cells = [
        make_cell(),
        make_cell(method="sre2l", ipc="1"),
        make_cell(method="all_real", ipc="all", recipe="own"),
    ]
    Results(tmp_path, cells).tabulate()
    rows = [{"method": "wmdd", "seconds": "1.5"}, {"method": "sre2l", "seconds": ""}]
    shown = [["method", "seconds", "note"], ["wmdd", "1.5", "<b>bold</b>"], ["sre2l", "", ""]]
    files = {f: tmp_path / f"cost.{f}" for f in ("csv", "md", "tex")}
    write_table(files, rows, shown, "Cost", ["Measured & written."])
    figure = new_figure(1, 1)
    save(figure, {k: str(tmp_path / f"curve.{k}") for k in ("png", "pdf")})
    items = [
        {"name": "main", "kind": "table", "title": "Main results"},
        {"name": "cost", "kind": "table", "caption": "Cost & time"},
        {"name": "curve", "kind": "figure", "title": "A curve"},
    ]
    blocks = {
        "datasets": {"imagenette": {"title": "ImageNette"}},
        "methods": {
            "wmdd": {"label": "WMDD"},
            "sre2l": {"label": "SRe²L"},
            "all_real": {"label": "all real data"},
        },
        "students": {"resnet18": {"label": "ResNet-18"}},
        "recipes": {"wmdd": {}},
        "figures": {"curve": {"kind": "accuracy"}},
    }
    settings = {
        "page": "index",
        "items": items,
        "config": {"seed": 7, **blocks},
        "laid_over": ["presets/a.yaml", "mine.yaml"],
        "overridden": ["seed=1", 'student_seeds={"a": 2}'],
        "labels": {**LABELS, "held_out": []},
        "swept": {},
    }
    parts = [str(tmp_path / n) for n in ("main.csv", "cost.csv", "curve.png")]
    header = make_header("describe_dataset", {"dataset": "imagenette"}, {}, "")
    write_json(tmp_path / "description.json", {"warnings": ["2 of 9 images < cannot be read"]}, header)
    descriptions = [str(tmp_path / "description.json")]
    files = {"template": str(REPORT / "page.html"), "parts": parts, "descriptions": descriptions}
    output = {"page": str(tmp_path / "index.html")}
    build_page.main(make_job("build_page", files, output, settings, page="index"))
    text = (tmp_path / "index.html").read_text()
    resources = Resources()
    resources.feed(text)
    return text, resources


def test_page_says_what_the_datasets_descriptions_warn_of(page):
    assert "imagenette: 2 of 9 images &lt; cannot be read." in page[0]


def test_page_needs_no_network_and_no_script(page):
    text, resources = page
    assert len(resources.loads) == 2  # the figure and the empty icon
    assert all(load.startswith("data:") for load in resources.loads)
    assert resources.scripts == 0
    assert not re.search(r"url\(|@import|https?://", text)


def test_page_holds_every_item_with_its_command_and_files(page):
    text, resources = page
    assert {"main", "cost", "curve", "provenance"} <= resources.ids
    for name in ("main", "cost", "curve"):
        assert f'href="#{name}"' in text
        command = f"snakemake --cores 2 {name} --configfile presets/a.yaml mine.yaml --config seed=1"
        assert f"{command} 'student_seeds={{\"a\": 2}}'</code>" in html.unescape(text)
    for file in ("main.csv", "main.md", "main.tex", "cost.csv", "curve.png", "curve.pdf"):
        assert f'href="{file}"' in text
    assert 'href="curve.csv"' not in text  # there is none
    assert '<p class="note">Measured &amp; written.</p>' in text
    assert "Table 1" in text and "Table 2" in text and "Figure 1" in text
    assert "&#34;seed&#34;: 7" in text
    assert "Cost &amp; time" in text


def test_page_prints_tables_as_people_read_them(page):
    text, resources = page
    cells = [" ".join(c.split()) for c in resources.cells]
    assert "61.9 ± 2.3 (64.8)" in cells
    assert "61.9 ± 2.3 (20.6)" in cells
    assert "61.9 ± 2.3 (89.9)" in cells
    assert {"WMDD", "SRe²L", "all real data", "IPC 1", "IPC 10", "ImageNette"} <= set(cells)
    assert "<b>bold</b>" in cells  # escaped, so it is text
    assert "–" in cells
    assert "0.0" not in cells


def test_figure_on_the_page_is_the_figure(page, tmp_path):
    import base64

    _, resources = page
    (uri,) = [u for u in resources.loads if u.startswith("data:image/png")]
    content = base64.b64decode(uri.split(",")[1])
    assert content == (tmp_path / "curve.png").read_bytes()
    assert Image.open(io.BytesIO(content)).size == (200, 200)


def test_a_plain_table_reads_as_it_was_written():
    shown = [["Method", "Seconds", "Note"], ["a | b", "1.5 ± 0.1", "x"], ["c", "", "y"]]
    table = build_page.plain_table(as_markdown(shown, "Cost", ["On a machine.", "In one run."]))
    assert [c["text"] for c in table["columns"]] == ["Seconds", "Note"]
    assert [c["numeric"] for c in table["columns"]] == [True, False]
    rows = table["groups"][0]["rows"]
    assert [r["stub"] for r in rows] == [["a | b"], ["c"]]
    assert [[c["text"] for c in r["cells"]] for r in rows] == [["1.5 ± 0.1", "x"], ["–", "y"]]
    assert rows[1]["cells"][0]["missing"]
    assert table["notes"] == ["On a machine.", "In one run."]
