"""What the configuration may say, how it is told when it says something else, and what reruns depend on."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from rules.configuration import (
    ConfigError,
    expand_entries,
    prepare,
    resolve,
    unknown,
)
from wmdd_core import code
from wmdd_core.code import INFRASTRUCTURE, code_hash
from wmdd_core.digests import canonical, digest

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text(encoding="utf-8"))

BASE = yaml.safe_load("""
seed: 0
results: results
device: auto
student_seeds: 2
datasets:
  digits: {source: digits, resolution: 16, teacher: small}
teachers:
  small:
    architecture: convnet
    width: 8
    epochs: 2
    optimizer: sgd
    learning_rate: 0.1
    batch_size: 8
    crop_scale_min: 0.5
barycenters:
  learned: {weights: learned}
methods:
  wmdd:
    kind: recover
    barycenter: learned
    feature_term: barycenter
    bn_term: per_class
    lambda_bn: 1
    iterations: 5
    learning_rate: 0.1
    batch_size: 10
    batch_layout: whole_classes
    start: noise
    crop_scale_min: 1
    roll: 0
students:
  small: {architecture: convnet}
recipes:
  soft: {epochs: 3, batch_size: 10, optimizer: adamw, learning_rate: 0.001, labels: soft, temperature: 20}
tables:
  main: {datasets: [digits], methods: [wmdd], ipc: [1], students: [small], recipes: [soft]}
figures:
  accuracy: {kind: accuracy, table: main}
