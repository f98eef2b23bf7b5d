"""Where a dataset's images lie on disk and how many classes it has.

Standard library only: the workflow counts classes before any job starts, on machines without
the data and in every dry run, and must not pay for NumPy there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from wmdd_core.errors import UserError

KNOWN_CLASSES: dict[str, int | None] = {
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet": 200,
    "imagenette": 10,
    "imagenet1k": 1000,
    "imagefolder": None,
}
"""Every source and its number of classes; None where only the user's folders can tell."""

FIXED_SOURCES = ("digits", "cifar10", "cifar100")
"""Sources whose classes cannot be chosen; of the others a user may hold a subset."""

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Names of the test set's folder beside `train`; the first that holds class folders is taken."""

TRAIN_WORDS = {"train", "training", "trainset"}

TEST_WORDS = {*TEST_FOLDERS, "tests", "testing", "testset", "valset", "dev", "eval", "evaluation"}
"""Words in the names that others give to the folders of a split, in lower case."""

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip

BYPRODUCT_SUFFIXES = (
    ".aae", ".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".xmp", ".yaml",
    ".yml",
)  # fmt: skip
"""Of files that lie beside images and are none: nobody misses them."""

BYPRODUCT_FOLDERS = ("__MACOSX", "@eaDir")
"""What archivers and file servers leave beside images."""

EXPECTED_LAYOUT = {
    "imagefolder": "train/<class>/ and test/<class>/ (or val/<class>/) with the same classes, or one "
    "<class>/ folder per class",
    "cifar10": "cifar-10-batches-py/ as published",
    "cifar100": "cifar-100-python/ as published",
    "tiny_imagenet": "wnids.txt, train/<wnid>/images/ and val/val_annotations.txt with val/images/",
    "imagenette": "train/<wnid>/ and val/<wnid>/",
    "imagenet1k": "train/<wnid>/ and val/<wnid>/",
}

_UNPACKED_AS = {  # the folders that the published archives unpack to, tried below `root`
    "tiny_imagenet": ("", "tiny-imagenet-200"),
    "imagenette": ("", "imagenette2", "imagenette2-320", "imagenette2-160"),
    "imagenet1k": ("", "ILSVRC/Data/CLS-LOC"),
}

_IMAGENETTE_TITLES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@dataclass(frozen=True)
class FolderLayout:
    """Class folders of a dataset.

    `test` is None where the test part is drawn from `train` itself; `annotations` is the table that
    gives the test images' classes where they are not in class folders.
    """

    root: Path
    classes: tuple[str, ...]
    train: Path
    test: Path | None
    annotations: Path | None = None


def class_count(settings: Mapping[str, Any]) -> int:
    """Number of classes by the settings, without reading an image.

    `classes` where it is given, the known number of a built-in source, otherwise the class
    folders under `root`. Raises `UserError` if a fixed source is contradicted or `root` cannot be read.
    """
    if names := listed_classes(settings):
        return len(names)
    source, stated = source_name(settings), stated_classes(settings)
    if stated is not None and source not in FIXED_SOURCES:
        return stated
    known = KNOWN_CLASSES[source]
    check_class_count(settings, known, f"source {source}")
    return known


def listed_classes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the class folders under `root`, where neither the settings nor the source say how many."""
    told = stated_classes(settings) is not None or KNOWN_CLASSES[source_name(settings)] is not None
    return () if told else find_layout(settings).classes


def source_name(settings: Mapping[str, Any]) -> str:
    """The setting `source`, checked."""
    source = settings.get("source")
    if source not in KNOWN_CLASSES:
        near = get_close_matches(str(source), KNOWN_CLASSES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"source: {source!r} is not one of {', '.join(KNOWN_CLASSES)}{hint}")
    return source


def stated_classes(settings: Mapping[str, Any]) -> int | None:
    """The optional setting `classes`, checked."""
    stated = settings.get("classes")
    if stated is not None and (not isinstance(stated, int) or isinstance(stated, bool) or stated < 1):
        raise UserError(f"classes: {stated!r} is not a whole number from 1; correct it or leave it out")
    return stated


def check_class_count(settings: Mapping[str, Any], found: int, where: str) -> None:
    """Hold the number of classes `found` in `where` against the settings; raise `UserError` naming both."""
    stated = stated_classes(settings)
    if stated is not None and stated != found:
        raise UserError(
            f"classes: {stated} in the settings, but {where} has {found}; correct `classes`, or leave it out"
        )
    known = KNOWN_CLASSES[source_name(settings)]
    if stated is None and known is not None and known != found:
        raise UserError(
            f"source {settings['source']} has {known} classes, but {where} has {found}; complete the "
            f"folders, or set `classes: {found}` if a subset is meant"
        )


def root_folder(settings: Mapping[str, Any]) -> Path:
    """The setting `root` with ~ expanded; raises `UserError` if it is not a folder."""
    source = source_name(settings)
    expected = f"the folder that holds {EXPECTED_LAYOUT[source]}"
    if not settings.get("root"):
        raise UserError(f"root: not set, but source {source} needs it; set it to {expected}")
    root = Path(os.path.expanduser(settings["root"]))
    try:
        there = root.exists()
    except OSError as error:  # of a folder above that may not be searched
        raise UserError(
            f"root: {root} cannot be reached ({error.strerror}); get leave to, or set it to {expected}"
        ) from error
    if not there:
        raise UserError(f"root: {root} does not exist; set it to {expected}")
    if not root.is_dir():
        raise UserError(f"root: {root} is not a folder; set it to {expected}")
    return root


def is_shown(name: str) -> bool:
    """Whether a file or folder counts: hidden ones, and what archivers and servers leave, do not."""
    return not name.startswith(".") and name not in BYPRODUCT_FOLDERS


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of `folder` by name, without hidden ones and what archivers leave behind."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if is_shown(entry.name)]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed ({error.strerror}); check that it exists and that you may read it, "
            "or correct `root`"
        ) from error
    return sorted(shown, key=lambda entry: entry.name)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted as text: class 0 is the first."""
    return [_readable_name(entry) for entry in list_folder(folder) if _is_folder(entry)]


