"""Timing, the efficiency harness, the cost table, and the table of hyperparameters."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_snakemake

from wmdd_core import timing
from wmdd_core.artifacts import make_header, write_json
from wmdd_core.errors import UserError
from wmdd_core.machine import DEVICE_MEMORY, RESIDENT_MEMORY
from wmdd_core.timing import IterationTimer, peak_memory, peak_resident_bytes, timed
from workflow_scripts import (
    compute_barycenter,
    decode_images,
    describe_dataset,
    distil_baseline,
    extract_features,
    measure_efficiency,
    pretrain_teacher,
    recover_images,
    tabulate_cost,
    tabulate_efficiency,
    tabulate_hyperparameters,
)
from workflow_scripts.job import Job
from workflow_scripts.measure_efficiency import Measured, alone, preparation_seconds
from workflow_scripts.plain_tables import as_latex, as_markdown, escape
from workflow_scripts.real_images import load_teacher
from workflow_scripts.tabulate_efficiency import build_row, build_shown


def rows_of(path: Path | str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- timing ----------------------------------------------------------------------------------


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def loop(timer: IterationTimer, sleep, seconds: list[float]) -> None:
    """A loop as the library writes them."""
    assert timer.resume() is None
    for step, duration in enumerate(seconds):
        sleep(duration)
        timer.step(step, len(seconds), dict, dict)


def test_iterations_after_the_warm_up_are_timed_exactly(monkeypatch):
    timer = IterationTimer(2)
    loop(timer, Clock(monkeypatch).sleep, [8.0, 4.0, 0.5, 0.25, 1.5])
    assert timer.seconds == [0.5, 0.25, 1.5]
    short = IterationTimer(3)
    loop(short, Clock(monkeypatch).sleep, [1.0, 1.0, 1.0])
    assert short.seconds == []


def test_a_known_sleep_is_timed():
    timer = IterationTimer(1)
    loop(timer, time.sleep, [0.0, 0.02, 0.02, 0.02])
    assert len(timer.seconds) == 3 and all(s >= 0.02 for s in timer.seconds)
    result, seconds = timed(lambda: time.sleep(0.02) or "done")
    assert result == "done" and seconds >= 0.02


def test_the_first_iteration_cannot_be_timed():
    with pytest.raises(ValueError, match="warm_up is 0"):
        IterationTimer(0)


def test_a_step_waits_for_the_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timer = IterationTimer(1, "cuda:1")
    loop(timer, time.sleep, [0.0, 0.0])
    timed(lambda: None, "cuda:1")
    assert waited == [torch.device("cuda:1")] * 4
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory(torch.device("cuda:1")) == (7, DEVICE_MEMORY)


def test_peak_memory_sees_what_was_freed_again():
    before = peak_resident_bytes()
    block = np.ones(before, np.uint8)  # touched: memory that is only reserved is not resident
    del block
    peak, kind = peak_memory(torch.device("cpu"))
    assert kind == RESIDENT_MEMORY
    assert 1.2 * before < peak < 4 * before


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_where_there_is_no_proc_the_peak_is_what_getrusage_says(monkeypatch, tmp_path, system, unit):
    monkeypatch.setattr(timing, "Path", lambda _: tmp_path / "status")
    monkeypatch.setattr(timing.sys, "platform", system)
    monkeypatch.setattr(timing.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert peak_resident_bytes() == 7 * unit
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 5 kB\nVmRSS:\t 3 kB\n")
    assert peak_resident_bytes() == 5 * 1024


# ---- efficiency ------------------------------------------------------------------------------

RECOVER = {
    "kind": "recover",
    "flip": False,
    "feature_term": "barycenter",
    "bn_term": "per_class",
    "loss_form": "paper",
    "lambda_bn": 1,
    "iterations": 999,
    "learning_rate": 0.1,
    "crop_scale_min": 0.5,
    "roll": 1,
    "start": "noise",
}
SRE2L = {**RECOVER, "feature_term": "cross_entropy", "bn_term": "running"}
DM = {
    "kind": "dm",
    "iterations": 999,
    "learning_rate": 1,
    "momentum": 0.5,
    "real_batch": 4,
    "augmentation": ["crop"],
}
DC = {
    **{k: v for k, v in DM.items() if k != "kind"},
    "kind": "dc",
    "outer_loops": 7,
    "inner_steps": 3,
    "network_learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def efficiency_job(tmp_path_factory) -> Job:
    """A job of the harness on digits of 8 pixels, its inputs made by the workflow's own scripts."""
    root = tmp_path_factory.mktemp("efficiency")

    def step(module, output: dict, files: dict, settings: dict, **wildcards: str) -> dict:
        output = {k: str(root / v) for k, v in output.items()}
        rule = module.__name__.split(".")[-1]
        place = {"dataset": "digits", **wildcards}
        module.main(Job(rule, place, files, output, settings, "code", "cpu", 1, str(root / "checkpoints")))
        return output

    data = {"source": "digits", "resolution": 8, "test_fraction": 0.5, "classes": 10, "seed": 0}
    files = step(describe_dataset, {"description": "description.json"}, {}, data)
    for split in ("train", "test"):
        made = step(decode_images, {"images": f"{split}.npy"}, files, data, split=split)
        files[split] = made["images"]
    teacher = {"architecture": "convnet", "width": 4, "depth": 2, "epochs": 1, "optimizer": "sgd"}
    teacher |= {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0, "batch_size": 100}
    teacher |= {"crop_scale_min": 0.5, "flip": False, "seed": 0}
    output = {"checkpoint": "teacher.safetensors", "metrics": "metrics.json", "curve": "curve.csv"}
    files["teacher"] = step(pretrain_teacher, output, files, teacher, teacher="small")["checkpoint"]
    output = {"features": "features.npy", "index": "index.json", "statistics": "statistics.safetensors"}
    found = step(extract_features, output, files, {}, teacher="small")
    files["statistics"] = found["statistics"]
    place = {"teacher": "small", "barycenter": "learned", "ipc": "1", "block": "0-9"}
    atoms = step(
        compute_barycenter, {"barycenter": "atoms.npz"}, found, {"weights": "learned", "seed": 0}, **place
    )
    files["barycenters"] = [atoms["barycenter"]]
    settings = {
        "dataset": "digits",
        "methods": {"dc": DC, "dm": DM, "sre2l": SRE2L, "wmdd": RECOVER},
        "barycenter": {"weights": "learned"},
        "iterations": 3,
        "seed": 0,
    }
    output = {"measured": str(root / "efficiency.json")}
    return Job("measure_efficiency", {"figure": "efficiency"}, files, output, settings, "code", "cpu", 1, "-")


