"""Reading the configuration: inheritance, sweeps, validation, values by dataset.

Standard library only (the schema needs `jsonschema`, which Snakemake brings), here and in what is imported:
every job and every dry run imports this module.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
import subprocess
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

from wmdd_core.memory import ENVIRONMENT

RULES_BESIDE = ("all", "all_paper")
"""Rules without a script."""

ENTRY_BLOCKS = ("datasets", "teachers", "barycenters", "methods", "students", "recipes", "tables", "figures")
"""Blocks of named entries; a name becomes a wildcard's value and so part of a path."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class ConfigError(Exception):
    """One line for the user: the key, what was received, what is allowed."""


def set_name(method: str, number: int) -> str:
    """What paths call the set `number` of a method, from 0: `wmdd`, `wmdd@1`, `wmdd@2`, …"""
    return f"{method}@{number}" if number else method


def entry_name(name: str) -> str:
    """The entry behind the name of a method's set."""
    return name.partition("@")[0]


def prepare(config: dict, schema: dict) -> dict:
    """Expand `like`, `sweep` and the `~` of results, repair numbers that YAML reads as text, and validate.

    Raises `ConfigError` at the first fault.
    """
    config = _repaired(copy.deepcopy(config))
    check_block("config", config, schema, schema)
    config["results"] = os.path.normpath(os.path.expanduser(config["results"]))
    for block in ENTRY_BLOCKS:
        config[block] = expand_entries(block, config.get(block) or {})
        kind = schema["$defs"][schema["properties"][block]["x-entry"]]
        for name, entry in config[block].items():
            if not isinstance(name, str):
                raise ConfigError(f"{block}.{name}: a name is text; put {name!r} in quotes")
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"{block}.{name}: a name is part of a path; use letters, digits and _ . + -"
                )
            check_block(f"{block}.{name}", entry, kind, schema)
            check_conditions(f"{block}.{name}", entry, kind, config["datasets"])
    check_targets(config, schema)
    check_references(config, schema)
    check_roots(config)
    return config


def check_targets(config: Mapping, schema: Mapping) -> None:
    """Tables and figures are targets by their names, which no rule and no other of them has."""
    taken = {*RULES_BESIDE, *schema["properties"]["accept_code"]["propertyNames"]["enum"]}
    for block in ("tables", "figures"):
        for name in config[block]:
            if name in taken:
                raise ConfigError(f"{block}.{name}: there is a table or a rule of this name; take another")
            taken.add(name)


def check_references(config: Mapping, schema: Mapping) -> None:
    """Every name that an entry refers to (`x-ref` in the schema) is an entry of that block, or a sweep.

    The names in a value by dataset are datasets, or `default`.
    """
    datasets = [*config["datasets"], "default"]
    sweeps = {name: entry["swept"]["entry"] for name, entry in config["methods"].items() if "swept" in entry}

    def check(where: str, value: object, allowed: Mapping) -> None:
        by_dataset = isinstance(value, Mapping) and allowed.get("type") != "object"
        for dataset in value if by_dataset else ():
            if dataset not in datasets:
                raise ConfigError(f"{where}: {unknown(dataset, datasets)}")
        blocks = allowed.get("x-ref")
        if not blocks:
            return
        known = [name for block in blocks for name in config[block]]
        known += sorted(set(sweeps.values())) if "methods" in blocks else []
        for single in value.values() if by_dataset else [value]:
            listed = single if isinstance(single, list) else [single]
            for name in listed:
                if name not in known:
                    raise ConfigError(f"{where}: {unknown(name, known)}")
                if "methods" in blocks and sweeps.get(name) in listed:
                    raise ConfigError(
                        f"{where}: {name} is one of {sweeps[name]}, named too; remove one of them"
                    )

    for key, value in config.items():
        if key not in ENTRY_BLOCKS:
            check(key, value, schema["properties"][key])
    for block in ENTRY_BLOCKS:
        properties = schema["$defs"][schema["properties"][block]["x-entry"]]["properties"]
        for name, entry in config[block].items():
            for key, value in entry.items():
                check(f"{block}.{name}.{key}", value, properties[key])