page: [main, accuracy]
""")


def changed(path: str, value: object) -> dict:
    """BASE with the value at `path`, keys joined by dots."""
    config = copy.deepcopy(BASE)
    *blocks, key = path.split(".")
    place = config
    for block in blocks:
        place = place.setdefault(block, {})
    place[key] = value
    return config


def refusal(path: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(changed(path, value), SCHEMA)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is accepted --------------------------------------------------------------------------


def test_the_base_is_accepted_and_left_alone():
    before = copy.deepcopy(BASE)
    prepared = prepare(BASE, SCHEMA)
    assert before == BASE and prepared == {**BASE}


@pytest.mark.parametrize("path", ["config.yaml", *(f"presets/{p.name}" for p in ROOT.glob("presets/*.yaml"))])
def test_the_shipped_files_are_valid(path):
    def merge(below: dict, above: dict) -> dict:
        both = dict(below)
        for key, value in above.items():
            mapping = isinstance(value, dict) and isinstance(below.get(key), dict)
            both[key] = merge(below[key], value) if mapping else value
        return both

    default = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    prepare(merge(default, yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))), SCHEMA)


def test_every_key_of_the_schema_is_described():
    kinds = [SCHEMA, *(k for k in SCHEMA["$defs"].values() if "properties" in k)]
    for kind in kinds:
        for key, allowed in kind["properties"].items():
            assert isinstance(allowed.get("description"), str), key
        assert set(kind.get("required", ())) <= kind["properties"].keys()


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [".", "..", "~/photos", "results", "link"])
def test_results_inside_a_folder_of_images_are_refused(root, tmp_path, monkeypatch):
    """Also where the way there is a link, or begins at home."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/link").symlink_to(".")
    monkeypatch.chdir(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = {"source": "imagefolder", "root": root, "resolution": 8, "teacher": "small"}
    assert refusal("datasets.own", entry) == (
        f"results (results) lies inside datasets.own.root ({root}); put it elsewhere"
    )


@pytest.mark.parametrize("root", ["photos", "resul", "results/photos", ""])
def test_results_beside_or_around_a_folder_of_images_are_accepted(root):
    entry = {"source": "imagefolder", "root": root, "resolution": 8, "teacher": "small"}
    prepare(changed("datasets.own", entry), SCHEMA)


# ---- unknown keys and names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("students_seeds", "student_seeds"),
        ("datasets.digits.resolutions", "resolution"),
        ("teachers.small.learning_rat", "learning_rate"),
        ("barycenters.learned.weight", "weights"),
        ("methods.wmdd.lamda_bn", "lambda_bn"),
        ("students.small.widht", "width"),
        ("recipes.soft.temprature", "temperature"),
        ("tables.main.method", "methods"),
        ("figures.accuracy.tabel", "table"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(path, near):
    told = refusal(path, 1)
    assert f"unknown name {path.split('.')[-1]!r}; did you mean {near!r}?" in told
    assert told.startswith(".".join(path.split(".")[:-1]) or "config")


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("datasets.digits.teacher", "smal", "small"),
        ("methods.wmdd.barycenter", "learnt", "learned"),
        ("methods.wmdd.barycenter", {"digits": "learnt"}, "learned"),
        ("tables.main.datasets", ["digit"], "digits"),
        ("tables.main.methods", ["wmdd", "wmd"], "wmdd"),
        ("figures.accuracy.table", "man", "main"),
        ("page", ["mian"], "main"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(path, value, near):
    told = refusal(path, value)
    assert path in told and f"did you mean {near!r}?" in told


def test_without_a_near_name_the_known_ones_are_listed():
    assert unknown("zzz", ["wmdd", "sre2l"]) == "unknown name 'zzz'; known are wmdd, sre2l"
    assert unknown("zzz", []) == "unknown name 'zzz'; known are none"


def test_a_missing_key_is_named_with_what_it_means():
    config = copy.deepcopy(BASE)
    del config["recipes"]["soft"]["labels"]
    with pytest.raises(ConfigError, match="recipes.soft: the key 'labels' is missing .the teacher's outputs"):
        prepare(config, SCHEMA)
    del config["seed"]
    with pytest.raises(ConfigError, match="config: the key 'seed' is missing"):
        prepare(config, SCHEMA)


# ---- what an entry of a kind needs and reads ---------------------------------------------------

RECOVER = BASE["methods"]["wmdd"]
SCHEDULE = {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1, "batch_size": 8, "crop_scale_min": 0.5}


@pytest.mark.parametrize("key", [k for k in RECOVER if k != "kind"])
def test_a_key_that_recovery_needs_is_told_as_missing(key):
    told = refusal("methods.mine", {k: v for k, v in RECOVER.items() if k != key})
    told_by = "feature_term barycenter" if key == "barycenter" else "kind recover"
    assert told == f"methods.mine: {told_by} needs {key!r}; add what is missing"


@pytest.mark.parametrize(
    ("path", "entry", "missing"),
    [
        ("methods.x", {"kind": "select"}, "kind select needs 'selection'"),
        ("methods.x", {"kind": "dm"}, "kind dm needs 'network', 'iterations', 'augmentation'"),
        (
            "methods.x",
            {"kind": "dc", "network": "small", "iterations": 1, "augmentation": []},
            "kind dc needs 'outer_loops', 'inner_steps'",
        ),
        ("methods.x", {"kind": "external"}, "kind external needs 'external'"),
        (
            "methods.x",
            {"kind": "real", "epochs": 3, "optimizer": "sgd"},
            "needs 'learning_rate', 'batch_size'",
        ),
        ("methods.x", {"like": "wmdd", "kind": "external"}, "kind external needs 'external'"),
        ("teachers.x", {"architecture": "convnet", "epochs": 3}, "needs 'optimizer', 'learning_rate'"),
        (
            "teachers.x",
            {"architecture": "convnet"},
            "a teacher without weights, or with epochs, needs 'epochs'",
        ),
        ("teachers.x", {"architecture": "convnet", "weights": "a.pt", "epochs": 3}, "needs 'optimizer'"),
        ("students.x", {"width": 3}, "the key 'architecture' is missing"),
        ("barycenters.x", {"restarts": 3}, "the key 'weights' is missing"),
        ("datasets.x", {"source": "digits"}, "the key 'resolution' is missing"),
        ("figures.x", {"kind": "accuracy"}, "kind accuracy needs 'table'"),
        ("figures.x", {"kind": "sweep"}, "kind sweep needs 'table'"),
        ("figures.x", {"kind": "gallery"}, "kind gallery needs 'datasets', 'methods', 'ipc'"),
        ("figures.x", {"kind": "tsne"}, "kind tsne needs 'datasets', 'methods', 'ipc', 'student'"),
        ("figures.x", {"kind": "barycenter_iterations", "ipc": [1]}, "needs 'datasets', 'barycenters'"),
        ("figures.x", {"kind": "hyperparameters"}, "kind hyperparameters needs 'presets', 'methods'"),
        ("figures.x", {"kind": "efficiency"}, "kind efficiency needs 'datasets', 'methods'"),
        ("figures.x", {"kind": "cost"}, "needs 'datasets', 'methods', 'ipc', 'student', 'recipes'"),
        (
            "figures.x",
            {
                "kind": "distances",
                "datasets": ["digits"],
                "methods": ["wmdd"],
                "ipc": [1],
                "student": "small",
            },
            "kind distances with a student needs 'recipe'",
        ),
    ],
)
def test_what_an_entry_lacks_is_told_in_one_line(path, entry, missing):
    told = refusal(path, entry)
    assert told.startswith(f"{path}: ") and missing in told


@pytest.mark.parametrize("labels", ["soft", "online", {"digits": "online", "default": "hard"}])
def test_only_hard_labels_do_without_a_temperature(labels):
    recipe = {k: v for k, v in BASE["recipes"]["soft"].items() if k != "temperature"}
    prepare(changed("recipes.x", {**recipe, "labels": "hard"}), SCHEMA)
    told = refusal("recipes.x", {**recipe, "labels": labels})
    assert told == "recipes.x: labels soft or online needs 'temperature'; add what is missing"


def test_entries_with_all_that_they_need_are_accepted():
    for path, entry in {
        "teachers.loaded": {"architecture": "resnet18", "weights": "torchvision"},
        "methods.ceiling": {"kind": "real", **SCHEDULE},
        "methods.members": {"like": "wmdd", "sweep": {"start": ["noise", "real"]}},
        "methods.no_atoms": {k: v for k, v in RECOVER.items() if k != "barycenter"}
        | {"feature_term": "none"},
        "methods.theirs": {"kind": "external", "external": "ipc{ipc}"},
    }.items():
        prepare(changed(path, entry), SCHEMA)
    abstract = {k: v for k, v in RECOVER.items() if k != "start"}  # the sweep gives what the entry lacks
    prepare(changed("methods.starts", {**abstract, "sweep": {"start": ["noise", "real"]}}), SCHEMA)


@pytest.mark.parametrize(
    ("entry", "surplus"),
    [
        (
            {"kind": "select", "selection": "random", "iterations": 5, "lambda_bn": 3},
            "kind select does not read 'iterations', 'lambda_bn'",
        ),
        ({**RECOVER, "momentum": 0.5}, "kind recover does not read 'momentum'"),
        (
            {"kind": "external", "external": "x", "selection": "random"},
            "kind external does not read 'selection'",
        ),
        ({"kind": "real", **SCHEDULE, "iterations": 5}, "kind real does not read 'iterations'"),
        (
            {"kind": "dm", "network": "small", "iterations": 1, "augmentation": [], "outer_loops": 1},
            "kind dm does not read 'outer_loops'",
        ),
    ],
)
def test_keys_of_another_kind_are_told(entry, surplus):
    told = refusal("methods.x", entry)
    assert told.startswith(f"methods.x: {surplus}; remove it")


def test_keys_of_another_kind_of_figure_are_told():
    timed = {"kind": "efficiency", "datasets": ["digits"], "methods": ["wmdd"], "images": 3}
    assert refusal("figures.x", timed).startswith(
        "figures.x: kind efficiency does not read 'images'; remove it"
    )


def test_the_schema_knows_what_the_steps_read():
    """What recovery, DM and DC need without a default, and all that they take."""
    from dataclasses import MISSING, fields

    from wmdd_core.baselines import DcSettings, DmSettings
    from wmdd_core.recovery import RecoverySettings

    rules = {rule["description"]: rule["then"] for rule in SCHEMA["$defs"]["method"]["allOf"]}
    read_by_rules = {"kind", "label", "swept", "teacher", "barycenter", "batch_size", "batch_layout", "start"}
    baseline = {"kind", "label", "swept", "network"}
    for kind, settings, beside, fixed in (
        ("recover", RecoverySettings, read_by_rules, {"beta1", "beta2"}),
        ("dm", DmSettings, {*baseline, "learning_rate_from_ipc_100"}, set()),
        ("dc", DcSettings, baseline, set()),
    ):
        rule = rules[f"kind {kind}"]
        known = {f.name for f in fields(settings)} - fixed
        assert set(rule["propertyNames"]["enum"]) == known | beside
        assert {f.name for f in fields(settings) if f.default is MISSING} <= set(rule["required"])


def test_what_the_schema_calls_a_default_is_what_the_code_takes():
    from dataclasses import MISSING, fields
    from inspect import signature

    from wmdd_core.barycenter import wasserstein_barycenter
    from wmdd_core.baselines import DcSettings, DmSettings
    from wmdd_core.models import build_model
    from wmdd_core.recovery import RecoverySettings
    from wmdd_core.sources import DEFAULT_TEST_FRACTION
    from wmdd_core.training import Schedule

    def of_class(kind: type) -> dict:
        return {f.name: f.default for f in fields(kind) if f.default is not MISSING}

    def of_function(function) -> dict:
        return {n: p.default for n, p in signature(function).parameters.items() if p.default is not p.empty}

    network, schedule = of_function(build_model), of_class(Schedule)
    in_code = {
        "dataset": [{"test_fraction": DEFAULT_TEST_FRACTION}],
        "teacher": [network, schedule],
        "barycenter": [of_function(wasserstein_barycenter)],
        "method": [of_class(RecoverySettings), of_class(DmSettings), of_class(DcSettings)],
        "student": [network],
        "recipe": [schedule],
    }
    compared = 0
    for block, places in in_code.items():
        for key, allowed in SCHEMA["$defs"][block]["properties"].items():
            found = [place[key] for place in places if key in place]
            if "default" in allowed and found:
                compared += 1
                assert [allowed["default"]] * len(found) == found, f"{block}.{key}"
    assert compared >= 18


@pytest.mark.parametrize(
    ("block", "name"),
    [("figures", "main"), ("tables", "all"), ("tables", "recover_images"), ("figures", "all_paper")],
)
def test_a_target_has_one_meaning(block, name):
    entry = BASE["tables"]["main"] if block == "tables" else BASE["figures"]["accuracy"]
    assert refusal(f"{block}.{name}", entry).startswith(f"{block}.{name}: there is a table or a rule")


# ---- types and ranges --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("seed", "zero", "seed is 'zero'; expected integer"),
        ("seed", -1, "seed is -1; the least allowed is 0"),
        ("seed", True, "seed is True; expected integer"),
        ("student_seeds", 0, "the least allowed is 1"),
        ("distilled_sets", 0, "the least allowed is 1"),
        ("tables.main.sets", 0, "the least allowed is 1"),
        ("recipes.soft.smoothing", 0.5, "the least allowed is 1"),  # the rate would rise again
        ("methods.wmdd.lambda_bn", -0.5, "methods.wmdd.lambda_bn is -0.5; the least allowed is 0"),
        ("methods.wmdd.lambda_bn", "much", "expected number"),
        ("methods.wmdd.lambda_bn", float("nan"), "expected a finite number"),
        ("methods.wmdd.lambda_bn", float("inf"), "expected a finite number"),
        ("methods.wmdd.iterations", 2.5, "expected integer"),
        ("methods.wmdd.iterations", "2000", "expected integer"),
        ("methods.wmdd.learning_rate", 0, "it must be above 0"),
        ("methods.wmdd.kind", "recovr", "did you mean 'recover'?"),
        ("datasets.digits.source", "cifar", "did you mean 'cifar10"),
        ("datasets.digits.flip", "no", "expected boolean"),
        ("datasets.digits.mean", [0.5, 0.5], "it needs at least 3"),
        ("datasets.digits.std", [0.5, 0.5, "x"], "datasets.digits.std.2 is 'x'; expected number"),
        ("datasets.digits.mean", [124, 116, 104], "datasets.digits.mean.0 is 124; the most allowed is 1"),
        ("datasets.digits.std", [0.2, 0, 0.2], "datasets.digits.std.1 is 0; the least allowed is 1e-06"),
        ("datasets.digits.test_fraction", 0.95, "the most allowed is 0.9"),
        ("teachers.small.architecture", "resnet19", "did you mean 'resnet18'?"),
        ("recipes.soft.batch_size", 1, "the least allowed is 2"),
        ("tables.main.ipc", [1, 0], "tables.main.ipc.1 is 0; the least allowed is 1"),
        ("tables.main.ipc", 10, "tables.main.ipc is 10; expected list"),
        ("datasets", ["digits"], "datasets is ['digits']; expected mapping"),
        ("device", "gpu", "device is 'gpu'; it does not have the required form (auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", "it does not have the required form (auto, cpu, cuda or cuda:N"),
        ("results", "", "results is ''; it does not have the required form (folder"),
        ("results", "a{b}c", "results is 'a{b}c'; it does not have the required form (folder"),
        ("accept_code.plot_sweep", 3, "expected mapping"),
        ("tables.main.ipc", [], "tables.main.ipc is []; it needs at least 1"),
        ("figures.accuracy.kind", "galery", "did you mean 'gallery'?"),
        ("methods.wmdd.augmentation", ["foo"], "augmentation.0 is 'foo'; known are colour, crop"),
        ("methods.wmdd.external", "", "''"),
        ("tables.main.ipc", [1, 10, 1], "tables.main.ipc is [1, 10, 1]; name each once"),
        ("tables.main.ipc", [1, 1.0], "name each once"),
        ("tables.main.methods", ["wmdd", "wmdd"], "name each once"),
        ("tables.main.students", ["small", "small"], "name each once"),
        ("tables.main.recipes", ["soft", "soft"], "name each once"),
        ("tables.main.datasets", ["digits", "digits"], "name each once"),
        ("figures.accuracy.ipc", [1, 1], "name each once"),
        ("figures.accuracy.methods", ["wmdd", "wmdd"], "name each once"),
        ("page", ["main", "main"], "name each once"),
        ("datasets.digits.resolution", 100000, "the most allowed is 4096"),
        ("methods.wmdd.iterations", 1e20, "the most allowed is 10000000"),
        ("methods.wmdd.iterations", "1e20", "the most allowed is 10000000"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_and_what_is_allowed(path, value, told):
    refused = refusal(path, value)
    assert told in refused and path in refused
    assert refused.endswith(")")  # what the key means


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("methods.wmdd", "recover"),
        ("methods.wmdd", 3),
        ("methods.wmdd", ["recover"]),
        ("methods.other", {"like": ["wmdd"]}),
        ("methods.10", {"kind": "recover"}),
        ("methods.a/b", {"kind": "recover"}),
        ("methods..hidden", {"kind": "recover"}),
        ("methods.with space", {"kind": "recover"}),
        ("methods.", {"kind": "recover"}),
    ],
)
def test_an_entry_that_is_none_is_one_line_not_a_traceback(path, value):
    block, name = path.split(".", 1)
    config = copy.deepcopy(BASE)
    config[block][int(name) if name.isdigit() else name] = value
    with pytest.raises(ConfigError, match=r"^methods"):
        prepare(config, SCHEMA)


def test_an_unknown_rule_in_accept_code_is_told_with_the_nearest():
    accepted = {"0123456789abcdef": "fedcba9876543210"}
    told = refusal("accept_code", {"plot_sweeps": accepted})
    assert told == "accept_code: unknown name 'plot_sweeps'; did you mean 'plot_sweep'?"
    assert "accept_code: unknown name 3; known are describe_dataset, " in refusal("accept_code", {3: {}})
    prepare(changed("accept_code", {"plot_sweep": accepted}), SCHEMA)


def test_the_schema_knows_all_that_the_code_knows():
    from wmdd_core import terms
    from wmdd_core.baselines import AUGMENTATIONS
    from wmdd_core.models import ARCHITECTURES

    rules = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("rules/*.smk"))
    computed = set(re.findall(r'run_script\("(\w+)"', rules))
    assert set(SCHEMA["properties"]["accept_code"]["propertyNames"]["enum"]) == computed
    figures = SCHEMA["$defs"]["figure"]["properties"]["kind"]["enum"]
    assert set(figures) == set(re.findall(r'figures_of_kind\("(\w+)"\)', rules))
    augmentations = SCHEMA["$defs"]["method"]["properties"]["augmentation"]["items"]["enum"]
    assert augmentations == list(AUGMENTATIONS)
    method = SCHEMA["$defs"]["method"]["properties"]
    for key, names in (
        ("feature_term", terms.FEATURE_TERMS),
        ("bn_term", terms.BN_TERMS),
        ("loss_form", terms.LOSS_FORMS),
    ):
        assert method[key]["enum"] == list(names), key
    makers = re.search(r"^MAKERS = \{(.*?)^\}", rules, re.MULTILINE | re.DOTALL)[1]
    assert set(method["kind"]["enum"]) == {*re.findall(r'^    "(\w+)":', makers, re.MULTILINE), "real"}
    assert SCHEMA["$defs"]["architecture"]["enum"] == list(ARCHITECTURES)
    costs = yaml.safe_load((ROOT / "report/costs.yaml").read_text(encoding="utf-8"))
    assert {*costs["networks"], "convnet"} == set(ARCHITECTURES)


def test_every_integer_has_a_sensible_maximum():
    """Beyond 2**53 a number stays a float, which no loop and no shape takes."""
    for kind in (SCHEMA, *(k for k in SCHEMA["$defs"].values() if "properties" in k)):
        for key, allowed in kind["properties"].items():
            for number in (allowed, allowed.get("items", {})):
                assert number.get("type") != "integer" or number["maximum"] < 2**53, key


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_are_accepted(device):
    assert prepare(changed("device", device), SCHEMA)["device"] == device


def test_the_results_of_a_home_folder_lie_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert prepare(changed("results", "~/wmdd"), SCHEMA)["results"] == "/home/someone/wmdd"
    assert prepare(changed("results", "a~/b"), SCHEMA)["results"] == "a~/b"


@pytest.mark.parametrize("given", ["out", "out/", "./out", "out/../out"])
def test_a_folder_of_results_has_one_name(given):
    """Files of another name would match no target, and have no record of their settings."""
    assert prepare(changed("results", given), SCHEMA)["results"] == "out"


# ---- numbers -----------------------------------------------------------------------------------


def test_texts_that_people_read_are_one_line_and_no_number():
    assert prepare(changed("methods.wmdd.label", "1e5"), SCHEMA)["methods"]["wmdd"]["label"] == "1e5"
    title = yaml.safe_load("title: >\n  Two\n  lines\n")["title"]
    assert title.endswith("\n")
    assert prepare(changed("tables.main.title", title), SCHEMA)["tables"]["main"]["title"] == "Two lines"


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = yaml.safe_load("{learning_rate: 1e-3, tolerance: 1E-4, lambda_bn: [-1.5e2, .5e1]}")
    assert config["learning_rate"] == "1e-3"  # what makes the repair necessary
    prepared = prepare(changed("recipes.soft.learning_rate", "1e-3"), SCHEMA)
    assert prepared["recipes"]["soft"]["learning_rate"] == 0.001
    prepared = prepare(changed("methods.wmdd.lambda_bn", {"digits": "1e2", "default": "1E-4"}), SCHEMA)
    assert prepared["methods"]["wmdd"]["lambda_bn"] == {"digits": 100, "default": 0.0001}
    prepared = prepare(changed("methods.sweep", {"like": "wmdd", "sweep": {"lambda_bn": ["1e-1"]}}), SCHEMA)
    assert prepared["methods"]["sweep0.1"]["lambda_bn"] == 0.1
    for text in ("1e", "e3", "0x1e3", "1e-3 ", "one", "1.5.2e3", "3e4f"):
        assert "expected number" in refusal("methods.wmdd.lambda_bn", text)


@pytest.mark.parametrize("value", ["1e3", 1000.0])
def test_a_whole_number_is_an_integer_where_one_is_needed(value):
    """`range(1000.0)` is an error, hours later and in a job."""
    iterations = prepare(changed("methods.wmdd.iterations", value), SCHEMA)["methods"]["wmdd"]["iterations"]
    assert iterations == 1000 and isinstance(iterations, int)


# ---- like and sweep ----------------------------------------------------------------------------


def test_like_inherits_and_overrides():
    entries = {"a": {"x": 1, "y": 1}, "b": {"like": "a", "y": 2}, "c": {"like": "b", "z": 3}}
    assert expand_entries("methods", entries) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 2, "z": 3},
    }
    assert entries["b"] == {"like": "a", "y": 2}
    assert list(expand_entries("methods", {"b": {"like": "a"}, "a": {"x": 1}})) == ["b", "a"]  # any order


