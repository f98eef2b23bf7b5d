"""Files that explain themselves and appear whole: safe formats, headers, atomic renames.

No pickles: `.npy`, `.npz` without objects, safetensors, JSON, CSV. Each artefact carries a header
(`make_header`) that says what made it, with which settings, from what and with which versions.
A header holds nothing that differs between two runs of the same thing (no dates, no host names),
so equal work gives equal bytes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from wmdd_core.digests import canonical, digest, lineage_name
from wmdd_core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("numpy", "torch", "torchvision", "POT", "scikit-learn", "pillow")


def make_header(
    rule: str,
    wildcards: Mapping,
    settings: Mapping,
    code: str,
    inputs: Iterable[Mapping] = (),
    device: str | None = None,
    **more: object,
) -> dict:
    """What made an artefact, from what, and with what.

    `lineage` maps this rule and every rule upstream (from the headers `inputs`) to digests of their
    settings and code: two artefacts with the same lineage were made in the same way from the same data.
    Jobs of one rule that were merged (shards, blocks of classes) share one entry.

    `devices` says where each of them computed, "cpu", "cuda" or, merged, both: it decides how numbers are
    rounded and, where `precision` is auto, how many bits they have.
    """
    lineage: dict[str, str] = {}
    devices: dict[str, set[str]] = {}
    for header in inputs:
        for name, value in header.get("devices", {}).items():
            devices.setdefault(name, set()).update(value.split(", "))
        for name, value in header["lineage"].items():
            if lineage.setdefault(name, value) != value:
                raise UserError(
                    f"inputs of {rule} were made by different settings or code of {name}; run snakemake"
                    f" again, or delete what {name} and the rules after it have made"
                )
    lineage[lineage_name(rule, wildcards)] = digest([settings, code])
    if device:
        devices[lineage_name(rule, wildcards)] = {device}
    return {
        "rule": rule,
        "wildcards": dict(wildcards),
        "settings": dict(settings),
        "code": code,
        "lineage": lineage,
        "devices": {name: ", ".join(sorted(found)) for name, found in devices.items()},
        "commit": os.environ.get("WMDD_COMMIT", "unknown"),
        "versions": {"python": platform.python_version(), **_versions()},
        **more,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or remove it on an error.

    The temporary name depends on `path` alone: what a killed process has left there, the next try removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave an empty file of the right name
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def temporary_path(path: Path) -> Path:
    """Where `replacing` builds what becomes `path`."""
    return path.with_name(f".{path.name}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def still_there(path: Path, file: IO) -> bool:
    """Whether `path` is the open `file`, and not another of its name or none."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_json(path: Path | str, content: Mapping, header: Mapping) -> None:
    """Write `content` with its header as JSON."""
    write_text(path, json.dumps({**content, "header": header}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict:
    """Read a JSON file; the header is under "header". `UserError` if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise _damaged(path, error) from error


def write_csv(path: Path | str, table: pd.DataFrame, number: str | None = None) -> None:
    """Write a table with the names of its columns; `number` is how floats are written, as `%.6g`."""
    write_text(path, table.to_csv(index=False, lineterminator="\n", float_format=number))


def read_array(path: Path | str) -> np.memmap:
    """The array of a `.npy` file, memory-mapped for reading; `UserError` if it is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise _damaged(path, error) from error


def write_arrays(path: Path | str, arrays: Mapping[str, np.ndarray], header: Mapping) -> None:
    """Write named arrays as an `.npz` without pickled objects."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, header=np.array(canonical(header)), **arrays)


def read_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], dict]:
    """Read arrays and header of a file made by `write_arrays`; `UserError` if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("header")))
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def write_tensors(path: Path | str, tensors: Mapping, header: Mapping) -> None:
    """Write named PyTorch tensors or NumPy arrays as safetensors; the header is the metadata's one entry."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {n: t.detach().cpu().numpy() if hasattr(t, "detach") else t for n, t in tensors.items()}
    arrays = {n: np.asarray(a, order="C") for n, a in arrays.items()}
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, {"header": canonical(header)})
        except SafetensorError as error:
            told = re.search(r"os error (\d+)", str(error))
            if not told:
                raise
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error


def read_tensors(path: Path | str, framework: str = "pt") -> tuple[dict, dict]:
    """Read tensors (on the CPU) and header of a file made by `write_tensors`; `UserError` if it is damaged.

    `framework` "np" gives NumPy arrays, without PyTorch.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path | str, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); delete it and run snakemake again")