@pytest.mark.parametrize("method", ["dc", "dm", "sre2l", "wmdd"])
def test_each_method_runs_its_loop_for_the_timed_iterations(efficiency_job, method):
    measured = measure_efficiency.measure_method(efficiency_job, method)
    assert len(measured.seconds) == 3 and all(s > 0 for s in measured.seconds)
    assert measured.memory == RESIDENT_MEMORY and measured.peak > 2**20
    assert "thread" in measured.machine


TABULATED = {
    "title": "Time and memory",
    "dataset": "digits",
    "dataset_title": "Digits",
    "methods": ["dc", "dm", "wmdd", "sre2l"],
    "labels": {"dc": "DC", "dm": "DM", "sre2l": "SRe²L", "wmdd": "WMDD"},
    "projected_iterations": 200,
}


def tabulated(measuring: Job) -> dict[str, str]:
    """The files of the table of what a job measured."""
    root = Path(measuring.output["measured"]).parent
    output = {k: str(root / f"efficiency.{k}") for k in ("csv", "md", "tex")}
    place = {"figure": "efficiency"}
    tabulate_efficiency.main(
        Job("tabulate_efficiency", place, measuring.output, output, TABULATED, "code", "cpu", 1, "-")
    )
    return output


def test_the_table_of_the_whole_harness(efficiency_job, monkeypatch):
    monkeypatch.setattr(measure_efficiency, "alone", lambda name, call, *arguments: call(*arguments))
    measure_efficiency.main(efficiency_job)
    output = tabulated(efficiency_job)
    rows = rows_of(output["csv"])
    assert [r["method"] for r in rows] == ["DC", "DM", "WMDD", "SRe²L"]
    for row in rows:
        mean, before = float(row["seconds_per_iteration_mean"]), float(row["preparation_seconds"])
        assert float(row["total_seconds"]) == pytest.approx(before + 200 * mean, abs=0.02)
        assert row["iterations_timed"] == "3" and row["machine"]
    assert [float(r["preparation_seconds"]) > 0 for r in rows] == [False, False, True, False]
    assert rows[2]["published_seconds_mean"] == "0.013" and rows[0]["published_total_seconds"] == "6348.17"
    text = Path(output["md"]).read_text(encoding="utf-8")
    assert "(0.013 ± 0.001)" in text and "(11.90)" in text and rows[0]["machine"] in text
    assert "resident memory of the process" in text and "200 iterations" in text
    assert "over 3 consecutive iterations after 5 of warm-up" in text and "torch 2." in text.splitlines()[-1]


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("method", "loops"), [("dc", (1, 1)), ("dm", (None, None))])
def test_a_baseline_is_timed_on_one_image_per_class_with_its_loops_and_the_teachers_network(
    efficiency_job, monkeypatch, method, loops
):
    called = []

    def record(real, initial, labels, build_network, settings, names, progress):
        called.append((labels.tolist(), build_network(0), settings))
        return initial, torch.zeros(1)

    monkeypatch.setattr(distil_baseline, f"distil_{method}", record)
    measure_efficiency.measure_method(efficiency_job, method)
    ((labels, network, settings),) = called
    assert labels == list(range(10))
    assert tuple(getattr(settings, key, None) for key in ("outer_loops", "inner_steps")) == loops
    teacher, _ = load_teacher(efficiency_job.input["teacher"], torch.device("cpu"))
    assert shapes(network) == shapes(teacher)