def test_like_replaces_a_value_by_dataset_whole():
    entries = {"a": {"x": {"digits": 1, "default": 2}}, "b": {"like": "a", "x": {"default": 3}}}
    assert expand_entries("methods", entries)["b"] == {"x": {"default": 3}}


@pytest.mark.parametrize("trail", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_loop_in_like_is_told(trail):
    entries = {name: {"like": after} for name, after in zip(trail, [*trail[1:], trail[0]], strict=True)}
    with pytest.raises(ConfigError, match="methods.a.like: refers to itself through " + " → ".join(trail)):
        expand_entries("methods", entries)
    entries["z"] = {"like": "a"}  # a way into the loop from outside
    with pytest.raises(ConfigError, match="refers to itself"):
        expand_entries("methods", entries)


def test_like_of_an_unknown_entry_is_told_with_the_nearest():
    told = refusal("methods.other", {"like": "wmd"})
    assert told == "methods.other.like: unknown name 'wmd'; did you mean 'wmdd'?"


def test_a_sweep_is_an_entry_for_each_value():
    config = changed("methods.wmdd_lambda", {"like": "wmdd", "sweep": {"lambda_bn": [0.1, 10]}})
    config["tables"]["main"]["methods"] = ["wmdd", "wmdd_lambda"]
    methods = prepare(config, SCHEMA)["methods"]
    assert list(methods) == ["wmdd", "wmdd_lambda0.1", "wmdd_lambda10"]
    assert methods["wmdd_lambda10"] == {
        **BASE["methods"]["wmdd"],
        "lambda_bn": 10,
        "swept": {"entry": "wmdd_lambda", "key": "lambda_bn", "value": 10},
    }


def test_a_sweep_and_one_of_its_members_are_not_both_listed():
    config = changed("methods.wmdd_lambda", {"like": "wmdd", "sweep": {"lambda_bn": [0.1, 10]}})
    config["tables"]["main"]["methods"] = ["wmdd", "wmdd_lambda10"]
    prepare(config, SCHEMA)
    config["tables"]["main"]["methods"] = ["wmdd_lambda", "wmdd_lambda10"]
    told = "tables.main.methods: wmdd_lambda10 is one of wmdd_lambda, named too; remove one of them"
    with pytest.raises(ConfigError, match=told):
        prepare(config, SCHEMA)


def test_like_a_sweep_inherits_its_settings_without_sweeping():
    entries = {"a": {"x": 1, "sweep": {"y": [1, 2]}}, "b": {"like": "a", "z": 3}}
    assert list(expand_entries("methods", entries)) == ["a1", "a2", "b"]
    assert expand_entries("methods", entries)["b"] == {"x": 1, "z": 3}


@pytest.mark.parametrize("sweep", [{}, {"a": [1], "b": [2]}, {"lambda_bn": 1}, [1], 3, "lambda_bn"])
def test_a_malformed_sweep_is_told(sweep):
    assert "methods.wmdd_lambda.sweep: expected one key" in refusal(
        "methods.wmdd_lambda", {"like": "wmdd", "sweep": sweep}
    )


def test_the_values_of_a_sweep_are_checked():
    told = refusal("methods.wmdd_lambda", {"like": "wmdd", "sweep": {"lambda_bn": [1, -1]}})
    assert told.startswith("methods.wmdd_lambda-1.lambda_bn is -1; the least allowed is 0")
    assert "did you mean 'lambda_bn'" in refusal("methods.wmdd_l", {"like": "wmdd", "sweep": {"lambda": [1]}})


def test_a_member_of_a_sweep_does_not_replace_an_entry():
    config = changed("methods.wmdd_lambda10", {"like": "wmdd", "iterations": 7})
    config["methods"]["wmdd_lambda"] = {"like": "wmdd", "sweep": {"lambda_bn": [1, 10]}}
    with pytest.raises(ConfigError, match="wmdd_lambda10"):
        prepare(config, SCHEMA)


@pytest.mark.parametrize(
    ("block", "base", "sweep"),
    [("barycenters", "learned", {"max_iterations": [5, 10]}), ("recipes", "soft", {"epochs": [5, 10]})],
)
def test_other_entries_say_that_they_cannot_be_swept(block, base, sweep):
    told = refusal(f"{block}.swept", {"like": base, "sweep": sweep})
    assert told == f"{block}.swept.sweep: only methods can be swept; write an entry for each value"


# ---- values by dataset -------------------------------------------------------------------------


def test_values_by_dataset_and_their_default():
    entry = {"kind": "recover", "lambda_bn": {"imagenette": 10, "default": 1}, "ipc": [1, 10]}
    assert resolve(entry, "imagenette", "methods.wmdd") == {
        "kind": "recover",
        "lambda_bn": 10,
        "ipc": [1, 10],
    }
    assert resolve(entry, "digits", "methods.wmdd")["lambda_bn"] == 1
    assert resolve({"lambda_bn": {"digits": 0, "default": 1}}, "digits", "m")["lambda_bn"] == 0
    swept = {"swept": {"entry": "a", "key": "b", "value": 1}}
    assert resolve(swept, "digits", "methods.a1") == swept


def test_a_dataset_without_a_value_is_told():
    told = "methods.wmdd.lambda_bn has no value for dataset 'digits' and no default"
    with pytest.raises(ConfigError, match=told):
        resolve({"lambda_bn": {"imagenette": 10}}, "digits", "methods.wmdd")


@pytest.mark.parametrize("dataset", ["digits", "default"])
def test_each_value_by_dataset_is_checked(dataset):
    told = refusal("methods.wmdd.lambda_bn", {"other": 1, dataset: -1})
    assert told.startswith(f"methods.wmdd.lambda_bn.{dataset} is -1; the least allowed is 0")
    assert "expected a finite number" in refusal("methods.wmdd.lambda_bn", {dataset: float("nan")})


@pytest.mark.parametrize("block", ["datasets", "teachers", "methods", "recipes"])
def test_a_value_for_an_unknown_dataset_is_told(block):
    (name,) = BASE[block]
    key = "teacher" if block == "datasets" else "batch_size"
    value = BASE[block][name].get(key)
    told = refusal(f"{block}.{name}.{key}", {"digit": value, "default": value})
    assert told == f"{block}.{name}.{key}: unknown name 'digit'; did you mean 'digits'?"
    told = refusal(f"{block}.{name}.{key}", {"imagenette": value, "digits": value})
    assert told.endswith("unknown name 'imagenette'; known are digits, default")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", {"digits": 1}),
        ("device", {"default": "cpu"}),
        ("methods.wmdd.kind", {"digits": "recover"}),
        ("methods.wmdd.label", {"digits": "WMDD"}),
        ("tables.main.datasets", {"digits": ["digits"]}),
        ("tables.main.seeds", {"digits": 2}),
        ("figures.accuracy.table", {"digits": "main"}),
    ],
)
def test_what_is_the_same_for_all_datasets_takes_one_value(path, value):
    assert f"{path} is {value}; expected " in refusal(path, value)