def image_files(folder: Path) -> list[str]:
    """Image files at any depth below `folder`, as relative paths with /; a link that loops is an error."""
    return [
        f"{place}{_readable_name(entry)}"
        for place, entry in _files(folder)
        if entry.name.lower().endswith(IMAGE_SUFFIXES)
    ]


def other_files(settings: Mapping[str, Any]) -> Counter[str]:
    """How many files in the class folders have another suffix than images and by-products, by suffix."""
    if source_name(settings) in FIXED_SOURCES:
        return Counter()
    layout = find_layout(settings)
    tested = layout.test is not None and not settings.get("validation_fraction")
    parts = [layout.train, layout.test] if tested else [layout.train]
    folders = [part / name for part in parts for name in class_folders(part)]
    names = [entry.name.lower() for folder in folders for _, entry in _files(folder)]
    others = [name for name in names if not name.endswith(IMAGE_SUFFIXES + BYPRODUCT_SUFFIXES)]
    return Counter(os.path.splitext(name)[1] for name in others)


def _files(folder: Path, place: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files at any depth below `folder`, each behind its place in there ("" or a path that ends in /)."""
    for entry in list_folder(folder):
        if _is_folder(entry):
            yield from _files(Path(entry.path), f"{place}{_readable_name(entry)}/")
        else:
            yield place, entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"{entry.path} cannot be followed ({error.strerror}); remove the link") from error


def _readable_name(entry: os.DirEntry[str]) -> str:
    """The entry's name, which later goes into JSON files and pages."""
    # Line breaks, control characters, and bytes that are not UTF-8, which Python keeps as surrogates.
    if any(category(character) in ("Cc", "Cs", "Zl", "Zp") for character in entry.name):
        raise UserError(f"the file name {entry.path!a} is not plain text in UTF-8; rename it")
    return entry.name


def find_layout(settings: Mapping[str, Any]) -> FolderLayout:
    """Class folders of a source that is kept as files; raises `UserError` where they are not as expected.

    Images are not listed here; a class folder without any is found by `list_images`.
    """
    source = source_name(settings)
    root = root_folder(settings)
    if source == "imagefolder":
        layout = _find_image_folder(root)
    elif source == "tiny_imagenet":
        layout = _find_tiny_imagenet(root)
    else:
        base = _find_base(root, source)
        layout = FolderLayout(root, tuple(class_folders(base / "train")), base / "train", base / "val")
    check_class_count(settings, len(layout.classes), str(layout.train))
    return layout


def _find_image_folder(root: Path) -> FolderLayout:
    folders = class_folders(root)
    if not folders:
        raise UserError(f"root: {root} holds no folders; expected {EXPECTED_LAYOUT['imagefolder']}")
    # Only a `train` of folders is a split: `train` full of pictures may be a class of vehicles.
    train_classes = class_folders(root / "train") if "train" in folders else []
    tests = [name for name in TEST_FOLDERS if name in folders and class_folders(root / name)]
    # A `test` without labels, of one folder of images, stands back behind a `val` of class folders.
    tests.sort(key=lambda name: set(class_folders(root / name)).isdisjoint(train_classes))
    if train_classes and tests:
        return FolderLayout(root, tuple(train_classes), root / "train", root / tests[0])
    if "train" in folders and set(folders) <= {"train", *TEST_FOLDERS}:
        lacking = "test/ (or val/)" if train_classes else "train/"
        raise UserError(
            f"root: {root} has no class folders in {lacking}; expected {EXPECTED_LAYOUT['imagefolder']}"
            + (f"; for a drawn test part set root: {root / 'train'}" if train_classes else "")
        )
    trains, others = (
        [name for name in folders if not words.isdisjoint(re.split(r"[\W\d_]+", name.casefold()))]
        for words in (TRAIN_WORDS, TEST_WORDS)
    )
    # Taken for classes, they would be one class each, with all of theirs mixed.
    if trains and others and any(class_folders(root / name) for name in trains + others):
        raise UserError(
            f"root: {root} holds {some(trains + others)}, which look like the parts of a split; name them "
            "train/ and test/, with a folder per class in each"
        )
    if len(folders) == 1 and class_folders(root / folders[0]):
        raise UserError(f"root: {root} holds one folder of folders; did you mean root: {root / folders[0]}?")
    return FolderLayout(root, tuple(folders), root, None)


def _find_base(root: Path, source: str) -> Path:
    """The folder below `root` that holds train/."""
    for unpacked in _UNPACKED_AS[source]:
        if (root / unpacked / "train").is_dir():
            return root / unpacked
    raise UserError(f"root: {root} has no train/ folder; expected {EXPECTED_LAYOUT[source]}")


def _find_tiny_imagenet(root: Path) -> FolderLayout:
    """Classes are sorted by WordNet id, as a folder reader orders them, not in the order of wnids.txt."""
    base = _find_base(root, "tiny_imagenet")
    classes = tuple(sorted(line.strip() for line in _lines(base / "wnids.txt") if line.strip()))
    if not classes:
        raise UserError(f"{base / 'wnids.txt'} is empty; unpack the dataset again")
    _compare_classes(base / "train", class_folders(base / "train"), classes, f"{base / 'wnids.txt'}")
    annotations = base / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(
            f"{annotations} does not exist; unpack the dataset again, or use source: imagefolder if you have "
            "sorted val/ into class folders"
        )
    return FolderLayout(root, classes, base / "train", base / "val", annotations)


def list_images(layout: FolderLayout, split: str) -> list[list[str]]:
    """File names relative to the root, one sorted list per class, of `split` ("train" or "test").

    Raises `UserError` for class folders that are missing, surplus or without an image.
    """
    folder = layout.train if split == "train" or layout.test is None else layout.test
    prefix = folder.relative_to(layout.root).as_posix()
    prefix = "" if prefix == "." else f"{prefix}/"
    if split == "test" and layout.annotations is not None:
        return _list_annotated(layout.annotations, prefix, layout.classes)
    _compare_classes(folder, class_folders(folder), layout.classes, str(layout.train))
    files = [image_files(folder / name) for name in layout.classes]
    empty = [name for name, found in zip(layout.classes, files, strict=True) if not found]
    if empty:
        raise UserError(
            f"no image in {some([str(folder / name) for name in empty])}; add images "
            f"({', '.join(IMAGE_SUFFIXES)}) or remove the class"
        )
    return [
        [f"{prefix}{name}/{file}" for file in found]
        for name, found in zip(layout.classes, files, strict=True)
    ]


def _list_annotated(table: Path, prefix: str, classes: Sequence[str]) -> list[list[str]]:
    """Tiny-ImageNet's validation set: one folder of images and a table of file name, WordNet id, box."""
    files: dict[str, list[str]] = {name: [] for name in classes}
    for number, line in enumerate(_lines(table), start=1):
        fields = line.split("\t")
        if not line.strip():
            continue
        if len(fields) < 2 or fields[1] not in files:
            raise UserError(
                f"{table}, line {number}: {line[:60]!r} does not name an image and a class of wnids.txt; "
                "unpack the dataset again"
            )
        files[fields[1]].append(f"{prefix}images/{fields[0]}")
    return [sorted(found) for found in files.values()]


def class_titles(layout: FolderLayout, source: str) -> tuple[str, ...]:
    """A readable name per class, for pages and figures; the folder's name where none is known.

    WordNet ids are looked up in LOC_synset_mapping.txt or words.txt (id, white space, names with
    commas) beside the folders. Titles need not be unique (ImageNet has two cranes), classes are.
    """
    titles = dict(_IMAGENETTE_TITLES) if source == "imagenette" else {}
    if source in ("imagenet1k", "tiny_imagenet"):
        places = dict.fromkeys((layout.root, layout.train.parent, layout.root.parent))
        tables = [place / name for place in places for name in ("LOC_synset_mapping.txt", "words.txt")]
        for line in next((_lines(table) for table in tables if table.is_file()), []):
            identifier, _, names = line.partition("\t" if "\t" in line else " ")
            titles[identifier] = names.split(",")[0].strip()
    return tuple(titles.get(name) or name for name in layout.classes)


def compare_names(found: Sequence[str], expected: Sequence[str]) -> str:
    """Says which of the `expected` names are missing and which of the `found` are surplus; "" if none."""
    there, wanted = set(found), set(expected)
    missing = [name for name in expected if name not in there]
    surplus = [name for name in found if name not in wanted]
    parts = [f"missing: {some(missing)}"] * bool(missing) + [f"surplus: {some(surplus)}"] * bool(surplus)
    composed = {normalize("NFC", name) for name in surplus}
    alike = [name for name in missing if normalize("NFC", name) in composed]
    if alike:
        parts.append(f"alike but for Unicode normalisation (NFC, NFD): {some(alike)}")
    return "; ".join(parts)


def _compare_classes(folder: Path, found: Sequence[str], expected: Sequence[str], where: str) -> None:
    difference = compare_names(found, expected)
    if difference:
        raise UserError(
            f"the class folders of {folder} differ from {where} ({difference}); every class needs its folder "
            "in both"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); unpack the dataset again, or correct `root`"
        ) from error


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