@pytest.mark.parametrize("method", ["sre2l", "wmdd"])
def test_recovery_is_timed_on_one_image_per_class_with_the_teacher(efficiency_job, monkeypatch, method):
    called = []
    monkeypatch.setattr(recover_images, "recover_images", lambda *given, **_: called.append(given))
    measure_efficiency.measure_method(efficiency_job, method)
    ((network, shard, _),) = called
    assert shard.classes[shard.group].tolist() == list(range(10))
    assert shard.index.tolist() == [0] * 10
    teacher, _ = load_teacher(efficiency_job.input["teacher"], torch.device("cpu"))
    trained = teacher.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())


def test_the_preparation_takes_one_atom_of_all_images_of_each_class(efficiency_job, monkeypatch):
    called = []

    def record(points, size, *, generator, **settings):
        called.append((len(points), size, settings))

    monkeypatch.setattr(measure_efficiency, "wasserstein_barycenter", record)
    chosen = {"weights": "uniform", "restarts": 3}
    job = replace(efficiency_job, settings={**efficiency_job.settings, "barycenter": chosen})
    measure_efficiency.measure_preparation(job)
    assert called == [(count, 1, chosen) for count in job.description()["train"]["per_class"]]


def test_what_precedes_the_first_iteration():
    before = Measured([5.0, 0.25], 0, "", "", "")
    assert preparation_seconds(RECOVER, before) == 5.25
    assert preparation_seconds(SRE2L, before) == 0
    for measured in ("per_class", "global"):
        assert preparation_seconds({**SRE2L, "bn_term": measured}, before) == 5
    assert preparation_seconds({**SRE2L, "feature_term": "mmd_rbf"}, before) == 5
    assert preparation_seconds(DM, before) == preparation_seconds(DC, before) == 0


def test_a_single_iteration_has_no_deviation_and_an_unknown_method_no_published_figure():
    settings = {**TABULATED, "labels": {"own": "Own"}}
    measured = asdict(Measured([0.5], 3 * 2**30, "memory", "machine", "float32"))
    row = build_row(settings, "own", {**measured, "preparation_seconds": 1.0}, {})
    assert (row["seconds_per_iteration_sd"], row["total_seconds"]) == ("", "101.00")
    assert build_shown([row])[1] == ["Own", "0.5000", "3.00", "101.0"]


def test_a_measurement_has_a_process_of_its_own():
    assert alone("a", os.getpid) != alone("b", os.getpid) != os.getpid()


def test_a_measurement_keeps_what_it_frees_as_jobs_do():
    pages, size = "int(open('/proc/self/statm').read().split()[1])", 2**28
    expression = f"({pages}, len(b'x' * {size}), {pages})"  # a function of here would bring conftest along
    before, _, after = alone("memory", eval, expression)
    assert (after - before) * os.sysconf("SC_PAGE_SIZE") > 0.9 * size


def test_a_measurement_that_is_killed_is_told():
    with pytest.raises(UserError, match="measured dc ran out of memory or was killed"):
        alone("dc", os.abort)