# ---- what tells settings apart -----------------------------------------------------------------


def test_settings_that_swap_or_repeat_values_are_told_apart():
    swapped = [
        {"learning_rate": 0.1, "momentum": 0.2},
        {"learning_rate": 0.2, "momentum": 0.1},
        {"learning_rate": 0.1, "momentum": 0.1},
        {"learning_rate": 0.1},
        {"learning_rate": "0.1", "momentum": 0.2},
        {"learning_rate": [0.1, 0.2]},
        {"learning_rate": {"momentum": 0.2}},
        {"a": 1, "b": {"c": 2}},
        {"a": 1, "b": {}, "c": 2},
    ]
    assert len({canonical(s) for s in swapped}) == len({digest(s) for s in swapped}) == len(swapped)


def test_equal_settings_are_equal_in_any_order_and_survive_json():
    settings = {"b": [1, 2.5, None], "a": {"λ": True, "x": "ö"}}
    again = {"a": {"x": "ö", "λ": True}, "b": [1, 2.5, None]}
    assert canonical(settings) == canonical(again) == canonical(json.loads(canonical(settings)))
    assert canonical(settings) == '{"a":{"x":"ö","λ":true},"b":[1,2.5,null]}'


def test_a_number_written_in_two_ways_is_one_setting():
    """λ = 1 and λ = 1.0 need no second run."""
    prepared = [prepare(changed("methods.wmdd.lambda_bn", v), SCHEMA) for v in (1, 1.0, "1e0")]
    assert len({canonical(p["methods"]["wmdd"]) for p in prepared}) == 1


