"""The sides of every benchmark do the same work, and its tables have all columns."""

import json
import os
import re
import statistics

import numpy as np
import pytest
import torch

from benchmarks import stages
from benchmarks.__main__ import SIZES
from benchmarks.compare import (
    COLUMNS,
    WHOLE,
    Compared,
    Disagreement,
    build_lines,
    check_agreement,
    compare,
    whole_evaluation,
    write_json,
)
from benchmarks.limits import count_operations, measured_before, operations_of
from benchmarks.plain import epochs_tested
from benchmarks.scaling import draw, slope
from benchmarks.startup import ROOT, UNUSED, check_unused, imported, scripts
from wmdd_core.models import build_model


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny work: on a busy machine two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stage", SIZES)
def test_both_sides_do_the_same_work(stage, tmp_path):
    ((_, sizes),) = SIZES[stage]["tiny"]
    sides = {side: getattr(stages, stage)(side, "cpu", tmp_path, **sizes) for side in ("ours", "plain")}
    checked = {side: work.check() for side, work in sides.items()}
    assert check_agreement(stage, sizes, checked["ours"], checked["plain"])
    for work in sides.values():
        assert all(np.isfinite(value) for value in work.run().values())


@pytest.mark.parametrize("stage", [s for s in SIZES if s != "barycenter"])
def test_other_work_is_told_from_the_same(stage, tmp_path):
    """Each array of a side's check counts: half as much more of it is a disagreement."""
    ((_, sizes),) = SIZES[stage]["tiny"]
    checked = getattr(stages, stage)("plain", "cpu", tmp_path, **sizes).check()
    for name, values in checked.items():
        with pytest.raises(Disagreement, match=name):
            check_agreement(stage, sizes, {**checked, name: values * 1.5}, checked)


def test_a_worse_barycenter_is_refused():
    plain = {"w2_squared": np.array(10.0), "free_support": np.array(11.0)}
    assert check_agreement("barycenter", {}, {"w2_squared": np.array(10.1)}, plain)
    for worse, best in ((10.3, 10.0), (11.1, 11.05)):
        with pytest.raises(Disagreement):
            ours = {"w2_squared": np.array(worse)}
            check_agreement("barycenter", {}, ours, {**plain, "w2_squared": np.array(best)})


def test_a_comparison_has_every_column_and_every_repeat(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # `compare` sets them for good: undone after the test
    ((_, sizes),) = SIZES["barycenter"]["tiny"]
    compared = compare("barycenter", sizes, repeats=2, target=1.0)
    head, row = build_lines([compared])
    assert tuple(head) == COLUMNS and len(row) == len(COLUMNS) and all(row)
    write_json(tmp_path / "barycenter.json", [compared])
    (kept,) = json.loads((tmp_path / "barycenter.json").read_text())
    assert {side: len(seconds) for side, seconds in kept["seconds"].items()} == {"ours": 2, "plain": 2}
    assert kept["ratio"] == statistics.median(kept["seconds"]["ours"]) / statistics.median(
        kept["seconds"]["plain"]
    )
    assert {"machine", "versions", "date", "commit", "command"} == set(kept["origin"])
    assert all(kept["origin"].values())
    # Python with NumPy takes more than 20 MiB, and no PyTorch has been imported: that would be above 300.
    assert 20 * 2**20 < kept["peak"]["ours"] < 300 * 2**20


def test_a_whole_evaluation_is_reckoned_from_its_parts():
    repeats = [{"seconds an epoch": e, "seconds a test image": t} for e, t in ((2, 0.2), (1, 0.1), (9, 0.9))]
    compared = Compared("evaluate", {}, "cpu", {}, {}, {"ours": repeats, "plain": repeats}, {})
    assert whole_evaluation(compared, "ours") == pytest.approx(300 * 2 + 3925 * 0.2)
    assert whole_evaluation(compared, "plain") == pytest.approx(300 * 2 + 31 * 3925 * 0.2)
    assert WHOLE["tests"]["plain"] == len(epochs_tested(WHOLE["epochs"])) == 31


def test_jobs_import_nothing_that_they_do_not_use():
    assert set(UNUSED) <= set(scripts())
    for script in ("compute_barycenter", "embed_tsne", "recover_images"):
        found = imported(script)
        check_unused(script, found)
    assert "torch" in found  # what is imported is seen
    with pytest.raises(Disagreement, match="matplotlib"):
        check_unused("recover_images", [*found, "matplotlib"])


def test_operations_are_those_of_the_layers():
    sizes = {"architecture": "convnet", "resolution": 16}
    model = build_model(**sizes, classes=10, seed=0)
    width, side = 128, 16
    inputs = (3, width, width)
    forward = sum(2 * 9 * c * width * (side >> block) ** 2 for block, c in enumerate(inputs))
    forward += 2 * width * 4 * 10
    assert count_operations(model, torch.zeros(1, 3, 16, 16), backward=False) == forward
    assert operations_of("relabel", {**sizes, "images": 7, "epochs": 3}) == 21 * forward


def test_operations_of_the_other_stages():
    sizes = {"architecture": "convnet", "resolution": 16}
    forward = operations_of("features", {**sizes, "images": 3}) / 3
    first = 2 * 9 * 3 * 128 * 16**2  # whose input wants no gradient in training
    recover = operations_of("recover", {**sizes, "classes": 2, "ipc": 3, "iterations": 4})
    assert recover == pytest.approx(24 * 2 * forward, rel=0.01)
    trained = operations_of("evaluate", {**sizes, "images": 5, "epochs": 2, "test": 7})
    assert trained == pytest.approx(10 * (3 * forward - first) + 7 * forward, rel=0.01)


def test_limits_are_of_the_last_run_on_this_machine(tmp_path):
    """Not of one with other threads, nor of an earlier one of the same work."""
    work, small = SIZES["relabel"]["tiny"][0][1], {"points": 9}

    def kept(name, stage, sizes, machine, second):
        row = {"stage": stage, "sizes": sizes, "device": "cpu", "origin": {"machine": machine}, "of": name}
        path = tmp_path / f"{name}-cpu.json"
        path.write_text(json.dumps([row]))
        os.utime(path, (second, second))

    kept("first", "relabel", work, "two threads", 1)
    kept("again", "relabel", work, "two threads", 2)
    kept("other", "relabel", work, "one thread", 3)
    kept("longer", "relabel", {**work, "epochs": 9}, "two threads", 4)
    kept("atoms", "barycenter", small, "two threads", 5)
    assert {row["of"] for row in measured_before(tmp_path, "two threads")} == {"again", "longer"}


def test_slopes_and_their_figure(tmp_path):
    assert slope([10, 20, 40], [1.0, 4.0, 16.0]) == pytest.approx(2)
    curve = {"stage": "recover", "values": [1, 2], "seconds": [0.1, 0.2], "slope": 1.0}
    draw({"images": [curve], "classes": [curve]}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_workflow_uses_no_benchmark():
    for folder in ("wmdd_core", "workflow_scripts", "rules"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".smk"):
                assert not re.search(r"^\s*(from|import) benchmarks", path.read_text("utf-8"), re.M), path