# ---- cost ------------------------------------------------------------------------------------


class Sets:
    """Distilled sets, their evaluations and benchmark files, and the job that tabulates them."""

    recipes = {"soft": "wmdd", "hard": "hard"}

    def __init__(self, root: Path, seeds: int = 2) -> None:
        self.root, self.expected = root, {labels: {} for labels in self.recipes}
        self.cells = [
            {"dataset": "digits", "method": m, "ipc": "10", "student": "convnet", "seeds": seeds}
            for m in ("random", "wmdd")
        ]
        for cell in self.cells:
            for labels in self.recipes:
                for seed in range(seeds):
                    self.write_evaluation(cell, labels, seed)
            folder = root / cell["method"]
            (folder / "png/0_zero").mkdir(parents=True)
            factor = {"random": 2, "wmdd": 1}[cell["method"]]
            (folder / "images").write_bytes(bytes(factor * 3000))
            (folder / "labels").write_bytes(bytes(factor * 2_500_000))
            for name, size in (("0.png", 300), ("1.png", 45)):
                (folder / "png/0_zero" / name).write_bytes(bytes(factor * size))
            self.write_benchmarks(cell["method"], "recovery", [1.5, (2, 0.25)])
            self.write_benchmarks(cell["method"], "relabel", [4.0])
            self.write_benchmarks(cell["method"], "training", [10.0, 20.0][:seeds])
        self.write_benchmarks("wmdd", "barycenters", [0.5] * 10)

    def evaluation(self, cell: dict, labels: str, seed: int) -> Path:
        return self.root / cell["method"] / f"{labels}{seed}.json"

    def write_evaluation(self, cell: dict, labels: str, seed: int, known: bool = True, **changes) -> None:
        place = {k: v for k, v in cell.items() if k != "seeds"} | {"recipe": self.recipes[labels], **changes}
        data = make_header("describe_dataset", {"dataset": "digits"}, {}, "")
        header = make_header("evaluate_student", {**place, "seed": str(seed)}, {"known": known}, "", [data])
        if known:
            self.expected[labels]["evaluate_student"] = [header["lineage"]["evaluate_student"]]
        top1 = {"soft": 60.0, "hard": 40.0}[labels] + seed
        content = {"top1": top1, "top5": 99.0, "count": 9, "labels": labels}
        write_json(self.evaluation(cell, labels, seed), content, header)

    def write_benchmarks(self, method: str, step: str, seconds: list[float | tuple[float, ...]]) -> None:
        """A file for each of `seconds`, with a row for each of several."""
        folder = self.root / "benchmarks" / method
        folder.mkdir(parents=True, exist_ok=True)
        for number, s in enumerate(seconds):
            rows = [f"{row}\t0:00:01\t9.5\n" for row in (s if isinstance(s, tuple) else (s,))]
            (folder / f"{step}{number}.tsv").write_text("".join(["s\th:m:s\tmax_rss\n", *rows]))

    def tabulate(self, **labels: object) -> dict[str, str]:
        blocks = [str(c) for c in range(10)]
        parts = {"recovery": 2, "relabel": 1, "training": self.cells[0]["seeds"], "barycenters": blocks}

        def benchmarks(method: str) -> dict:
            steps = [s for s in parts if s != "barycenters" or method == "wmdd"]
            return {s: [str(self.root / "benchmarks" / method / f"{s}{{}}.tsv"), parts[s]] for s in steps}

        files = {
            labels: [str(self.evaluation(c, labels, s)) for c in self.cells for s in range(c["seeds"])]
            for labels in self.recipes
        }
        files |= {
            k: [str(self.root / c["method"] / k) for c in self.cells] for k in ("images", "png", "labels")
        }
        settings = {
            "title": "Cost",
            "cells": [{**c, "benchmarks": benchmarks(c["method"])} for c in self.cells],
            "recipes": self.recipes,
            "expected": self.expected,
            "labels": {
                "datasets": {"digits": "Digits"},
                "methods": {"random": "random real", "wmdd": "WMDD"},
                **labels,
            },
        }
        output = {k: str(self.root / f"cost.{k}") for k in ("csv", "md", "tex")}
        job = Job(
            "tabulate_cost",
            {"figure": "cost"},
            files,
            output,
            json.loads(json.dumps(settings)),
            "",
            "cpu",
            1,
            "-",
        )
        tabulate_cost.main(job)
        return output