def check_roots(config: Mapping) -> None:
    """No folder of images holds the results, which would be taken for one more class."""
    results = os.path.realpath(config["results"])
    for name, entry in config["datasets"].items():
        given = entry.get("root")
        if entry["source"] != "imagefolder" or not given or not isinstance(given, str):
            continue
        root = os.path.realpath(os.path.expanduser(given))
        if os.path.commonpath([root, results]) == root:
            raise ConfigError(
                f"results ({config['results']}) lies inside datasets.{name}.root ({given}); put it elsewhere"
            )


TEXTS = ("title", "label", "caption")
"""Keys of what people read, which is one line and never a number."""


def _repaired(value: object) -> object:
    """YAML 1.1 reads 1e-3 as text; whoever writes it means a number. Whole numbers are integers: 1.0 is 1.

    Texts that people read are put on one line: a block of YAML ends with a line break.
    """
    if isinstance(value, dict):
        return {
            k: " ".join(v.split()) if k in TEXTS and isinstance(v, str) else _repaired(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [_repaired(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def expand_entries(block: str, entries: Mapping) -> dict:
    """Resolve `like: other` (inherit its settings) and `sweep: {key: [values]}` (an entry for each value)."""
    resolved: dict[str, dict] = {}

    def inherit(name: str, trail: tuple[str, ...]) -> dict:
        if not isinstance(name, Hashable) or name not in entries:
            raise ConfigError(f"{block}.{trail[-1]}.like: {unknown(name, entries)}")
        if name in trail:
            raise ConfigError(f"{block}.{name}.like: refers to itself through {' → '.join(trail)}")
        if not isinstance(entries[name], Mapping | None):
            raise ConfigError(f"{block}.{name}: expected settings, got {entries[name]!r}")
        entry = dict(entries[name] or {})
        parent = inherit(entry.pop("like"), (*trail, name)) if "like" in entry else {}
        return {**{k: v for k, v in parent.items() if k != "sweep"}, **entry}

    for name in entries:
        entry = inherit(name, ())
        sweep = entry.pop("sweep", None)
        if sweep is None:
            resolved[name] = entry
            continue
        if not (
            isinstance(sweep, Mapping) and len(sweep) == 1 and isinstance(next(iter(sweep.values())), list)
        ):
            raise ConfigError(f"{block}.{name}.sweep: expected one key with a list of values, got {sweep!r}")
        if block != "methods":
            raise ConfigError(
                f"{block}.{name}.sweep: only methods can be swept; write an entry for each value"
            )
        ((key, values),) = sweep.items()
        for value in values:
            member = f"{name}{value}"
            if member in entries or member in resolved:
                raise ConfigError(
                    f"{block}.{name}.sweep: there is a {block}.{member} already; rename one of them"
                )
            resolved[member] = {
                **entry,
                key: value,
                "swept": {"entry": name, "key": key, "value": value},
            }
    return resolved


def check_block(where: str, entry: object, kind: Mapping, schema: Mapping) -> None:
    """Check one mapping: known keys, required keys, and each value (or each of its values by dataset)."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected settings, got {entry!r}")
    for key in entry:
        if key not in kind["properties"]:
            raise ConfigError(f"{where}: {unknown(key, kind['properties'])}")
    for key in kind.get("required", ()):
        if key not in entry:
            raise ConfigError(
                f"{where}: the key {key!r} is missing ({kind['properties'][key]['description']})"
            )
    for key, value in entry.items():
        allowed = kind["properties"][key]
        one = kind is schema or key in kind.get("x-one-value", ()) or allowed.get("type") == "object"
        values = value if isinstance(value, Mapping) and not one else {"": value}
        _check_values(f"{where}.{key}".removeprefix("config."), values, allowed, schema)


def check_conditions(where: str, entry: Mapping, kind: Mapping, datasets: Iterable[str]) -> None:
    """Check what the schema says under `allOf`: what an entry of this kind, say, needs and may say.

    For each dataset; one for which a key has no value is none of the entry's, until a table asks for it.
    """
    from jsonschema import Draft202012Validator

    rules = kind.get("allOf", [])
    for dataset in datasets if rules else ():
        try:
            settings = resolve(entry, dataset, where)
        except ConfigError:
            continue
        for error in Draft202012Validator({"allOf": rules}).iter_errors(settings):
            told, listed = rules[error.schema_path[1]]["description"], error.validator_value
            if error.validator == "required":
                missing = ", ".join(repr(key) for key in listed if key not in settings)
                raise ConfigError(f"{where}: {told} needs {missing}; add what is missing")
            surplus = ", ".join(repr(key) for key in settings if key not in listed)
            raise ConfigError(
                f"{where}: {told} does not read {surplus}; remove it, here or where `like` takes it from"
            )


def _check_values(where: str, values: Mapping, allowed: Mapping, schema: Mapping) -> None:
    from jsonschema import Draft202012Validator

    for part, single in values.items():
        if isinstance(single, float) and not math.isfinite(single):
            raise ConfigError(f"{where} is {single}; expected a finite number ({allowed['description']})")
        error = next(
            iter(Draft202012Validator({**allowed, "$defs": schema["$defs"]}).iter_errors(single)), None
        )
        if error is None:
            continue
        if "propertyNames" in error.schema_path:
            raise ConfigError(f"{where}: {unknown(error.instance, error.validator_value)}")
        place = ".".join([where, *([part] if part else []), *map(str, error.path)])
        told = f"{place} is {error.instance!r}; {_expectation(error)}"
        raise ConfigError(f"{told} ({allowed['description']})")


def _expectation(error) -> str:
    limit = error.validator_value
    match error.validator:
        case "type":
            told, types = {"array": "list", "object": "mapping"}, [limit] if isinstance(limit, str) else limit
            return f"expected {' or '.join(told.get(t, t) for t in types)}"
        case "minItems":
            return f"it needs at least {limit}"
        case "minimum":
            return f"the least allowed is {limit}"
        case "maximum":
            return f"the most allowed is {limit}"
        case "exclusiveMinimum":
            return f"it must be above {limit}"
        case "pattern":
            return "it does not have the required form"
        case "uniqueItems":
            return "name each once"
        case "enum":
            known = ", ".join(map(str, limit))
            near = difflib.get_close_matches(str(error.instance), [str(x) for x in limit], 1)
            return f"known are {known}" + (f"; did you mean {near[0]!r}?" if near else "")
        case _:
            return error.message


def unknown(name: object, known: Iterable[str]) -> str:
    """ "unknown name 'x'; did you mean 'y'?", or the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"
    return f"unknown name {name!r}; {hint}"


def resolve(entry: Mapping, dataset: str, where: str) -> dict:
    """An entry's settings for one dataset: a mapping from dataset names becomes its value for `dataset`.

    `default` serves the datasets that are not named.
    """
    settings = {}
    for key, value in entry.items():
        if isinstance(value, Mapping) and key != "swept":
            if dataset not in value and "default" not in value:
                raise ConfigError(f"{where}.{key} has no value for dataset {dataset!r} and no default")
            value = value.get(dataset, value.get("default"))
        settings[key] = value
    return settings


def prepare_environment(root: str) -> None:
    """Let jobs find this project's modules, the running interpreter, the commit and what `ENVIRONMENT` says.

    The interpreter's folder comes first in PATH unless conda or a container puts another one in front;
    so the shell commands stay free of one machine's paths.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["WMDD_ROOT"] = str(root)
    first = {"PATH": os.path.dirname(sys.executable), "PYTHONPATH": str(root)}
    for name, folder in first.items():
        others = [p for p in os.environ.get(name, "").split(os.pathsep) if p and p != folder]
        os.environ[name] = os.pathsep.join([folder, *others])
    if "WMDD_COMMIT" not in os.environ:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
        try:
            commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # no git on this machine
            commit = ""
        os.environ["WMDD_COMMIT"] = commit or "unknown"


def count_gpus(device: str) -> int:
    """GPUs that jobs of this machine may use: those of CUDA_VISIBLE_DEVICES, or all; one, if it is named."""
    if device != "auto":
        return int(device.startswith("cuda"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
