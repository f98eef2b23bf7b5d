"""The presets hold the paper's settings, agree with each other, and a dry run tells what they cost."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_snakemake
from snakemake.utils import update_config

from rules.configuration import prepare, resolve
from rules.plan import Cost, Planner, Total, summarise

COSTS = yaml.safe_load((ROOT / "report/costs.yaml").read_text(encoding="utf-8"))
PAPER = ("imagenette", "tiny-imagenet", "imagenet1k")

# Table 6 of the paper, typed from its appendix E.
SQUEEZE = {
    "optimizer": "sgd",
    "learning_rate": 0.025,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "batch_size": 32,
    "epochs": 100,
}
RECOVER = {
    "imagenette": {"lambda_bn": 10, "learning_rate": 0.25, "batch_size": 100, "iterations": 2000},
    "tiny-imagenet": {"lambda_bn": 300, "learning_rate": 0.1, "batch_size": 100, "iterations": 2000},
    "imagenet1k": {"lambda_bn": 500, "learning_rate": 0.25, "batch_size": 100, "iterations": 2000},
}
# What the supplement leaves to the released code.
DATASET = {
    "imagenette": {"classes": 10, "resolution": 224, "store_train": False},
    "tiny-imagenet": {"classes": 200, "resolution": 64, "store_train": True},
    "imagenet1k": {"classes": 1000, "resolution": 224, "store_train": False},
}
ROLL = {"imagenette": 32, "tiny-imagenet": 4, "imagenet1k": 32}
SRE2L_LAMBDA = {"imagenette": 0.01, "tiny-imagenet": 1, "imagenet1k": 0.01}


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def resolved(preset: str) -> dict:
    """The prepared configuration under a preset, merged as Snakemake merges it."""
    merged = read("config.yaml")
    update_config(merged, read(f"presets/{preset}.yaml"))
    return prepare(merged, read("schemas/config.schema.yaml"))


def entry(preset: str, block: str, name: str, dataset: str) -> dict:
    return resolve(resolved(preset)[block][name], dataset, name)


BOTH = [(preset, dataset) for dataset in PAPER for preset in (dataset, "paper")]


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "dataset"), BOTH)
def test_squeeze_and_recover_are_those_of_table_6(preset, dataset):
    squeeze = entry(preset, "teachers", entry(preset, "datasets", dataset, dataset)["teacher"], dataset)
    assert {k: squeeze[k] for k in SQUEEZE} == SQUEEZE
    assert squeeze["architecture"] == "resnet18"
    recover = entry(preset, "methods", "wmdd", dataset)
    assert {k: recover[k] for k in RECOVER[dataset]} == RECOVER[dataset]


def test_what_is_fixed_in_code_is_what_table_6_says():
    from wmdd_core.recovery import RecoverySettings
    from wmdd_core.training import Schedule

    settings = RecoverySettings(iterations=2000, learning_rate=0.25, lambda_bn=10)
    assert (settings.beta1, settings.beta2) == (0.5, 0.9)
    halfway = [settings.learning_rate_at(s) / 0.25 for s in (0, 1000, 2000)]
    assert halfway == pytest.approx([1, 0.5, 0])  # cosine decay
    assert Schedule(epochs=2, optimizer="sgd", learning_rate=1).smoothing == 1


@pytest.mark.parametrize(("preset", "dataset"), BOTH)
def test_views_datasets_and_recipe_are_as_released(preset, dataset):
    settings = entry(preset, "datasets", dataset, dataset)
    assert {k: settings[k] for k in DATASET[dataset]} == DATASET[dataset]
    assert (settings["mean"], settings["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for method in ("wmdd", "sre2l"):
        found = entry(preset, "methods", method, dataset)
        assert (found["crop_scale_min"], found["roll"]) == (0.08, ROLL[dataset])
        assert found["start"] == "noise"
    recipe = entry(preset, "recipes", "wmdd", dataset)
    wanted = {
        "epochs": 300,
        "batch_size": 100,
        "temperature": 20,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
    }
    wanted |= {"optimizer": "adamw", "crop_scale_min": 0.08, "cutmix": True, "labels": "soft"}
    assert {k: recipe[k] for k in wanted} == wanted


@pytest.mark.parametrize(("preset", "dataset"), BOTH)
def test_sre2l_and_the_released_loss_differ_from_wmdd_as_published(preset, dataset):
    wmdd, released, sre2l, cda = (
        entry(preset, "methods", m, dataset) for m in ("wmdd", "wmdd_released", "sre2l", "cda")
    )
    assert wmdd["loss_form"] == "paper" and "ce_weight" not in wmdd
    assert {k for k in released if released[k] != wmdd.get(k)} == {"label", "loss_form", "ce_weight"}
    assert (released["loss_form"], released["ce_weight"]) == ("released", 1)
    assert sre2l["lambda_bn"] == SRE2L_LAMBDA[dataset]
    assert (sre2l["iterations"], sre2l["first_bn_multiplier"]) == (4000, 10)
    assert sre2l["learning_rate"] == wmdd["learning_rate"] and sre2l["loss_form"] == "released"
    assert (sre2l["feature_term"], sre2l["bn_term"]) == ("cross_entropy", "running")
    published = {"lambda_bn": 0.05, "learning_rate": 0.4} if dataset == "tiny-imagenet" else {}
    assert cda == {**sre2l, "label": "CDA", "crop_scale_start": 1, **published}


@pytest.mark.parametrize("dataset", PAPER)
def test_a_dataset_has_one_set_of_settings_whichever_preset_it_runs_under(dataset):
    teacher = resolved(dataset)["datasets"][dataset]["teacher"]
    for block, name in (
        ("datasets", dataset),
        ("teachers", teacher),
        ("students", teacher),
        *(("methods", m) for m in resolved(dataset)["methods"]),
        *(("recipes", r) for r in resolved(dataset)["recipes"]),
        *(("barycenters", b) for b in resolved(dataset)["barycenters"]),
    ):
        assert entry(dataset, block, name, dataset) == entry("paper", block, name, dataset), f"{block}.{name}"


@pytest.mark.parametrize(("ipc", "rate"), [(99, 1), (100, 10)])
def test_dm_has_its_published_learning_rate_for_many_images(ipc, rate, tmp_path):
    shard = f"results/smoke/digits/distilled/dm/ipc{ipc}/shards/shard0.safetensors"
    done = run_snakemake(tmp_path, "--dry-run", "--printshellcmds", "--", shard)
    (command,) = re.findall(
        r"printf .* python -m workflow_scripts\.distil_baseline ", done.stdout + done.stderr
    )
    assert re.search(r'"learning_rate":([\d.]+)', command)[1] == str(rate)


def test_precision_is_a_setting_of_the_rules_that_run_networks(tmp_path):
    given = ("--config", "precision=bfloat16", "--dry-run", "--printshellcmds", "--", "all_paper")
    done = run_snakemake(tmp_path, *given)
    commands = re.findall(r"(printf .*) python -m workflow_scripts\.(\w+) ", done.stdout + done.stderr)
    precise = {rule for command, rule in commands if '"precision":"bfloat16"' in command}
    training = {"pretrain_teacher", "recover_images", "relabel_images", "evaluate_student"}
    others = {"evaluate_all_real", "measure_efficiency", "measure_distances", "embed_tsne"}
    assert precise == training | others | {"build_page"}  # which shows the whole configuration
    assert {"extract_features", "distil_baseline", "compute_barycenter"} < {rule for _, rule in commands}


def settings_handed_over(tmp_path, overlay: dict, *targets: str) -> list[tuple[str, dict]]:
    """(rule, settings) of the jobs of a dry run with `overlay` laid over the smoke preset."""
    (tmp_path / "overlay.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    files = ("--configfile", f"{ROOT}/presets/smoke.yaml", str(tmp_path / "overlay.yaml"))
    done = run_snakemake(tmp_path, "--dry-run", "--printshellcmds", *files, "--", *targets, preset="")
    line = r"printf '%s\\n' '.*' '(\{.*\})' \|.* python -m workflow_scripts\.(\w+) "
    found = re.findall(line, done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return [(rule, json.loads(settings.replace("'\"'\"'", "'"))) for settings, rule in found]


def test_a_digit_is_mirrored_nowhere_and_images_have_their_weights(tmp_path):
    found = settings_handed_over(tmp_path, {}, "all_paper")
    flips = [(rule, s.get("views", s)["flip"]) for rule, s in found if "flip" in s.get("views", s)]
    flipping = {"pretrain_teacher", "recover_images", "relabel_images", "evaluate_student"}
    assert {rule for rule, _ in flips} >= flipping | {"evaluate_all_real", "embed_tsne", "measure_distances"}
    assert not any(flip for _, flip in flips)
    timed = [m for rule, s in found if rule == "measure_efficiency" for m in s["methods"].values()]
    baselines = [s for rule, s in found if rule == "distil_baseline"]
    baselines += [m for m in timed if "augmentation" in m]
    assert len(baselines) > 2 and not any("flip" in s["augmentation"] for s in baselines)
    assert not any(m.get("flip") for m in timed)
    students = [s["recipe"] for rule, s in found if rule == "evaluate_student"]
    assert students and all(recipe["weighted"] for recipe in students)


def test_a_recipe_reaches_labels_students_and_tables(tmp_path):
    overlay = {
        "datasets": {"part": {"like": "digits", "validation_fraction": 0.2}},
        "recipes": {"batch": {"like": "wmdd", "teacher_mode": "batch", "batch_size": 7, "cutmix": False}},
        "tables": {"main": {"datasets": ["part"], "recipes": ["batch"], "seeds": 3}},
        "figures": {"cost": {"datasets": ["part"], "recipes": ["hard", "batch"]}},
    }
    found = settings_handed_over(tmp_path, overlay, "main", "cost")
    (labels, *_) = [s for rule, s in found if rule == "relabel_images"]
    assert (labels["teacher_mode"], labels["batch_size"], labels["views"]["cutmix"]) == ("batch", 7, False)
    assert {s["views"]["crop_scale_min"] for rule, s in found if rule == "relabel_images"} == {0.5}
    (table,) = [s for rule, s in found if rule == "tabulate_accuracy"]
    assert table["labels"]["held_out"] == ["part"] and {c["seeds"] for c in table["cells"]} == {3}
    (cost,) = [s for rule, s in found if rule == "tabulate_cost"]
    paths = [path for cell in cost["cells"] for path, _ in cell["benchmarks"].values()]
    assert any("/relabel_images/part/batch/" in p for p in paths)
    assert cost["labels"]["held_out"] == ["part"] and not any("/hard/" in p for p in paths)


def test_what_people_read_is_no_reason_to_measure_again(tmp_path):
    """Neither is the order of methods, nor how far times are projected."""

    def handed_over(*files: str) -> dict[str, str]:
        given = ("--configfile", f"{ROOT}/presets/smoke.yaml", *files, "--dry-run", "--printshellcmds")
        done = run_snakemake(tmp_path, *given, "--", "distances", "tsne", "efficiency", preset="")
        lines = re.findall(r"(printf .*) python -m workflow_scripts\.(\w+) ", done.stdout + done.stderr)
        return {rule: command for command, rule in lines}

    own = tmp_path / "own.yaml"
    read_by_people = {"methods": {"sre2l": {"label": "another"}, "wmdd": {"label": "other"}}}
    timed = {"title": "Time", "methods": ["wmdd", "sre2l", "sliced", "dm", "dc"], "projected_iterations": 9}
    own.write_text(json.dumps({**read_by_people, "figures": {"efficiency": timed}}), encoding="utf-8")
    before, after = handed_over(), handed_over(str(own))
    for rule in ("measure_distances", "embed_tsne", "measure_efficiency"):
        assert before[rule] == after[rule]
    for rule in ("plot_distances", "plot_tsne", "tabulate_efficiency"):
        assert before[rule] != after[rule]


@pytest.mark.parametrize("preset", [*PAPER, "paper", "own-images", "cifar10", "cifar10-gpu"])
def test_tables_and_figures_show_the_presets_own_datasets(preset):
    own = set(read(f"presets/{preset}.yaml")["datasets"])
    config = resolved(preset)
    for block in ("tables", "figures"):
        for name, spec in config[block].items():
            assert set(spec.get("datasets", own)) <= own, f"{block}.{name}"
            for key in ("student", "students"):
                listed = spec.get(key, [])
                for student in [listed] if isinstance(listed, str) else listed:
                    small = {"own_images", *config["students"]} - {"convnet", "convnet_in"}
                    assert student in small, f"{block}.{name}.{key}"
    for name in [*config["page"], *config["paper"]]:
        assert name in config["tables"] or name in config["figures"]


def test_the_paper_is_all_of_it():
    config = resolved("paper")
    assert config["page"] == config["paper"]
    assert config["tables"]["all_methods"]["datasets"] == list(PAPER)
    assert config["tables"]["all_methods"]["ipc"] == [1, 10, 50, 100]
    listed = config["tables"]["all_methods"]["methods"]
    every = {"all_real", "random", "kmeans_real", "dm", "dc", "sre2l", "cda", "wmdd", "wmdd_released"}
    assert set(listed["imagenette"]) == every and set(listed["imagenet1k"]) == every - {"dm", "dc"}
    default = prepare(read("config.yaml"), read("schemas/config.schema.yaml"))
    assert set(default["paper"]) <= {*config["paper"]}


# ---- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "resolution"),
    [
        ({"architecture": "convnet", "width": 24, "depth": 3}, 16),
        ({"architecture": "convnet", "width": 8, "depth": 2}, 9),
        ({"architecture": "resnet18"}, 32),
        ({"architecture": "resnet18"}, 64),
        ({"architecture": "vit_tiny"}, 64),
    ],
)
def test_operations_and_dimension_of_a_network_are_those_that_pytorch_counts(network, resolution):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.stages import placed
    from wmdd_core.models import build_model

    model = placed(build_model(**network, classes=10, resolution=resolution, seed=0), "plain", "cpu")
    with FlopCounterMode(display=False) as counted:
        features = model.features(torch.zeros(2, 3, resolution, resolution))
    config = {"datasets": {"d": {"source": "digits", "resolution": resolution}}}
    planner = Planner(config, COSTS)
    assert planner.forward(network, "d") == pytest.approx(counted.get_total_flops() / 2, rel=0.01)
    assert planner.dimension(network, "d") == features.shape[1]


def test_costs_of_jobs_written_out():
    planner = Planner(resolved("imagenette"), COSTS)
    w = {"dataset": "imagenette", "method": "wmdd", "ipc": "10", "recipe": "wmdd", "student": "resnet18"}
    forward, pixels = COSTS["networks"]["resnet18"]["large"]["gflop"] * 1e9, 3 * 224 * 224
    # Ten classes of ten images are one batch of a hundred.
    assert planner.cost("recover_images", {**w, "shard": "0"}) == Cost(
        2 * 2000 * 100 * forward, 2000, bytes=100 * pixels
    )
    assert planner.cost("relabel_images", w) == Cost(300 * 100 * forward, 300, bytes=2 * 300 * 100 * 10)
    assert planner.cost("evaluate_student", {**w, "seed": "0"}) == Cost(3 * 300 * 100 * forward, 300)
    assert planner.cost("gather_images", w).bytes == 2 * 100 * pixels
    assert planner.cost("decode_images", {"dataset": "imagenette", "split": "test"}).bytes == 3925 * pixels
    teacher = planner.cost("pretrain_teacher", {"dataset": "imagenette", "teacher": "resnet18"})
    decoding = 100 * 9469 * COSTS["core"]["image_seconds"]  # the photographs are read in every epoch
    assert teacher == Cost(3 * 100 * 9469 * forward, 100 * math.ceil(9469 / 32), decoding)
    kept = Planner(resolved("tiny-imagenet"), COSTS)
    assert (
        kept.cost("pretrain_teacher", {"dataset": "tiny-imagenet", "teacher": "resnet18"}).core_seconds == 0
    )
    assert planner.cost("build_page", {"page": "index"}) == Cost()


def test_a_teacher_that_is_loaded_costs_nothing_and_labels_online_a_pass_for_each_view():
    config = json.loads(json.dumps(resolved("imagenette")))
    config["teachers"]["resnet18"]["weights"] = "mine.pt"
    config["recipes"]["wmdd"]["labels"] = "online"
    planner = Planner(config, COSTS)
    assert planner.cost("pretrain_teacher", {"dataset": "imagenette", "teacher": "resnet18"}) == Cost()
    w = {"dataset": "imagenette", "method": "wmdd", "ipc": "10", "recipe": "wmdd", "student": "resnet18"}
    forward = COSTS["networks"]["resnet18"]["large"]["gflop"] * 1e9
    assert planner.cost("evaluate_student", {**w, "seed": "0"}) == Cost(4 * 300 * 100 * forward, 300)


def test_shards_add_up_to_the_set():
    planner = Planner(resolved("tiny-imagenet"), COSTS)
    for method, shards in (("wmdd", 67), ("sre2l", 3 * 2)):  # 33 classes or 100 × 1 image at a time
        w = {"dataset": "tiny-imagenet", "method": method, "ipc": "3"}
        kept = []
        for shard in range(shards):
            cost = planner.cost("recover_images", {**w, "shard": str(shard)})
            kept.append(cost.bytes)
            if not cost.bytes:
                break
        sizes = sum(kept) / (3 * 64 * 64)
        assert sizes == 600


def test_a_network_that_the_costs_lack_is_told_and_not_guessed():
    config = resolved("imagenette")
    config["students"]["resnet18"]["architecture"] = "mine"
    job = {"dataset": "imagenette", "method": "wmdd", "ipc": "10", "recipe": "wmdd", "student": "resnet18"}
    told = summarise([("evaluate_student", {**job, "seed": "0"})], config, COSTS)
    assert "+ 1 of the jobs have no hours here" in told and "lacks their network" in told


def test_a_dataset_of_unknown_size_is_told_and_not_guessed():
    planner = Planner(resolved("own-images"), COSTS)
    assert planner.cost("pretrain_teacher", {"dataset": "own-images", "teacher": "own_images"}) is None
    jobs = [("pretrain_teacher", {"dataset": "own-images", "teacher": "own_images"}), ("build_page", {})]
    told = summarise(jobs, resolved("own-images"), COSTS)
    assert "+ 1 of the jobs have no hours here: only describe_dataset will tell their size" in told


def test_a_dataset_that_has_been_described_is_planned_by_what_was_found(tmp_path):
    """A folder's images, or a part of ImageNet's classes."""
    config = {**resolved("own-images"), "results": str(tmp_path)}
    teacher = config["teachers"]["own_images"]
    (tmp_path / "own-images").mkdir()
    (tmp_path / "own-images/description.json").write_text(
        json.dumps({"train": {"per_class": [30, 10]}, "test": {"per_class": [3, 4]}}), encoding="utf-8"
    )
    planner = Planner(config, COSTS)
    assert planner.images("own-images") == (40, 7)
    forward = planner.forward(teacher, "own-images")
    cost = planner.cost("pretrain_teacher", {"dataset": "own-images", "teacher": "own_images"})
    assert cost.operations == 3 * teacher["epochs"] * 40 * forward


@pytest.mark.parametrize(
    "rule", ["embed_tsne", "measure_distances", "measure_efficiency", "trace_barycenters"]
)
def test_a_figure_that_trains_or_times_networks_is_not_planned_as_nothing(rule):
    told = summarise([(rule, {"figure": "tsne"})], resolved("imagenet1k"), COSTS)
    assert "+ 1 of the jobs have no hours here" in told and "measure something for a figure" in told


def test_a_network_waits_for_the_eight_processes_that_decode():
    total = Total()
    total.add(Cost(operations=1.0, core_seconds=8 * 3600.0), COSTS)
    assert total.gpu_hours == pytest.approx(1 + COSTS["job_seconds"] / 3600)


def test_a_step_takes_no_less_than_its_least_time():
    total = Total()
    total.add(Cost(operations=1.0, steps=1.2e6), COSTS)
    assert total.gpu_hours == pytest.approx((6 + 1.2e6 * 0.003) / 3600)
    total.add(Cost(operations=60e12 * 3600, steps=1), COSTS)
    assert total.gpu_hours == pytest.approx((6 + 3600 + 6 + 3600) / 3600)
    assert total.instead_hours == pytest.approx((12 + (60e12 * 3600 + 1) / 0.06e12) / 3600)


def test_the_summary_has_every_job_once():
    w = {"dataset": "imagenette", "method": "wmdd", "ipc": "10", "recipe": "wmdd", "student": "resnet18"}
    jobs = [("evaluate_student", {**w, "seed": str(s)}) for s in range(3)]
    jobs += [("gather_images", w), ("build_page", {"page": "index"})]
    told = summarise(jobs, resolved("imagenette"), COSTS)
    counts = dict(re.findall(r"^(\w[\w ]*?)\s+(\d+)\s", told, re.MULTILINE))
    assert counts == {
        "evaluate_student": "3",
        "gather_images": "1",
        "build_page": "1",
        "imagenette": "4",
        "tables and figures": "1",
        "total": "5",
    }


@pytest.mark.parametrize("preset", ["tune-digits", "cifar10", "cifar10-gpu"])
def test_a_search_tries_different_settings(preset):
    """What `like` takes from the default must not make two lines of a search one."""
    methods = resolved(preset)["methods"]
    tried = [n for n, m in methods.items() if "swept" in m and m["kind"] == "recover"]
    read = {n: {k: v for k, v in methods[n].items() if k not in ("label", "swept")} for n in tried}
    views = {n: (s["crop_scale_min"], s["roll"]) for n, s in read.items() if re.search("-(whole|views)-", n)}
    assert views
    for name, (crop, roll) in views.items():
        assert (crop == 1 and roll == 0) == ("-whole-" in name), name


@pytest.mark.workflow
def test_a_dry_run_ends_with_the_plan(tmp_path):
    done = run_snakemake(tmp_path, "-n", "--quiet", "rules")
    assert done.returncode == 0, done.stderr
    jobs = int(re.findall(r"^total\s+(\d+)$", done.stderr + done.stdout, re.MULTILINE)[0])
    plan = done.stderr[done.stderr.index("Plan  ") :]
    assert re.search(rf"^total\s+{jobs - 1}\s", plan, re.MULTILINE)  # all but the target
    assert "core hours" in plan and "report/costs.yaml" in plan


@pytest.mark.workflow
def test_a_job_may_have_more_files_than_an_argument_takes(tmp_path):
    """Linux takes 128 KiB for one: less than the names of the files of a thousand shards."""
    done = run_snakemake(tmp_path, "-n", "-p", "--until", "describe_dataset")
    assert done.returncode == 0, done.stderr
    (command,) = re.findall(r"^Shell command: (.*)$", done.stdout + done.stderr, re.MULTILINE)
    longer = command.replace('"input":{}', '"input":{"more":' + json.dumps(["x" * 100] * 2000) + "}")
    log = tmp_path / "log"
    script = tmp_path / "script.sh"
    script.write_text(re.sub(r"> \S+ 2>&1$", f"> {log} 2>&1", longer))
    assert script.stat().st_size > 2**17
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "FileNotFoundError" in log.read_text() and "x" * 100 in log.read_text(), done.stderr


# ---- documented commands -----------------------------------------------------------------------


def test_documented_commands_name_their_targets_before_the_files():
    """`--configfile` takes all that follows it: a target there is a file that does not exist."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("presets/*.yaml"), ROOT / "config.yaml"]
    commands = [c for t in texts for c in re.findall(r"snakemake --?[^`#\n]*", t.read_text(encoding="utf-8"))]
    assert len(commands) > 20
    for command in commands:
        words = command.partition("--configfile ")[2].split()
        given = itertools.takewhile(lambda word: word[0] not in "-|;&", words)
        assert all(word.endswith(".yaml") for word in given), command