def test_bytes_seconds_and_accuracies_of_each_set(tmp_path):
    output = Sets(tmp_path).tabulate()
    random, wmdd = rows_of(output["csv"])
    assert (wmdd["image_bytes"], wmdd["png_bytes"], wmdd["label_bytes"]) == ("3000", "345", "2500000")
    assert (wmdd["barycenters_seconds"], wmdd["recovery_seconds"]) == ("5.00", "3.75")
    assert (wmdd["relabel_seconds"], wmdd["training_seconds"]) == ("4.00", "15.00")  # of one student
    assert (random["image_bytes"], random["png_bytes"], random["label_bytes"]) == ("6000", "690", "5000000")
    assert random["barycenters_seconds"] == ""
    for labels, values in (("soft", [60, 61]), ("hard", [40, 41])):
        assert float(wmdd[f"top1_{labels}_mean"]) == statistics.mean(values)
        assert float(wmdd[f"top1_{labels}_sd"]) == pytest.approx(statistics.stdev(values), abs=1e-4)
    text = Path(output["md"]).read_text(encoding="utf-8")
    shown = "| 10 | WMDD | 3.0 kB | 0.3 kB | 2.5 MB | 5.0 | 3.8 | 4.0 | 15.0 | 60.5 ± 0.7 | 40.5 ± 0.7 |"
    assert shown in text
    assert "| 10 | random real | 6.0 kB | 0.7 kB | 5.0 MB | – |" in text
    assert r"60.5 $\pm$ 0.7" in Path(output["tex"]).read_text(encoding="utf-8")


def test_the_cost_table_says_when_the_test_set_was_not_read(tmp_path):
    labels = {"test": {}, "held-out": {"held_out": ["digits"]}}
    told = [Path(Sets(tmp_path / n).tabulate(**own)["md"]).read_text() for n, own in labels.items()]
    assert "top-1 on the real test set, mean" in told[0]
    assert "top-1 on a held-out part of the training set, mean" in told[1]


def test_files_of_an_earlier_configuration_are_not_counted(tmp_path):
    sets = Sets(tmp_path)
    sets.write_benchmarks("wmdd", "training", [10.0, 20.0, 99.0])
    sets.write_benchmarks("wmdd", "recovery", [1.5, 2.25, 99.0])
    _, wmdd = rows_of(sets.tabulate()["csv"])
    assert (wmdd["training_seconds"], wmdd["recovery_seconds"]) == ("15.00", "3.75")


def test_what_is_missing_is_missing_and_never_zero(tmp_path):
    sets = Sets(tmp_path)
    for lost in ("benchmarks/wmdd/recovery1.tsv", "wmdd/hard0.json", "wmdd/hard1.json"):
        (tmp_path / lost).unlink()
    (tmp_path / "benchmarks/wmdd/relabel0.tsv").write_text("s\th:m:s\n")  # begun, never finished
    (tmp_path / "benchmarks/random/relabel0.tsv").write_text("s\th:m:s\n-\t-\n")
    output = sets.tabulate()
    random, wmdd = rows_of(output["csv"])
    assert {wmdd[k] for k in ("recovery_seconds", "relabel_seconds", "top1_hard_mean", "top1_hard_sd")} == {
        ""
    }
    assert wmdd["top1_hard_n"] == "0" and wmdd["top1_soft_n"] == "2"
    assert random["relabel_seconds"] == "" and random["recovery_seconds"] == "3.75"
    text = Path(output["md"]).read_text(encoding="utf-8")
    assert "| 5.0 | – | – | 15.0 | 60.5 ± 0.7 | – |" in text
    assert "0.0" not in text.split("\n\n")[1]


def test_a_single_student_has_no_deviation(tmp_path):
    output = Sets(tmp_path, seeds=1).tabulate()
    assert {r["top1_soft_sd"] for r in rows_of(output["csv"])} == {""}
    assert "±" not in Path(output["md"]).read_text(encoding="utf-8").split("\n\n")[1]


def test_evaluations_of_another_configuration_or_place_are_refused_by_name(tmp_path):
    sets = Sets(tmp_path)
    sets.write_evaluation(sets.cells[1], "hard", 1, known=False)
    with pytest.raises(UserError, match=r"wmdd/hard1\.json .* of evaluate_student"):
        sets.tabulate()
    sets.write_evaluation(sets.cells[1], "hard", 1, method="sre2l")
    with pytest.raises(UserError, match=r"wmdd/hard1\.json was made for method 'sre2l', not 'wmdd'"):
        sets.tabulate()
    assert not (tmp_path / "cost.csv").exists()


