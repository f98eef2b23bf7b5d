"""Whether an artefact is of this configuration, and of the place where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wmdd_core.errors import UserError

DATASET_RULE = "describe_dataset"
FOUND_RULES = (DATASET_RULE, "import_images")
"""Rules whose digests cover what they found on the disk, which no configuration can foretell."""

ALL = "all"
"""Images per class of a student trained on all real images."""


def check_place(path: str, header: Mapping, place: Mapping[str, str]) -> None:
    """Raise `UserError` unless `header` says that `path` was made for `place`.

    Students on all real data have no recipe and no images per class among their wildcards.
    """
    wildcards = header["wildcards"]
    optional = {"recipe", "ipc"} if place.get("ipc") == ALL else set()
    for key, value in place.items():
        if key not in wildcards and key in optional:
            continue
        if wildcards.get(key) != value:
            raise UserError(
                f"{path} was made for {key} {wildcards.get(key)!r}, not {value!r}: it does not belong there;"
                " delete it and run snakemake again"
            )


def check_lineage(path: str, header: Mapping, expected: Mapping[str, Iterable[str]]) -> None:
    """Raise `UserError` unless each step behind `path` has settings and code of this configuration.

    expected: rule → digests that its artefacts may carry.
    """
    for rule, digest in header["lineage"].items():
        if rule not in FOUND_RULES and digest not in expected.get(rule, ()):
            raise UserError(
                f"{path} was made by other settings or code of {rule} than this configuration's;"
                f" run snakemake again, or delete the file and what {rule} has made"
            )


def check_dataset(path: str, header: Mapping, first: dict[str, tuple[str, str | None]]) -> None:
    """Raise `UserError` unless `path` was made from the same data as the `first` file of its dataset."""
    found = header["lineage"].get(DATASET_RULE)
    dataset = header["wildcards"]["dataset"]
    other, known = first.setdefault(dataset, (path, found))
    if found != known:
        raise UserError(
            f"{path} and {other} were made from different versions of the dataset {dataset!r}"
            f" ({DATASET_RULE}); delete the outdated one and run snakemake again"
        )