# ---- code hashes -------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the code whose files a test may change; call it with a path and what to do to the text."""
    for folder in ("wmdd_core", "workflow_scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    hashes()  # the files that a test leaves alone are parsed once for all tests
    monkeypatch.setattr(code, "_PARSED", dict(code._PARSED))
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def edit(path: str, change) -> None:
        file: Path = tmp_path / path
        before = file.read_text(encoding="utf-8")
        file.write_text(change(before), encoding="utf-8")
        assert file.read_text(encoding="utf-8") != before
        code._PARSED.pop(path.removesuffix(".py").replace("/", "."), None)

    return edit


RULES = ("describe_dataset", "extract_features", "compute_barycenter", "recover_images", "evaluate_student")


def hashes() -> dict[str, str]:
    return {rule: code_hash(rule) for rule in RULES}


def stale(before: dict[str, str]) -> set[str]:
    after = hashes()
    return {rule for rule in RULES if after[rule] != before[rule]}


def test_the_copy_hashes_as_the_original(monkeypatch, tree):
    code._PARSED.clear()
    copied = hashes()
    monkeypatch.setattr(code, "ROOT", ROOT)
    code._PARSED.clear()
    assert hashes() == copied and len(set(copied.values())) == len(RULES)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# a comment\n" + text,
        lambda text: text.replace("\n\n\ndef ", "\n\n\n\n\n# why\ndef "),
        lambda text: text.replace('"""', '"""Another docstring. ', 1),
        lambda text: text.replace("\n    return ", "\n    # why\n    return "),
        lambda text: text + "\n\n\n",
    ],
)
def test_comments_docstrings_and_blank_lines_cost_no_rerun(tree, change):
    before = hashes()
    tree("wmdd_core/recovery.py", change)
    tree("workflow_scripts/extract_features.py", lambda text: "# a comment\n" + text)
    assert stale(before) == set()