# ---- formats ---------------------------------------------------------------------------------


def test_tables_for_people_mark_what_is_missing_and_escape():
    shown = [["a_b", "rate (%)"], ["x|y", "1.5 ± 0.1"], ["λ", ""]]
    text = as_markdown(shown, "Title", ["One note."])
    assert (
        text
        == "# Title\n\n| a_b | rate (%) |\n| --- | ---: |\n| x\\|y | 1.5 ± 0.1 |\n| λ | – |\n\nOne note.\n"
    )
    tex = as_latex(shown, ["One note."])
    assert tex.startswith("% One note.\n") and "\\begin{tabular}{lr}" in tex
    assert "a\\_b & rate (\\%) \\\\" in tex and "$\\lambda$ & -- \\\\" in tex


def test_latex_knows_every_character_of_the_hyperparameters():
    names = [*tabulate_hyperparameters.SQUEEZE, *tabulate_hyperparameters.RECOVER]
    assert all(escape(name).isascii() for name in names)
    assert escape("[1] a < b | c") == "{}[1] a $<$ b $|$ c" and escape("*") == "{}*"


# ---- hyperparameters -------------------------------------------------------------------------


def test_squeeze_and_recover_show_their_own_settings():
    column = {"title": "Digits", "dataset": "digits", "preset": "digits", "resolution": 16}
    squeeze = {"architecture": "convnet", "crop_scale_min": 0.25, "epochs": 9, "learning_rate": 0.5}
    recover = {"crop_scale_min": 0.75, "crop_scale_start": 0.125, "roll": 3, "learning_rate": 0.25}
    column |= {"squeeze": squeeze, "recover": {"wmdd": recover}}
    rows = tabulate_hyperparameters.build_rows([column], {"wmdd": "WMDD"})
    found = {row["setting"]: row["Digits"] for row in rows}
    assert (found["squeeze: smallest crop"], found["recover: smallest crop"]) == ("0.25", "0.75")
    assert (found["squeeze: learning rate"], found["recover: learning rate"]) == ("0.5", "0.25")
    assert (found["squeeze: epochs"], found["recover: largest shift"]) == ("9", "3")


TABLE_6 = {  # setting → ImageNette, Tiny-ImageNet, ImageNet-1K, typed from the paper's appendix E
    "squeeze: optimizer": ("SGD",) * 3,
    "squeeze: learning rate": (0.025,) * 3,
    "squeeze: weight decay": (1e-4,) * 3,
    "squeeze: momentum": (0.9,) * 3,
    "squeeze: batch size": (32,) * 3,
    "squeeze: scheduler": ("cosine decay",) * 3,
    "squeeze: epochs": (100,) * 3,
    "recover: λ": (10, 300, 500),
    "recover: optimizer": ("Adam",) * 3,
    "recover: learning rate": (0.25, 0.1, 0.25),
    "recover: β1, β2": ("0.5, 0.9",) * 3,
    "recover: batch size": (100,) * 3,
    "recover: scheduler": ("cosine decay",) * 3,
    "recover: iterations": (2000,) * 3,
}


@pytest.mark.workflow
def test_the_table_of_hyperparameters_is_table_6(tmp_path):
    done = run_snakemake(tmp_path, "--cores", "1", "hyperparameters")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = tmp_path / "results/smoke/report/tables"
    rows = {r["setting"]: r for r in rows_of(tables / "hyperparameters.csv")}
    names = ("ImageNette", "Tiny-ImageNet", "ImageNet-1K")
    for setting, wanted in TABLE_6.items():
        for name, value in zip(names, wanted, strict=True):
            found = rows[setting][name]
            assert found == value if isinstance(value, str) else float(found) == value, (setting, name)
    assert rows["resolution"] == {
        "setting": "resolution",
        "Digits (default)": "16",  # config.yaml's, whatever preset the table is built under
        "ImageNette": "224",
        "Tiny-ImageNet": "64",
        "ImageNet-1K": "224",
    }
    assert re.search(
        r"\| recover: λ \| \d+ \| 10 \| 300 \| 500 \|", (tables / "hyperparameters.md").read_text()
    )
