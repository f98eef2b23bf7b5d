"""The workflow itself, run on the smoke preset: one command, repeatable bytes, small reruns, clear errors."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, planned, run_snakemake

from wmdd_core.artifacts import read_tensors
from workflow_scripts.status import count_jobs

pytestmark = pytest.mark.workflow


def test_smoke_makes_tables_figures_page_and_logs(smoke):
    report = smoke / "results/smoke/report"
    for name in ("tables/main.csv", "tables/main.md", "tables/main.tex", "figures/gallery.png", "index.html"):
        assert (report / name).stat().st_size > 0, name
    rows = list(csv.DictReader((report / "tables/main.csv").open(encoding="utf-8")))
    assert {(r["method"], r["ipc"]) for r in rows} == {
        ("all_real", "all"),
        *((m, i) for m in ("random", "sre2l", "wmdd") for i in ("1", "2")),
    }
    assert all(r["n_seeds"] == "2" and 0 <= float(r["top1_mean"]) <= 100 for r in rows)
    logs = list((smoke / "results/smoke/logs").rglob("*.log"))
    assert any("top-1" in log.read_text() for log in logs)
    assert list((smoke / "results/smoke/benchmarks").rglob("*.tsv"))


def test_nothing_is_left_to_do_afterwards(smoke):
    done = run_snakemake(smoke, "--cores", "2")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_exported_set_describes_itself_and_its_pngs_equal_its_tensors(smoke):
    import numpy as np
    from PIL import Image
    from torchvision.datasets import ImageFolder

    folder = smoke / "results/smoke/digits/distilled/wmdd/ipc2"
    tensors, header = read_tensors(folder / "images.safetensors")
    assert tensors["images"].dtype == torch.uint8 and tensors["images"].shape == (20, 3, 8, 8)
    assert header["classes"] == [str(c) for c in range(10)]
    for key in ("mean", "std", "value_range", "images_per_class", "method", "versions", "lineage", "commit"):
        assert header[key], key
    assert header["method"]["seed"] == 0 and header["method"]["lambda_bn"] == 30
    sums = torch.zeros(10).index_add_(0, tensors["labels"], tensors["weights"])
    torch.testing.assert_close(sums, torch.ones(10))
    assert (tensors["weights"] > 0).all()
    exported = ImageFolder(str(folder / "png"))
    assert len(exported.classes) == 10
    for (path, label), image, wanted in zip(
        exported.samples, tensors["images"], tensors["labels"], strict=True
    ):
        assert label == wanted
        assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())


def test_no_artefact_is_a_pickle(smoke):
    import numpy as np

    for path in (smoke / "results").rglob("*.np[yz]"):
        np.load(path, allow_pickle=False)
    suffixes = {p.suffix for p in (smoke / "results").rglob("*") if p.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth"}, suffixes


def test_checkpoints_are_gone_after_success(smoke):
    checkpoints = smoke / "results/smoke/checkpoints"
    assert [p for p in checkpoints.rglob("*") if p.is_file()] == []


def test_a_set_made_elsewhere_runs_through_labels_students_and_tables(smoke):
    """Our own PNGs, taken for somebody else's: at one image per class the student must come out the same."""
    distilled = smoke / "results/smoke/digits/distilled/wmdd"
    (smoke / "external.yaml").write_text(
        f"methods: {{theirs: {{kind: external, external: '{distilled}/ipc{{ipc}}/png'}}}}", encoding="utf-8"
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(smoke / "external.yaml")]
    place = "digits/evaluation/wmdd/{}/ipc1/convnet/seed0.json"
    done = run_snakemake(smoke, "--cores", "2", f"results/smoke/{place.format('theirs')}", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (
        json.loads((smoke / "results/smoke" / place.format(m)).read_text()) for m in ("wmdd", "theirs")
    )
    assert {k: v for k, v in ours.items() if k != "header"} == {
        k: v for k, v in theirs.items() if k != "header"
    }
    assert "import_images" in theirs["header"]["lineage"]


# ---- what a change makes stale ---------------------------------------------------------------


def test_online_labels_train_the_same_student_and_store_nothing(smoke, tmp_path):
    own = Path(shutil.copytree(smoke, tmp_path / "own"))
    target = "results/smoke/digits/evaluation/{}/wmdd/ipc2/convnet/seed0.json"
    done = run_snakemake(own, "--cores", "1", target.format("online"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (own / "results/smoke/digits/labels/online").exists()
    stored, online = (json.loads((own / target.format(r)).read_text()) for r in ("wmdd", "online"))
    assert online["header"]["lineage"].keys() == stored["header"]["lineage"].keys() - {"relabel_images"}
    assert online["train_loss"] == pytest.approx(stored["train_loss"], rel=1e-3)


def test_further_sets_have_seeds_of_their_own_and_leave_the_first_as_it_is(smoke, tmp_path):
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    (tmp_path / "overlay.yaml").write_text(
        "tables: {main: {methods: [all_real, random, wmdd], ipc: [1], sets: 2}}", encoding="utf-8"
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    done = run_snakemake(directory, "--cores", "2", "main", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    results = directory / "results/smoke"
    for method in ("random", "wmdd"):
        files = [
            f"{kind}/{method}{{}}/{rest}"
            for kind, rest in (
                ("distilled", "ipc1/images.safetensors"),
                ("labels/wmdd", "ipc1/labels.npy"),
                ("evaluation/wmdd", "ipc1/convnet/seed0.json"),
            )
        ]
        for file in files:
            first, second = (results / "digits" / file.format(number) for number in ("", "@1"))
            assert first.read_bytes() == (smoke / first.relative_to(directory)).read_bytes()
            assert first.read_bytes() != second.read_bytes()
        sets = (results / "digits" / files[0].format(number) for number in ("", "@1"))
        first, second = (read_tensors(file)[0]["images"] for file in sets)  # their headers always differ
        assert not torch.equal(first, second)
    rows = list(csv.DictReader((results / "report/tables/main.csv").open(encoding="utf-8")))
    found = {(r["method"], r["n_sets"], r["n_seeds"]) for r in rows}
    assert found == {("all_real", "1", "2"), ("random", "2", "4"), ("wmdd", "2", "4")}


def test_the_engines_own_report_needs_no_number_of_cores(smoke, tmp_path):
    own = Path(shutil.copytree(smoke, tmp_path / "own"))
    done = run_snakemake(own, "--report", str(tmp_path / "report.zip"))
    assert done.returncode == 0, done.stdout + done.stderr
    held = {Path(name).name for name in zipfile.ZipFile(tmp_path / "report.zip").namelist()}
    assert {"main.csv", "accuracy.png", "gallery.png", "index.html"} <= held
    for suffix in ("json", "csv", "md", "tex"):  # threads of what is timed are all cores there are
        (own / f"results/smoke/report/tables/efficiency.{suffix}").touch()
    done = run_snakemake(own, "--report", str(tmp_path / "other.zip"), "efficiency")
    assert "set it with --cores" not in done.stdout + done.stderr


def rules_and_methods(messages: set[str]) -> tuple[set[str], set[str]]:
    """First words of the messages, and the methods that they name."""
    methods = {m for m in ("all_real", "random", "sre2l", "wmdd") for t in messages if f" {m} " in f"{t} "}
    return {m.split()[0] for m in messages}, methods


def test_one_table_takes_the_jobs_that_it_needs_and_no_other(smoke):
    told = planned(smoke, "", "ablation")
    assert rules_and_methods(told)[0] == {"Barycenter", "Recover", "Gather", "Relabel", "Evaluate", "Table"}
    made = {m.split()[1] for m in told if m.startswith(("Recover", "Gather", "Relabel", "Evaluate"))}
    assert made == {"wmdd", "ce_per_class", "barycenter_global", "ce_global"}
    assert [m for m in told if m.startswith("Table")] == ["Table ablation"]


def test_lambda_reruns_what_depends_on_it_and_nothing_else(smoke):
    verbs, methods = rules_and_methods(planned(smoke, "methods: {wmdd: {lambda_bn: 3}}"))
    assert methods == {"wmdd"}
    assert verbs == {"Recover", "Gather", "Relabel", "Evaluate", "Table", "Figure", "Page"}


@pytest.mark.parametrize(
    ("overlay", "first"),
    [
        # Snakemake compares a rule's parameters as a set of values: these two would be missed.
        ("teachers: {convnet: {momentum: 1.0e-4, weight_decay: 0.9}}", "Pretrain"),
        ("teachers: {convnet: {crop_scale_min: 0.9}}", "Pretrain"),
    ],
)
def test_swapped_or_repeated_values_are_told_apart(smoke, overlay, first):
    assert first in rules_and_methods(planned(smoke, overlay))[0]


def test_labels_and_appearance_make_no_student_stale(smoke):
    verbs, _ = rules_and_methods(
        planned(smoke, "methods: {wmdd: {label: Ours}}\ndatasets: {digits: {title: D}}")
    )
    assert verbs == {"Table", "Figure", "Page"}


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the project to edit."""
    wanted = (
        "Snakefile",
        "config.yaml",
        "rules",
        "workflow_scripts",
        "wmdd_core",
        "schemas",
        "presets",
        "report",
    )
    for name in (*wanted, "profiles", "envs"):
        source, target = ROOT / name, tmp_path / "copy" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "copy"


def test_a_comment_in_the_library_makes_nothing_stale(smoke, copied):
    module = copied / "wmdd_core/barycenter.py"
    module.write_text("# a comment\n" + module.read_text() + "\n# another\n")
    assert planned(smoke, root=copied) == set()


def test_an_edit_of_the_barycenter_reruns_it_and_what_follows(smoke, copied):
    module = copied / "wmdd_core/barycenter.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    verbs, methods = rules_and_methods(planned(smoke, root=copied))
    assert methods == {"wmdd"}
    assert verbs == {"Barycenter", "Recover", "Gather", "Relabel", "Evaluate", "Table", "Figure", "Page"}


def test_an_edit_known_to_change_nothing_can_be_accepted(smoke, copied):
    from wmdd_core.code import code_hash

    known = code_hash("compute_barycenter")
    module = copied / "wmdd_core/barycenter.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    command = "from wmdd_core.code import code_hash; print(code_hash('compute_barycenter'))"
    now = subprocess.check_output([sys.executable, "-c", command], text=True, cwd=copied).strip()
    accepted = f"accept_code: {{compute_barycenter: {{'{now}': '{known}'}}}}"
    assert not {"Barycenter", "Recover"} & rules_and_methods(planned(smoke, accepted, root=copied))[0]
    # The next edit is another.
    module.write_text(module.read_text() + "\nEDITED = False\n")
    assert {"Barycenter", "Recover"} <= rules_and_methods(planned(smoke, accepted, root=copied))[0]


@pytest.mark.parametrize("edited", [True, False])
def test_code_that_is_edited_during_a_run_stops_the_jobs_that_use_it(copied, tmp_path, edited):
    """Here by the hook that runs before the first job; its results would bear the hash of the old code."""
    line = "EDITED = True" if edited else "# a comment"
    hook = f"\nonstart:\n    open('{copied}/wmdd_core/layouts.py', 'a').write('\\n{line}\\n')\n"
    with open(copied / "Snakefile", "a") as file:
        file.write(hook)
    description = "results/smoke/digits/description.json"
    done = run_snakemake(tmp_path / "run", "--cores", "1", "--until", "describe_dataset", root=copied)
    log = (tmp_path / "run/results/smoke/logs/describe_dataset/digits.log").read_text()
    told = "error: the code of describe_dataset was edited since this run began"
    assert (told in log) == edited and (done.returncode != 0) == edited
    assert (tmp_path / "run" / description).exists() != edited


def test_a_job_on_a_cluster_notices_an_edited_configuration(smoke, monkeypatch):
    """It reads the files again, long after the run began that put it into the queue."""
    monkeypatch.setenv("WMDD_CONFIG", "0123456789abcdef")
    done = run_snakemake(smoke, "--dry-run", "--mode", "remote")
    assert "error: the configuration or rules/ was edited since this run began" in done.stdout + done.stderr
    assert done.returncode == 1
    assert run_snakemake(smoke, "--dry-run").returncode == 0  # a run of its own


def test_a_job_on_a_cluster_notices_edited_rules(copied, tmp_path, monkeypatch):
    hook = "\nonstart:\n    print('began with', os.environ['WMDD_CONFIG'])\n"
    with open(copied / "Snakefile", "a") as file:
        file.write(hook)
    target = ("--cores", "1", "results/smoke/digits/description.json")
    done = run_snakemake(tmp_path / "run", *target, root=copied)
    (known,) = re.findall(r"^began with (\w+)$", done.stdout + done.stderr, re.MULTILINE)
    monkeypatch.setenv("WMDD_CONFIG", known)
    assert run_snakemake(tmp_path / "run", "-n", "--mode", "remote", root=copied).returncode == 0
    with open(copied / "rules/inputs.smk", "a") as file:
        file.write("\nEDITED = True\n")
    done = run_snakemake(tmp_path / "run", "-n", "--mode", "remote", root=copied)
    assert done.returncode == 1 and "configuration or rules/ was edited" in done.stdout + done.stderr


def test_results_without_a_record_are_told(smoke, tmp_path):
    """Copied without .snakemake: Snakemake cannot know whether the settings are still those."""
    shutil.copytree(smoke / "results", tmp_path / "run/results")
    (tmp_path / "overlay.yaml").write_text("methods: {wmdd: {lambda_bn: 77}}", encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    for run in ("--dry-run", "--cores=1"):
        done = run_snakemake(tmp_path / "run", run, *files, preset="")
        told = done.stdout + done.stderr
        assert done.returncode == 0 and "Nothing to be done" in told
        assert re.search(r"warning: \d+ jobs? left files without a record", told)
    done = run_snakemake(smoke, "--cores", "1")
    assert "without a record" not in done.stdout + done.stderr


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "told"),
    [
        ("sede: 1", "unknown name 'sede'; did you mean 'seed'?"),
        (
            "methods: {wmdd: {lamda_bn: 1}}",
            "methods.wmdd: unknown name 'lamda_bn'; did you mean 'lambda_bn'?",
        ),
        ("methods: {wmdd: {lambda_bn: -1}}", "methods.wmdd.lambda_bn is -1; the least allowed is 0"),
        ("methods: {wmdd: {lambda_bn: much}}", "methods.wmdd.lambda_bn is 'much'; expected number"),
        ("methods: {wmdd: {lambda_bn: .nan}}", "methods.wmdd.lambda_bn is nan; expected a finite number"),
        ("methods: {wmdd: {lambda_bn: {digits: -2}}}", "methods.wmdd.lambda_bn.digits is -2"),
        ("methods: {wmdd: {barycenter: learnd}}", "unknown name 'learnd'; did you mean 'learned'?"),
        ("tables: {main: {methods: [wmd]}}", "tables.main.methods: unknown name 'wmd'; did you mean 'wmdd'?"),
        ("tables: {main: {datasets: [digit]}}", "tables.main.datasets: unknown name 'digit'; did you mean"),
        ("students: {convnet: {architecture: resnet19}}", "is 'resnet19'; known are convnet, resnet18"),
        ("datasets: {digits: {source: digitz}}", "did you mean 'digits'?"),
        ("datasets: {digits: {classes: 7}}", "7"),
        (
            "datasets: {c: {source: cifar10, resolution: 32, teacher: convnet}}",
            "datasets.c: a source of files needs 'root'; add what is missing",
        ),
        ("student_seeds: 0", "student_seeds is 0; the least allowed is 1"),
    ],
)
def test_a_mistake_in_the_config_is_told_in_one_line(tmp_path, overlay, told):
    (tmp_path / "bad.yaml").write_text(overlay, encoding="utf-8")
    done = run_snakemake(tmp_path, "-n", "--configfile", str(tmp_path / "bad.yaml"), preset="")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("Using ", "Config file "))]
    assert len(errors) == 1 and told in errors[0], done.stderr
    assert "config: config" not in errors[0]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("seed: 1\nmethods:\n  wmdd: {iterations: 3}\nmethods:\n  dm: {iterations: 3}\n", 4, "methods"),
        ("methods:\n  wmdd:\n    roll: 1\n    roll: 2\n", 4, "roll"),
        ("tables:\n  main: {ipc: [1], ipc: [2]}\n", 2, "ipc"),
    ],
)
def test_a_key_that_stands_twice_is_told_with_its_line(tmp_path, text, line, key):
    """YAML keeps the last: a block pasted behind another one of its name would replace it."""
    (tmp_path / "twice.yaml").write_text(text, encoding="utf-8")
    done = run_snakemake(tmp_path, "-n", "--configfile", str(tmp_path / "twice.yaml"), preset="")
    assert done.returncode == 1
    assert f"twice.yaml, line {line}: the key '{key}' stands there twice; merge the two" in done.stderr


@pytest.mark.parametrize(
    ("overlay", "target", "told"),
    [
        ("figures: {hyperparameters: {methods: [dm]}}", "hyperparameters", "dm is not recovered by the loop"),
        ("students: {convnet: {depth: 5}}", "main", "ConvNet of depth 5 halves 8 pixels below one"),
        ("teachers: {convnet: {depth: 5}}", "main", "teachers.convnet, dataset digits: a ConvNet of depth 5"),
        ("students: {convnet_in: {depth: 5}}", "all_methods", "students.convnet_in, dataset digits: a"),
        (
            "methods: {all_real: {batch_size: 1}}",
            "main",
            "methods.all_real.batch_size: BatchNorm cannot train",
        ),
        ("methods: {wmdd: {crop_scale_start: 0.01}}", "main", "methods.wmdd.crop_scale_start: crops shrink"),
        (
            "methods: {wmdd: {feature_term: none, bn_term: none}}",
            "main",
            "methods.wmdd: feature_term and bn_term",
        ),
        ("teachers: {convnet: {weights: torchvision}}", "main", "torchvision has none of convnet"),
        (
            "teachers: {convnet: {architecture: vit_tiny}}",
            "main",
            ": its teacher convnet has no BatchNorm layer; set bn_term: none",
        ),
        ("figures: {gallery: {classes: [0, 10]}}", "gallery", "gallery.classes: 10 is not a class of digits"),
        (
            "figures: {accuracy: {student: resnet18}}",
            "accuracy",
            "student: resnet18 is not in the table main, which has convnet",
        ),
        (
            "figures: {accuracy: {recipe: hard}}",
            "accuracy",
            "recipe: hard is not in the table main",
        ),
        (
            "tables: {main: {methods: [all_real]}}",
            "accuracy",
            "the table main has no distilled set",
        ),
        (
            "figures: {lambda_sensitivity: {table: main}}",
            "lambda_sensitivity",
            "the table main holds no sweep",
        ),
        (
            "methods: {rates: {like: wmdd, sweep: {learning_rate: [1]}}}\n"
            "tables: {lambda: {methods: [wmdd_lambda, rates]}}",
            "lambda_sensitivity",
            "the table lambda holds sweeps of lambda_bn and learning_rate",
        ),
        (
            "methods: {starts: {like: wmdd, sweep: {start: [noise, real]}}}\n"
            "tables: {lambda: {methods: [starts]}}",
            "lambda_sensitivity",
            "the sweep starts has no axis, as its start is 'noise', no number",
        ),
        (
            "methods: {reals: {like: all_real, sweep: {epochs: [1, 2]}}}\n"
            "tables: {lambda: {methods: [reals, wmdd]}}",
            "lambda_sensitivity",
            "the table lambda holds no sweep",
        ),
        ("figures: {tsne: {classes: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]}}", "tsne", "name each once"),
        (
            "datasets: {many: {source: cifar100, root: x, resolution: 16, teacher: convnet}}\n"
            "figures: {tsne: {datasets: [many], classes: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}",
            "tsne",
            "figures.tsne.classes: a map has colours for 10 classes; name no more",
        ),
        (
            "methods: {ours: {like: wmdd}}\nfigures: {hyperparameters: {methods: [ours]}}",
            "hyperparameters",
            "figures.hyperparameters.methods: the preset default has no method ours",
        ),
    ],
)
def test_what_only_a_job_would_find_is_told_before_any(tmp_path, overlay, target, told):
    (tmp_path / "bad.yaml").write_text(overlay, encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "bad.yaml")]
    done = run_snakemake(tmp_path, "-n", target, *files, preset="")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error: config: " in line]
    assert done.returncode == 1 and len(lines) == 1 and told in lines[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_wrong_path_is_told_where_an_earlier_table_would_do(smoke, tmp_path):
    """Snakemake takes a file as it is if what it is made of lacks an input."""
    for overlay, told in (
        (
            "methods: {theirs: {kind: external, external: '/nowhere/ipc{ipc}'}}\n"
            "tables: {main: {methods: [theirs]}}",
            "methods.theirs.external: there is no file or folder /nowhere/ipc",
        ),
        (
            "teachers: {convnet: {weights: /nowhere/w.pt}}",
            "teachers.convnet.weights: there is no file or folder /nowhere/w.pt",
        ),
    ):
        (tmp_path / "wrong.yaml").write_text(overlay, encoding="utf-8")
        files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "wrong.yaml")]
        done = run_snakemake(smoke, "-n", *files, preset="")
        assert done.returncode == 1 and told in done.stdout + done.stderr


@pytest.mark.parametrize("method", ["random", "kmeans_real", "dm", "real_start"])
def test_more_images_per_class_than_there_are_is_told_by_the_job(smoke, tmp_path, method):
    overlay = "methods: {real_start: {like: wmdd, start: real, feature_term: cross_entropy}}"
    (tmp_path / "real.yaml").write_text(overlay, encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "real.yaml")]
    target = f"results/smoke/digits/distilled/{method}/ipc500/images.safetensors"
    done = run_snakemake(smoke, "--cores", "2", target, *files, preset="")
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "fewer than ipc 500; lower ipc" in told
    assert "Traceback" not in told
    assert "without a record" not in told  # what was not reached has left no file
    assert not (smoke / target).exists()


def test_a_methods_own_teacher_recovers_and_the_datasets_labels(smoke, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "teachers: {other: {like: convnet}}\nmethods: {wmdd: {teacher: other}}", encoding="utf-8"
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "own.yaml")]
    targets = [
        "results/smoke/digits/labels/wmdd/wmdd/ipc1/labels.npy",
        "results/smoke/digits/evaluation/online/wmdd/ipc1/convnet/seed0.json",
    ]
    done = run_snakemake(smoke, "--dry-run", "--printshellcmds", *targets, *files, preset="")
    line = r"printf .*?teachers/(\w+)/.* python -m workflow_scripts\.(\w+) "
    found = {rule: teacher for teacher, rule in re.findall(line, done.stdout + done.stderr)}
    wanted = {"recover_images": "other", "relabel_images": "convnet", "evaluate_student": "convnet"}
    assert wanted.items() <= found.items()


EVERY_KIND = """
classes_per_job: 4
student_seeds: 1
datasets: {digits: {store_train: false}}
methods:
  dm: {iterations: 2}
  dc: {iterations: 2}
  wmdd_real: {like: wmdd, start: real}
  wmdd_lambda: {iterations: 3, sweep: {lambda_bn: [1, 100]}}
recipes: {hard: {epochs: 2}}
tables:
  main: {methods: [kmeans_real, dm, dc, wmdd_real, wmdd_lambda], ipc: [1], recipes: [hard]}
  lambda: {methods: [wmdd_lambda], ipc: [1], recipes: [hard]}
"""


def test_every_kind_of_method_runs_and_images_are_read_from_files(smoke, tmp_path):
    (tmp_path / "kinds.yaml").write_text(EVERY_KIND, encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "kinds.yaml")]
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    done = run_snakemake(directory, "--cores", "2", "main", "lambda_sensitivity", *files, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    report = directory / "results/smoke/report"
    rows = list(csv.DictReader((report / "tables/main.csv").open(encoding="utf-8")))
    made = ["kmeans_real", "dm", "dc", "wmdd_real", "wmdd_lambda1", "wmdd_lambda100"]
    assert [r["method"] for r in rows] == made and all(float(r["top1_mean"]) > 0 for r in rows)
    assert {r["labels"] for r in rows} == {"hard"}
    rows = list(csv.DictReader((report / "figures/lambda_sensitivity.csv").open(encoding="utf-8")))
    assert [r["value"] for r in rows] == ["1.0", "100.0"]


def test_a_figure_of_one_dataset_may_say_what_it_shows_by_dataset(smoke, tmp_path):
    (tmp_path / "by.yaml").write_text(
        "figures: {gallery: {ipc: {digits: [2], default: [50]}, methods: {digits: [random]}}}",
        encoding="utf-8",
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "by.yaml")]
    done = run_snakemake(smoke, "--dry-run", "gallery", *files, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert count_jobs(done.stdout + done.stderr) == {"plot_gallery": 1}


def test_distances_of_sets_that_no_teacher_made_are_measured_in_its_features(smoke, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "figures: {far: {kind: distances, datasets: [digits], methods: [random], ipc: [1]}}", encoding="utf-8"
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "far.yaml")]
    done = run_snakemake(smoke, "--cores", "2", "far", *files, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((smoke / "results/smoke/report/figures/far.csv").open(encoding="utf-8")))
    assert {r["method"] for r in rows} == {"random"} and all(float(r["w1"]) > 0 for r in rows)


def test_headers_say_where_an_evaluation_comes_from(smoke):
    path = smoke / "results/smoke/digits/evaluation/wmdd/wmdd/ipc1/convnet/seed0.json"
    lineage = json.loads(path.read_text())["header"]["lineage"]
    assert set(lineage) == {
        "describe_dataset",
        "pretrain_teacher (convnet)",
        "extract_features (convnet)",
        "compute_barycenter (convnet)",
        "recover_images",
        "gather_images",
        "relabel_images",
        "evaluate_student",
    }