def test_code_of_a_module_makes_stale_what_uses_it_and_nothing_else(tree):
    before = hashes()
    tree("wmdd_core/recovery.py", lambda text: text.replace("VIEW_BLOCK = 500", "VIEW_BLOCK = 501"))
    assert stale(before) == {"recover_images"}


def test_code_that_is_imported_through_others_counts(tree):
    before = hashes()
    # extract_features → features → batchnorm → models, and recover_images → recovery → batchnorm → models
    tree("wmdd_core/models.py", lambda text: text.replace("channels = 3", "channels = 4"))
    assert stale(before) == {"extract_features", "recover_images", "evaluate_student"}


COMPUTES = {
    "compute_barycenter": ["transport", "seeding"],
    "describe_dataset": ["data", "sources"],
    "extract_features": ["features", "batchnorm", "convolution"],
    "recover_images": [
        *("augmentation", "device", "discrepancies", "graphs"),
        *("optimizers", "sharding", "terms"),
    ],
    "evaluate_student": ["relabeling", "training"],
}


@pytest.mark.parametrize(("rule", "module"), [(r, m) for r, modules in COMPUTES.items() for m in modules])
def test_what_computes_makes_stale(tree, rule, module):
    before = hashes()
    tree(f"wmdd_core/{module}.py", lambda text: text + "\nTHE_ANSWER = 42\n")
    assert rule in stale(before)


