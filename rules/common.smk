"""Paths (each written once), the prepared configuration, and what every job has in common."""

import functools
import gc
import os
import re
import sys
from pathlib import Path

import yaml

sys.path.insert(0, workflow.basedir)
from rules.configuration import (
    ConfigError,
    count_gpus,
    entry_name,
    prepare,
    prepare_environment,
    resolve,
    set_name,
    unknown,
)
from rules.scheduling import repair_scheduler
from wmdd_core.code import code_hash, code_variable, source_stamp
from wmdd_core.digests import canonical, digest, lineage_name
from wmdd_core.errors import UserError
from wmdd_core.layouts import class_count, listed_classes
from wmdd_core.sharding import shard_members, shard_total

prepare_environment(workflow.basedir)
repair_scheduler()

# SIGTERM reaches every process of a cluster's job. A shell that it ended would end the job with it, before the
# script has saved its state. And Snakemake takes PYTHONPATH away from jobs in an environment of conda.
shell.prefix('set -euo pipefail; trap : TERM; export PYTHONPATH="${{PYTHONPATH:-$WMDD_ROOT}}"; ')

# A graph of jobs only grows: looking through it for garbage would take a quarter of a large dry run.
gc.set_threshold(1_000_000, 50, 50)


def _check_keys(path):
    """Refuse a file with a key that stands twice in one place: YAML keeps the last without a word."""

    def check(node):
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, n) for n in node.value]
        seen = set()
        for key, value in pairs:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"{path}, line {line}: the key {key.value!r} stands there twice; merge the two"
                    )
                seen.add(key.value)
            if isinstance(value, yaml.CollectionNode):
                check(value)

    with open(path, encoding="utf-8") as file:
        found = yaml.compose(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if isinstance(found, yaml.CollectionNode):
        check(found)


def _prepared():
    for path in workflow.configfiles:
        if not str(path).endswith(".json"):
            _check_keys(path)
    with open(workflow.source_path("../schemas/config.schema.yaml")) as file:
        return prepare(config, yaml.safe_load(file))


def stop(message):
    """Tell the user's mistake in one line and leave with status 1, before anything is made."""
    sys.exit(f"error: config: {str(message).removeprefix('config: ')}")


try:
    config = _prepared()
except ConfigError as error:
    stop(error)


def _read_by_rules():
    """A digest of the configuration and of the rules, which make jobs of it."""
    root = Path(workflow.basedir)
    files = [root / "Snakefile", *sorted(root.glob("rules/*.smk")), *sorted(root.glob("rules/*.py"))]
    return digest([config, *(file.read_text(encoding="utf-8") for file in files)])


_read = _read_by_rules()
if workflow.is_main_process:
    os.environ.update(WMDD_CONFIG=_read, WMDD_SOURCES=source_stamp())
elif os.environ.get("WMDD_CONFIG", _read) != _read:
    # On a cluster each job reads the files again, and is recorded with what they said when the run began.
    told = "the configuration or rules/ was edited since this run began"
    sys.exit(f"error: {told}; put it back, or end the run and start it again")


# ---- paths -----------------------------------------------------------------------------------

RESULTS = config["results"]
DESCRIPTION = f"{RESULTS}/{{dataset}}/description.json"
IMAGES = f"{RESULTS}/{{dataset}}/images/{{split}}.npy"
TEACHER = f"{RESULTS}/{{dataset}}/teachers/{{teacher}}/checkpoint.safetensors"
TEACHER_METRICS = f"{RESULTS}/{{dataset}}/teachers/{{teacher}}/metrics.json"
TEACHER_CURVE = f"{RESULTS}/{{dataset}}/teachers/{{teacher}}/curve.csv"
FEATURES = f"{RESULTS}/{{dataset}}/features/{{teacher}}/features.npy"
FEATURE_INDEX = f"{RESULTS}/{{dataset}}/features/{{teacher}}/index.json"
BN_STATISTICS = f"{RESULTS}/{{dataset}}/features/{{teacher}}/bn_statistics.safetensors"
BARYCENTER = f"{RESULTS}/{{dataset}}/barycenters/{{teacher}}/{{barycenter}}/ipc{{ipc}}/class{{block}}.npz"
SHARD = f"{RESULTS}/{{dataset}}/distilled/{{method}}/ipc{{ipc}}/shards/shard{{shard}}.safetensors"
DISTILLED = f"{RESULTS}/{{dataset}}/distilled/{{method}}/ipc{{ipc}}/images.safetensors"
DISTILLED_HEADER = f"{RESULTS}/{{dataset}}/distilled/{{method}}/ipc{{ipc}}/header.json"
DISTILLED_LOSSES = f"{RESULTS}/{{dataset}}/distilled/{{method}}/ipc{{ipc}}/losses.csv"
DISTILLED_PNG = f"{RESULTS}/{{dataset}}/distilled/{{method}}/ipc{{ipc}}/png"
LABELS = f"{RESULTS}/{{dataset}}/labels/{{recipe}}/{{method}}/ipc{{ipc}}/labels.npy"
LABELS_HEADER = f"{RESULTS}/{{dataset}}/labels/{{recipe}}/{{method}}/ipc{{ipc}}/header.json"
EVALUATION = (
    f"{RESULTS}/{{dataset}}/evaluation/{{recipe}}/{{method}}/ipc{{ipc}}/{{student}}/seed{{seed}}.json"
)
TABLE = f"{RESULTS}/report/tables/{{table}}"
FIGURE = f"{RESULTS}/report/figures/{{figure}}"
MEASUREMENT = f"{RESULTS}/report/tables/{{figure}}.json"
PAGE = f"{RESULTS}/report/{{page}}.html"
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"

REAL = {"recipe": "own", "ipc": "all"}
"""Wildcards of students trained on all real images: the method's own recipe, no images per class."""


# ---- settings --------------------------------------------------------------------------------


def resolved(settings, dataset, where):
    """`settings` for one dataset; what has no value for it ends the run."""
    try:
        return resolve(settings, dataset, where)
    except ConfigError as error:
        stop(error)


@functools.cache
def entry(block, name, dataset):
    """The settings of a named entry for one dataset."""
    name = entry_name(name)
    if name not in config[block]:
        stop(f"{block}: {unknown(name, config[block])}")
    return resolved(config[block][name], dataset, f"{block}.{name}")


def dataset_of(name):
    """A dataset's own settings."""
    return entry("datasets", name, name)


def flips(dataset):
    """Whether a mirrored image still shows its class."""
    return dataset_of(dataset).get("flip", True)


@functools.cache
def class_total(dataset):
    """Number of classes, from the config, the source's definition or the folders under its root."""
    try:
        return len(class_names(dataset)) or class_count(dataset_of(dataset))
    except UserError as error:
        stop(f"datasets.{dataset}: {error}")


@functools.cache
def class_names(dataset):
    """Names of the class folders under a dataset's root, where they are looked up; else none."""
    return listed_classes(dataset_of(dataset))


def method_of(w):
    return entry("methods", w.method, w.dataset)


def seed_of(w):
    """The seed of a method's set: the one seed, and for further sets one derived from it."""
    further = w.method.removeprefix(entry_name(w.method))
    return f"{config['seed']}{further}" if further else config["seed"]


def teacher_of(w):
    """The teacher that a method recovers from."""
    return method_of(w).get("teacher", labeller_of(w.dataset))


def labeller_of(dataset):
    """The teacher that labels, the same for every method."""
    return dataset_of(dataset)["teacher"]


def methods_of_kind(*kinds):
    """A wildcard constraint: the methods of these kinds, or of any, and their further sets."""
    chosen = names(n for n, m in config["methods"].items() if not kinds or m["kind"] in kinds)
    return f"(?:{chosen})(?:@[1-9][0-9]*)?"


def names(values):
    """A regular expression that matches exactly these names (and nothing, if there are none)."""
    return "|".join(map(re.escape, values)) or "(?!)"


def expand_methods(listed):
    """Names of methods, a sweep standing for all of its members."""
    for name in listed:
        swept = [n for n, m in config["methods"].items() if m.get("swept", {}).get("entry") == name]
        if not swept and name not in config["methods"]:
            stop(f"methods: {unknown(name, config['methods'])}")
        yield from swept or [name]


def pick(settings, *keys):
    """The part of `settings` that a step reads."""
    return {k: settings[k] for k in keys if k in settings}


def without(settings, *keys):
    """`settings` but for what a step does not read."""
    return {k: v for k, v in settings.items() if k not in keys}


SETTINGS = {}
"""rule → function of the wildcards that gives exactly what the rule's step reads."""


PRECISE = (
    "pretrain_teacher",
    "recover_images",
    "relabel_images",
    "evaluate_student",
    "evaluate_all_real",
    "measure_efficiency",
    "measure_distances",
    "embed_tsne",
)
"""Rules whose networks multiply as `precision` says."""


def settings_for(function):
    """Register `function` as the settings of the rule it is named after."""
    made_by = function.__name__.removesuffix("_settings")
    chosen = made_by in PRECISE and config.get("precision", "auto") != "auto"
    precision = pick(config, "precision") if chosen else {}
    SETTINGS[made_by] = lambda w: {**function(w), **precision}
    return function


def settings_of(rule):
    """A rule's settings as one of its parameters, canonical JSON."""
    return lambda w: canonical(SETTINGS[rule](w))


@functools.cache
def code_of(rule):
    """The code that a rule depends on, or the hash that `accept_code` puts in the place of just this one."""
    own = code_hash(rule)
    if workflow.is_main_process:
        os.environ[code_variable(rule)] = own  # for the job, which looks whether it is still so
    return config.get("accept_code", {}).get(rule, {}).get(own, own)


@functools.cache
def content_of(path):
    """A digest of a file of this project that a script reads: its content counts, not where it lies."""
    with open(os.path.join(workflow.basedir, path), encoding="utf-8") as file:
        return digest(file.read())


# ---- GPUs of this machine --------------------------------------------------------------------


def local_gpu(wildcards):
    """Jobs that use a GPU count it where Snakemake runs them itself; on a cluster its scheduler does.

    Not to be asked before the executor is known: a function, then, and no number.
    """
    return int(workflow.local_exec)


if count_gpus(config["device"]) and "local_gpu" not in workflow.global_resources:
    workflow.register_resource("local_gpu", count_gpus(config["device"]))


def gpus_of_job(wildcards, resources):
    """GPUs that share each batch of a teacher: one, unless Slurm (`gpu`) or the user gives the rule more.

    On one machine: `--set-resources pretrain_teacher:local_gpu=2`. Snakemake never compares a parameter
    that reads `resources`: the number changes no result but for rounding.
    """
    return max(1, resources.get("gpu", 0), resources.get("local_gpu", 0))


# ---- jobs ------------------------------------------------------------------------------------


def run_script(rule, environment=""):
    """Every rule's command. Threads are no parameter: they change no result that matters.

    Files and settings come through a pipe, from a command built into the shell: thousands of files are
    longer than the 128 KiB that Linux takes for an argument of a program.
    """
    return (
        f"printf '%s\\n' {{params.job:q}} {{params.settings:q}} |"
        f" {environment}python -m workflow_scripts.{rule} {{params.code}} --threads {{threads}} > {{log:q}} 2>&1"
    )


def describe_job(wildcards, input, output):
    """Files, wildcards and device of a job. Snakemake never compares a parameter that reads `input`."""

    def named(files):
        return {
            name: list(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in files.items()
        }

    return canonical(
        {
            "wildcards": dict(wildcards.items()),
            "input": named(input),
            "output": named(output),
            "checkpoints": f"{RESULTS}/checkpoints",
            "device": config["device"],
        }
    )


def params_of(rule):
    """What a rule hands to its script, and what reruns it when it changes."""
    return {"settings": settings_of(rule), "code": code_of(rule), "job": describe_job}


def step_params(rule):
    """As `params_of`, for a rule whose inputs other steps make."""
    return {**params_of(rule), "behind": behind_of(rule)}


def table_files(name, caption):
    """A table's files as a rule's outputs; `name` is a wildcard, `caption` is for the engine's own report."""
    labels = {"table": name, "format": "CSV"}
    csv = report(table_csv(name), category="Tables", caption=f"../report/{caption}", labels=labels)
    return {"csv": csv, "md": f"{TABLE}.md".format(table=name), "tex": f"{TABLE}.tex".format(table=name)}


def drawing_files():
    """A figure's drawings as a rule's outputs."""
    labels = {"figure": "{figure}"}
    png = report(f"{FIGURE}.png", category="Figures", caption="../report/figure.rst", labels=labels)
    return {"png": png, "pdf": f"{FIGURE}.pdf"}


def figure_files():
    """A figure's drawings and their numbers as the outputs of one rule."""
    return {**drawing_files(), "csv": f"{FIGURE}.csv"}


def table_csv(table):
    return f"{TABLE}.csv".format(table=table)


def log_of(rule, name):
    return f"{LOGS}/{rule}/{name}.log"


def benchmark_of(rule, name):
    return f"{BENCHMARKS}/{rule}/{name}.tsv"


wildcard_constraints:
    dataset=names(config["datasets"]),
    teacher=names(config["teachers"]),
    barycenter=names(config["barycenters"]),
    method=methods_of_kind(),
    student=names(config["students"]),
    recipe=names([*config["recipes"], REAL["recipe"]]),
    table=names(config["tables"]),
    figure=names(config["figures"]),
    split="train|test",
    ipc=r"\d+|all",
    seed=r"\d+",
    shard=r"\d+",
    block=r"\d+(-\d+)?",
    page="index|paper",