@pytest.mark.parametrize("script", ["pretrain_teacher", "select_images"])
def test_a_script_of_another_rule_makes_nothing_stale(tree, script):
    before = hashes()
    tree(f"workflow_scripts/{script}.py", lambda text: text + "\nTHE_ANSWER = 42\n")
    assert stale(before) == set()


def test_the_stamp_sees_scripts_the_library_and_edits_of_equal_length(tree):
    stamps = [code.source_stamp()]
    tree("wmdd_core/recovery.py", lambda text: text + "\n# more\n")
    stamps.append(code.source_stamp())
    tree("workflow_scripts/recover_images.py", lambda text: text.replace("Recover", "Rekover", 1))
    stamps.append(code.source_stamp())
    assert len(set(stamps)) == 3


def test_a_script_of_its_own_counts_and_so_does_a_lazy_import(tree):
    before = hashes()
    tree("workflow_scripts/recover_images.py", lambda text: text + "\nTHE_ANSWER = 42\n")
    assert stale(before) == {"recover_images"}
    before = hashes()
    tree(
        "workflow_scripts/compute_barycenter.py",
        lambda t: t + "\ndef f():\n    from wmdd_core import metrics\n",
    )
    tree("wmdd_core/metrics.py", lambda text: text + "\nTHE_ANSWER = 42\n")
    middle = hashes()
    tree("wmdd_core/metrics.py", lambda text: text.replace("42", "43"))
    assert stale(before) >= {"compute_barycenter"} and "compute_barycenter" in stale(middle)


@pytest.mark.parametrize("module", sorted(INFRASTRUCTURE))
def test_how_work_is_reported_and_stored_makes_nothing_stale(tree, module):
    before = hashes()
    tree(module.replace(".", "/") + ".py", lambda text: text + "\nTHE_ANSWER = 42\n")
    assert stale(before) == set()


def test_strings_that_are_no_docstrings_count(tree):
    before = hashes()
    tree("wmdd_core/recovery.py", lambda text: text.replace('"recovery views"', '"views of recovery"'))
    assert stale(before) == {"recover_images"}
