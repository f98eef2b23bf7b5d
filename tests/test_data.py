"""Datasets: layouts, splits, odd images, description, decoding, stores, external distilled sets."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from benchmarks.startup import imported_by
from wmdd_core import sources
from wmdd_core.data import (
    ImageStore,
    centre_view,
    decode,
    decode_to,
    describe,
    open_source,
    read_image_folder,
)
from wmdd_core.errors import UserError
from wmdd_core.layouts import class_count
from wmdd_core.sources import open_described


def make_image(*key: int, size: tuple[int, int] = (10, 8)) -> Image.Image:
    """A random RGB image of (width, height) `size`, determined by `key`."""
    pixels = np.random.default_rng(key).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def make_folders(root: Path, classes: dict[str, int], key: int = 0) -> Path:
    """`root` with so many PNG images per class."""
    for c, (name, count) in enumerate(classes.items()):
        for i in range(count):
            save(make_image(key, c, i), root / name / f"{i:03d}.png")
    return root


def folder(root: Path, **more) -> dict:
    return {"source": "imagefolder", "root": str(root), "resolution": 8, "seed": 0, **more}


def fails(*parts: str):
    """Expect a `UserError` of one line that holds all `parts`."""
    return pytest.raises(UserError, match="(?s)" + "".join(f"(?=.*{part})" for part in parts) + r"^[^\n]*\Z")


@pytest.fixture
def cats_and_dogs(tmp_path: Path) -> Path:
    make_folders(tmp_path / "train", {"cat": 4, "dog": 3})
    make_folders(tmp_path / "test", {"cat": 2, "dog": 1}, key=1)
    return tmp_path


# Layouts and the number of classes


def test_layouts_imports_the_standard_library_alone():
    code = "import wmdd_core.layouts as l; assert l.class_count({'source': 'imagenet1k'}) == 1000"
    assert not {"numpy", "torch", "torchvision", "PIL", "sklearn"} & imported_by(code)


def test_data_imports_no_torch():
    assert not {"torch", "torchvision", "sklearn"} & imported_by("import wmdd_core.data")


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("digits", 10),
        ("cifar10", 10),
        ("cifar100", 100),
        ("tiny_imagenet", 200),
        ("imagenette", 10),
        ("imagenet1k", 1000),
    ],
)
def test_class_count_needs_no_data(source, count):
    assert class_count({"source": source, "root": "/nowhere"}) == count


def test_class_count_of_folders(cats_and_dogs):
    assert class_count(folder(cats_and_dogs)) == 2
    assert class_count(folder(cats_and_dogs / "train")) == 2
    assert class_count(folder("/nowhere", classes=7)) == 7


def test_class_count_contradicted():
    with fails("classes: 5 ", "source digits has 10"):
        class_count({"source": "digits", "classes": 5})


def test_class_count_contradicts_folders(cats_and_dogs):
    with fails("classes: 3 ", "train has 2"):
        open_source(folder(cats_and_dogs, classes=3), "train")


@pytest.mark.parametrize("classes", [0, "ten", True])
def test_class_count_must_be_a_number(classes):
    with fails("classes: ", "whole number"):
        class_count({"source": "imagefolder", "classes": classes})


def test_unknown_source_names_the_nearest():
    with fails("source: 'cifar_10'", "did you mean cifar10"):
        class_count({"source": "cifar_10"})


@pytest.mark.parametrize("source", ["imagefolder", "cifar10", "tiny_imagenet", "imagenette", "imagenet1k"])
def test_missing_root_names_key_path_and_layout(source, tmp_path):
    with fails("root: ", "nowhere does not exist", "set it to the folder that holds"):
        open_source({"source": source, "root": str(tmp_path / "nowhere")}, "train")
    with fails("root: not set", source):
        open_source({"source": source}, "train")


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with fails("root: ", "is not a folder"):
        class_count(folder(tmp_path / "file"))


def test_unreadable_root(tmp_path, monkeypatch):
    make_folders(tmp_path, {"a": 2, "b": 2})

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # chmod would not stop a test that runs as root
    with fails(str(tmp_path), "Permission denied", "may read"):
        class_count(folder(tmp_path))


def test_home_is_expanded(tmp_path, monkeypatch):
    make_folders(tmp_path / "pictures", {"a": 2, "b": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert class_count(folder("~/pictures")) == 2


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_names_of_the_test_folder(tmp_path, name):
    make_folders(tmp_path / "train", {"a": 2, "b": 2})
    make_folders(tmp_path / name, {"a": 1, "b": 3})
    assert open_source(folder(tmp_path), "test").per_class().tolist() == [1, 3]


def test_flat_test_folder_is_passed_over(tmp_path):
    make_folders(tmp_path / "train", {"a": 2, "b": 2})
    make_folders(tmp_path / "val", {"a": 1, "b": 1})
    save(make_image(1), tmp_path / "test" / "unlabelled.png")
    assert open_source(folder(tmp_path), "test").names[0] == "val/a/000.png"


def test_a_test_folder_of_unlabelled_images_stands_back(tmp_path):
    """As in Tiny-ImageNet's archive, with val/ sorted into class folders."""
    make_folders(tmp_path / "train", {"a": 2, "b": 2})
    make_folders(tmp_path / "val", {"a": 1, "b": 1})
    make_folders(tmp_path / "test", {"images": 3})
    assert open_source(folder(tmp_path), "test").names[0] == "val/a/000.png"


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".thumbnails"])
def test_what_servers_and_archivers_leave_is_no_image(tmp_path, name):
    make_folders(tmp_path, {"a": 2, "b": 2})
    make_folders(tmp_path / "a", {name: 1})
    make_folders(tmp_path, {name: 1})
    assert class_count(folder(tmp_path)) == 2
    assert len(open_source(folder(tmp_path, test_fraction=0.5), "train")) == 2


def test_a_link_that_loops_among_the_class_folders_is_told(tmp_path):
    make_folders(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "dog").symlink_to(tmp_path / "dog")
    with fails("dog cannot be followed", "remove the link"):
        class_count(folder(tmp_path))


def test_a_root_below_a_closed_folder_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with fails("root: ", "cannot be reached", "Permission denied"):
        class_count(folder(tmp_path))


def test_train_without_test_folder(tmp_path):
    make_folders(tmp_path / "train", {"a": 2, "b": 2})
    with fails("test/", "for a drawn test part", str(tmp_path / "train")):
        open_source(folder(tmp_path), "train")


def test_train_may_be_a_class(tmp_path):
    make_folders(tmp_path, {"bus": 3, "train": 3})
    assert open_source(folder(tmp_path), "train").classes == ("bus", "train")


@pytest.mark.parametrize(
    "parts",
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("train", "Test"),
        ("train", "testing"),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"),
        ("TRAIN", "valid2017"),
    ],
)
def test_split_folders_of_another_name(tmp_path, parts):
    for part in parts:
        make_folders(tmp_path / part, {"cat": 2, "dog": 2})
    make_folders(tmp_path, {"more": 1})
    for settings in (folder(tmp_path), folder(tmp_path, classes=3)):
        with fails(f"root: {tmp_path} holds .*{parts[1]}", "name them train/ and test/"):
            open_source(settings, "train")


def test_split_folders_of_another_name_with_a_flat_test_part(tmp_path):
    make_folders(tmp_path / "Train", {"cat": 2, "dog": 2})
    save(make_image(1), tmp_path / "Test" / "unlabelled.png")
    with fails("name them train/ and test/"):
        class_count(folder(tmp_path))


def test_classes_of_folders_that_are_no_split(tmp_path):
    for name in ("trainer", "contest"):
        make_folders(tmp_path / name, {"2023": 1, "2024": 1})
    make_folders(tmp_path, {"training shoes": 2, "Dev": 2})
    assert open_source(folder(tmp_path), "train").classes == ("Dev", "contest", "trainer", "training shoes")


def test_root_one_folder_too_high(tmp_path):
    make_folders(tmp_path / "inner" / "train", {"a": 2, "b": 2})
    with fails("did you mean root: .*inner"):
        open_source(folder(tmp_path), "train")


def test_root_without_folders(tmp_path):
    with fails("holds no folders"):
        open_source(folder(tmp_path), "train")


def test_empty_class_folder(cats_and_dogs):
    (cats_and_dogs / "train" / "eel").mkdir()
    (cats_and_dogs / "train" / "eel" / "notes.txt").write_text("")
    make_folders(cats_and_dogs / "test", {"eel": 1})
    with fails("no image in .*train/eel", "remove the class"):
        open_source(folder(cats_and_dogs), "train")


def test_test_classes_differ(cats_and_dogs):
    make_folders(cats_and_dogs / "test", {"eel": 1})
    (cats_and_dogs / "test" / "dog").rename(cats_and_dogs / "test" / "dogs")
    with fails("missing: dog;", "surplus: dogs, eel"):
        open_source(folder(cats_and_dogs), "test")


def test_test_classes_differ_in_normalisation(cats_and_dogs):
    make_folders(cats_and_dogs / "train", {"caf\u00e9": 1})
    make_folders(cats_and_dogs / "test", {"cafe\u0301": 1})
    with fails("missing: caf\u00e9; surplus: cafe\u0301; .*normalisation .NFC, NFD.: caf\u00e9"):
        open_source(folder(cats_and_dogs), "test")


def test_loop_of_links(tmp_path):
    make_folders(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    with fails("a/self", "link"):
        open_source(folder(tmp_path), "train")


# Sources


def test_folder_source(cats_and_dogs):
    for stray in (".DS_Store", "Thumbs.db", "notes.txt", "._000.png"):
        (cats_and_dogs / "train" / "cat" / stray).write_text("")
    (cats_and_dogs / "train" / ".cache").mkdir()
    save(make_image(9), cats_and_dogs / "train" / "cat" / "more" / "deep.PNG")
    source = open_source(folder(cats_and_dogs), "train")
    assert source.classes == source.titles == ("cat", "dog")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0] * 5 + [1] * 3
    assert len(source) == len(source.names) == 8
    assert list(source.names[3:6]) == ["train/cat/003.png", "train/cat/more/deep.PNG", "train/dog/000.png"]
    np.testing.assert_array_equal(source.image(5), make_image(0, 1, 0))
    assert len(open_source(folder(cats_and_dogs), "test")) == 3


def test_names_with_spaces_and_other_alphabets(tmp_path):
    make_folders(tmp_path, {"Bäume im Herbst": 2, "猫 😺": 2, "sos'e": 2, "a\u202f1\u3000👩\u200d🔬": 2})
    description = describe(folder(tmp_path), workers=1)
    assert description["classes"] == ["Bäume im Herbst", "a\u202f1\u3000👩\u200d🔬", "sos'e", "猫 😺"]
    source = open_source(folder(tmp_path), "train")
    assert source.names[3].startswith("猫 😺/")
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("name", [b"a/\xff.png", b"a/two\nlines.png", b"a/\xfd", b"\xfe"])
def test_names_that_no_page_can_show(tmp_path, name):
    make_folders(tmp_path, {"a": 2, "a/deep": 1, "b": 2})
    old = {b"a/\xfd": tmp_path / "a" / "deep", b"\xfe": tmp_path / "a"}.get(name, tmp_path / "a" / "000.png")
    os.rename(os.fsencode(old), os.fsencode(tmp_path) + b"/" + name)
    with fails("not plain text", "rename it"):
        open_source(folder(tmp_path), "train")


def test_sources_can_be_pickled(cats_and_dogs):
    for settings in (folder(cats_and_dogs), {"source": "digits"}):
        source = open_source(settings, "train")
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.names) == list(source.names)
        np.testing.assert_array_equal(copy.image(3), source.image(3))


def test_split_name_is_checked(cats_and_dogs):
    with fails("split: 'val'"):
        open_source(folder(cats_and_dogs), "val")


def test_digits():
    digits = load_digits()
    train, test = (open_source({"source": "digits", "seed": 3}, split) for split in ("train", "test"))
    assert train.classes == tuple("0123456789")
    names = [*train.names, *test.names]
    assert sorted(names) == sorted(f"digits/{i}" for i in range(1797))
    np.testing.assert_array_equal(test.per_class(), np.round(0.2 * np.bincount(digits.target)))
    for source in (train, test):
        assert (np.diff(source.labels) >= 0).all()
        for i in (0, 100):
            original = int(source.names[i].split("/")[1])
            pixels = np.asarray(source.image(i))
            assert pixels.shape == (8, 8, 3)
            assert digits.target[original] == source.labels[i]
            for channel in range(3):
                wanted = np.rint(digits.images[original] * 255 / 16)
                np.testing.assert_array_equal(pixels[..., channel], wanted)
    assert decode(train, 8).max() == 255


# Splits


def test_the_draw_of_a_part_is_part_of_what_a_seed_means():
    """Recorded: tables of one seed, made by earlier and later versions, are tested on the same images."""
    digits = {"source": "digits", "seed": 0}
    for settings, first in (
        (digits, [72, 78, 101, 209, 276, 334]),
        ({**digits, "seed": 3}, [30, 150, 178, 185, 276, 304]),
        ({**digits, "validation_fraction": 0.2}, [0, 48, 140, 166, 185, 266]),
    ):
        names = open_source(settings, "test").names[:6]
        assert [int(name.split("/")[1]) for name in names] == first


def test_drawn_split_is_a_seeded_partition(tmp_path):
    make_folders(tmp_path, {"a": 10, "b": 25})
    parts = {}
    for seed in (0, 1):
        train, test = (
            open_source(folder(tmp_path, test_fraction=0.2, seed=seed), s) for s in ("train", "test")
        )
        assert test.per_class().tolist() == [2, 5]
        assert train.per_class().tolist() == [8, 20]
        assert not set(train.names) & set(test.names)
        assert list(train.names) == sorted(train.names)
        parts[seed] = set(test.names)
    assert parts[0] != parts[1]
    assert set(open_source(folder(tmp_path, test_fraction=0.2, seed=1), "test").names) == parts[1]


def test_drawn_split_keeps_its_place_when_images_are_added_or_skipped(tmp_path):
    make_folders(tmp_path, {"a": 20, "b": 20})
    settings = folder(tmp_path, test_fraction=0.5)
    before = set(open_source(settings, "test").names)
    skipped = min(open_source(settings, "train").names)
    assert set(open_source(settings, "test", skip=[skipped]).names) == before
    assert skipped not in open_source(settings, "train", skip=[skipped]).names
    save(make_image(5), tmp_path / "a" / "new.png")
    assert len(before ^ set(open_source(settings, "test").names)) <= 2


def test_validation_part_leaves_the_test_set_alone(cats_and_dogs):
    for file in (cats_and_dogs / "test").rglob("*.png"):
        file.unlink()
    settings = folder(cats_and_dogs, validation_fraction=0.4)
    train, test = open_source(settings, "train"), open_source(settings, "test")
    assert train.per_class().tolist() == [2, 2]
    assert test.per_class().tolist() == [2, 1]
    whole = {f"train/{path.parent.name}/{path.name}" for path in (cats_and_dogs / "train").rglob("*.png")}
    assert {*train.names, *test.names} == whole
    assert describe(settings)["test"]["per_class"] == [2, 1]


def test_validation_part_of_a_drawn_training_set():
    settings = {"source": "digits", "seed": 0}
    held_out = set(open_source(settings, "test").names)
    settings["validation_fraction"] = 0.25
    train, validation = open_source(settings, "train"), open_source(settings, "test")
    assert not held_out & {*train.names, *validation.names}
    assert len(held_out) + len(train) + len(validation) == 1797


def test_class_of_one_image(tmp_path):
    make_folders(tmp_path, {"one": 1, "two": 2, "ten": 10})
    settings = folder(tmp_path, test_fraction=0.01)
    description = describe(settings)
    assert description["classes"] == ["one", "ten", "two"]
    assert description["train"]["per_class"] == [1, 9, 1]
    assert description["test"]["per_class"] == [0, 1, 1]
    assert len(description["warnings"]) == 1
    assert "class one " in description["warnings"][0]


def test_classes_of_one_image_only(tmp_path):
    make_folders(tmp_path, {"a": 1, "b": 1})
    with fails("no readable test image of any class"):
        open_source(folder(tmp_path), "test")


@pytest.mark.parametrize("key", ["test_fraction", "validation_fraction"])
@pytest.mark.parametrize("value", [1, -0.1, "half"])
def test_fractions_are_checked(key, value):
    with fails(f"{key}: ", "from 0 to below 1"):
        open_source({"source": "digits", key: value}, "train")


def test_a_test_fraction_of_nothing_is_told():
    with fails("test_fraction: 0 leaves no test images"):
        open_source({"source": "digits", "test_fraction": 0}, "test")


# Published datasets in miniature


def make_cifar(root: Path, monkeypatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A CIFAR folder of 12 + 12 images whose checksums torchvision is told to expect."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    classes = {"cifar10": 10, "cifar100": 100}[name]
    base = root / dataset.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(7)
    pixels, labels = (
        rng.integers(0, 256, (2, 2 * classes, 3072), dtype=np.uint8),
        rng.permutation(2 * classes) % classes,
    )

    def write(file: str, content: dict) -> str:
        (base / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    for split, listing in enumerate(("train_list", "test_list")):
        files, parts = (
            getattr(dataset, listing),
            np.array_split(np.arange(2 * classes), len(getattr(dataset, listing))),
        )
        written = [
            [file, write(file, {"data": pixels[split][part], key: labels[part].tolist()})]
            for (file, _), part in zip(files, parts, strict=True)
        ]
        monkeypatch.setattr(dataset, listing, written)
    meta = dict(dataset.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class {c}" for c in range(classes)]})
    monkeypatch.setattr(dataset, "meta", meta)
    return pixels, labels


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    pixels, labels = make_cifar(tmp_path, monkeypatch, name)
    for split, split_pixels in zip(("train", "test"), pixels, strict=True):
        source = open_source({"source": name, "root": str(tmp_path)}, split)
        assert len(source.classes) == class_count({"source": name})
        assert (np.diff(source.labels) >= 0).all()
        order = [int(file.removeprefix(f"{split}/")) for file in source.names]
        np.testing.assert_array_equal(labels[order], source.labels)
        np.testing.assert_array_equal(decode(source, 32), split_pixels[order].reshape(-1, 3, 32, 32))
    base = next(tmp_path.iterdir())
    assert len(open_source({"source": name, "root": str(base)}, "train")) == len(labels)
    # What lies there is complete, so nothing is fetched.
    assert len(open_source({"source": name, "root": str(tmp_path), "download": True}, "train")) == len(labels)


def test_cifar_of_other_checksums_is_never_unpickled(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled an unknown file"))
    with fails("cifar-10-batches-py differs from the published", "download: true", "imagefolder"):
        open_source({"source": "cifar10", "root": str(tmp_path)}, "train")


def test_cifar_missing(tmp_path):
    with fails("cifar-10-batches-py does not exist", "download: true"):
        open_source({"source": "cifar10", "root": str(tmp_path)}, "train")


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_failed_download_says_where_to_put_the_files(tmp_path, monkeypatch, name):
    from torchvision.datasets import cifar, imagenette

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    monkeypatch.setattr(imagenette, "download_and_extract_archive", no_network)
    with fails(f"download of {name} to ", "no route to host", "https://"):
        open_source({"source": name, "root": str(tmp_path / "new"), "download": True}, "train")


def _download_slowly(name: str, root: Path, record: Path) -> None:
    """Open a source in a process of its own, whose archive takes a while to unpack."""
    from torchvision.datasets import cifar, imagenette

    def unpack(_url, folder, *_, **__):
        with open(record, "a") as file:
            file.write("begun ")
        time.sleep(0.5)
        if name == "cifar10":
            shutil.copytree(root.parent / "published", Path(folder) / "cifar-10-batches-py")
        else:
            for split in ("train", "val"):
                for c, wnid in enumerate(imagenette.Imagenette._WNID_TO_CLASS):
                    save(make_image(c), Path(folder) / "imagenette2" / split / wnid / "x.JPEG")

    for module in (cifar, imagenette):
        module.download_and_extract_archive = unpack
    assert len(open_source({"source": name, "root": str(root), "download": True}, "train")) > 0


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_two_datasets_with_one_root_download_once(tmp_path, monkeypatch, name):
    if name == "cifar10":
        make_cifar(tmp_path, monkeypatch, name)
        (tmp_path / "cifar-10-batches-py").rename(tmp_path / "published")
    record, fork = tmp_path / "record", multiprocessing.get_context("fork")
    arguments = (name, tmp_path / "root", record)
    both = [fork.Process(target=_download_slowly, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert record.read_text() == "begun "
    assert not (tmp_path / "root" / ".download.lock").exists()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path, monkeypatch):
    path, tries, lock = tmp_path / ".download.lock", [], sources.fcntl.lockf

    def late(file, how):  # its holder removes the file while we wait; then a third makes one of its own, too
        lock(file, how)
        tries.append(file)
        if len(tries) < 3:
            path.unlink()
        if len(tries) == 2:
            path.touch()

    monkeypatch.setattr(sources.fcntl, "lockf", late)
    with sources._one_download(tmp_path):
        assert len(tries) == 3 and path.exists()
    assert not path.exists()


def test_imagenette_is_downloaded_once_and_moved_into_place(tmp_path, monkeypatch):
    from torchvision.datasets import imagenette

    downloads = []

    def unpack(url, root, md5):
        downloads.append(url)
        for split in ("train", "val"):
            for c, wnid in enumerate(imagenette.Imagenette._WNID_TO_CLASS):
                save(make_image(c), Path(root) / "imagenette2" / split / wnid / "x.JPEG")

    monkeypatch.setattr(imagenette, "download_and_extract_archive", unpack)
    (tmp_path / ".download" / "imagenette2" / "train").mkdir(parents=True)  # left by a killed run
    for split in ("train", "test"):
        source = open_source({"source": "imagenette", "root": str(tmp_path), "download": True}, split)
        assert source.per_class().tolist() == [1] * 10
    assert source.names[0] == "imagenette2/val/n01440764/x.JPEG"
    assert source.titles[:2] == ("tench", "English springer")
    assert len(downloads) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["imagenette2"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    base = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for c, wnid in enumerate(wnids):
        for i in range(2):
            save(make_image(c, i), base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for i in range(5):
        save(make_image(9, i), base / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t62\t62\n" for i in range(5)]
    (base / "val" / "val_annotations.txt").write_text("".join(rows))
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tnewt\nn09\tother\n")
    return tmp_path


def tiny_settings(root: Path) -> dict:
    return {"source": "tiny_imagenet", "root": str(root), "classes": 3, "resolution": 8}


def test_tiny_imagenet(tiny):
    train, test = (open_source(tiny_settings(tiny), split) for split in ("train", "test"))
    assert train.classes == ("n01", "n02", "n03")
    assert train.titles == ("goldfish", "newt", "n03")
    assert train.per_class().tolist() == [2, 2, 2]
    assert [Path(name).name for name in test.names] == [f"val_{i}.JPEG" for i in (1, 4, 2, 0, 3)]
    assert test.labels.tolist() == [0, 0, 1, 2, 2]
    assert len(open_source(tiny_settings(tiny / "tiny-imagenet-200"), "test")) == 5


def test_tiny_imagenet_knows_its_number_of_classes(tiny):
    settings = tiny_settings(tiny)
    del settings["classes"]
    with fails("tiny_imagenet has 200 classes", "train has 3", "classes: 3"):
        open_source(settings, "train")


def test_tiny_imagenet_with_a_foreign_row(tiny):
    table = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    table.write_text(table.read_text() + "val_5.JPEG\tn99\t0\t0\t1\t1\n")
    with fails("val_annotations.txt, line 6", "n99"):
        open_source(tiny_settings(tiny), "test")


def test_tiny_imagenet_with_a_missing_image(tiny):
    (tiny / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG").unlink()
    with fails("1 of 11 images", "val_0.JPEG .No such file"):
        describe(tiny_settings(tiny))


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt"])
def test_tiny_imagenet_incomplete(tiny, file):
    (tiny / "tiny-imagenet-200" / file).unlink()
    with fails(file, "unpack the dataset again"):
        open_source(tiny_settings(tiny), "train")


def test_imagenet_as_unpacked(tmp_path):
    base = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    make_folders(base / "train", {"n01440764": 2, "n02012849": 2})
    make_folders(base / "val", {"n01440764": 1, "n02012849": 1})
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02012849 crane\n")
    settings = {"source": "imagenet1k", "root": str(tmp_path), "classes": 2}
    source = open_source(settings, "test")
    assert source.classes == ("n01440764", "n02012849")
    assert source.titles == ("tench", "crane")
    with fails("imagenet1k has 1000 classes", "train has 2"):
        open_source({"source": "imagenet1k", "root": str(tmp_path)}, "train")


def test_imagenet_with_unsorted_validation_images(tmp_path):
    make_folders(tmp_path / "train", {"n01": 2, "n02": 2})
    save(make_image(1), tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with fails("class folders of .*val differ", "missing: n01, n02"):
        open_source({"source": "imagenet1k", "root": str(tmp_path), "classes": 2}, "test")


# Odd images


def only_image(tmp_path: Path, image: Image.Image, file: str, **options) -> Image.Image:
    """`image` saved among others and read back through a source."""
    make_folders(tmp_path / "train", {"a": 1, "b": 1})
    make_folders(tmp_path / "test", {"a": 1, "b": 1})
    save(image, tmp_path / "train" / "a" / file, **options)
    source = open_source(folder(tmp_path), "train")
    result = source.image(list(source.names).index(f"train/a/{file}"))
    assert result.mode == "RGB"
    return result


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = make_image(1).convert("L")
    pixels = np.asarray(only_image(tmp_path, grey, "grey.png"))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], grey)


def test_bilevel(tmp_path):
    image = make_image(1).convert("1")
    np.testing.assert_array_equal(
        np.asarray(only_image(tmp_path, image, "x.png"))[..., 0], 255 * np.asarray(image)
    )


def test_palette(tmp_path):
    image = make_image(1).quantize(16)
    np.testing.assert_array_equal(only_image(tmp_path, image, "x.gif"), image.convert("RGB"))


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def test_alpha_lies_over_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    result = np.asarray(only_image(tmp_path, Image.fromarray(pixels), "x.png"), dtype=float)
    np.testing.assert_allclose(result, over_white(pixels), atol=1.01)
    assert result[0, 0].tolist() == [255] * 3
    assert result[0, 1].tolist() == pixels[0, 1, :3].tolist()


def test_grey_with_alpha_lies_over_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 2), dtype=np.uint8)
    result = np.asarray(only_image(tmp_path, Image.fromarray(pixels, "LA"), "x.png"), dtype=float)
    np.testing.assert_allclose(result, over_white(pixels[..., [0, 0, 0, 1]]), atol=1.01)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_transparent_colour_lies_over_white(tmp_path, mode):
    image = Image.new(mode, (3, 2), {"L": 7, "P": 1, "RGB": (1, 2, 3)}[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    options = {"transparency": {"L": 7, "P": 1, "RGB": (1, 2, 3)}[mode]}
    assert np.asarray(only_image(tmp_path, image, "x.png", **options)).min() == 255


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = np.asarray(only_image(tmp_path, image, "x.jpg", quality=100), dtype=int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 3


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    for file in ("x.png", "x.tif"):
        pixels = np.asarray(only_image(tmp_path, Image.fromarray(values), file))
        np.testing.assert_array_equal(pixels[..., 1], np.rint(values / 257))


def test_floating_point_pixels(tmp_path):
    values = np.array([[0, 0.5, 1.0]], dtype=np.float32)
    pixels = np.asarray(only_image(tmp_path, Image.fromarray(values), "x.tif"))
    assert pixels[0, :, 2].tolist() == [0, 128, 255]
    with fails("y.tif", "outside 0 to 1"):
        only_image(tmp_path, Image.fromarray(values * 200), "y.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = make_image(2, size=(24, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = only_image(tmp_path, image, "x.png", exif=exif)
    with Image.open(tmp_path / "train" / "a" / "x.png") as saved:
        expected = ImageOps.exif_transpose(saved)
    np.testing.assert_array_equal(result, expected)
    assert result.size == ((8, 24) if orientation > 4 else (24, 8))
    assert orientation == 1 or 0x0112 not in result.getexif()
    np.testing.assert_array_equal(
        centre_view(result, 8), np.asarray(expected.crop(centre(result))).transpose(2, 0, 1)
    )


def centre(image: Image.Image) -> tuple[int, int, int, int]:
    left, top = (image.width - 8) // 2, (image.height - 8) // 2
    return left, top, left + 8, top + 8


def test_damaged_exif_is_no_obstacle(tmp_path):
    assert only_image(tmp_path, make_image(2), "x.jpg", exif=b"Exif\0\0no TIFF header").size == (10, 8)


def test_image_of_one_pixel(tmp_path):
    image = only_image(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7)), "x.png")
    for resolution in (8, 96):
        view = centre_view(image, resolution)
        assert view.shape == (3, resolution, resolution)
        assert (view == np.array([9, 8, 7])[:, None, None]).all()


# Views


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 20))
def test_centre_view_is_torchvisions(width, height, resolution, margin):
    from torchvision.transforms import CenterCrop, Compose, Resize

    image = make_image(width, height, size=(width, height))
    theirs = Compose([Resize(resolution + margin), CenterCrop(resolution)])(image)
    ours = centre_view(image, resolution, resolution + margin)
    assert ours.dtype == np.uint8
    assert ours.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


@pytest.mark.parametrize(("resolution", "resize"), [(32, 32), (64, 64), (65, 74), (96, 110), (224, 256)])
def test_centre_view_resizes_by_resolution(resolution, resize):
    image = make_image(1, size=(90, 150))
    np.testing.assert_array_equal(centre_view(image, resolution), centre_view(image, resolution, resize))


def test_centre_view_keeps_the_centre_inside():
    with fails("resize: 31 is below the resolution 32"):
        centre_view(make_image(1), 32, 31)


# Description


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Training and test images of several sizes and formats."""
    for split, count in (("train", 70), ("test", 3)):
        for c in range(2):
            for i in range(count):
                size = (9 + (7 * i + c) % 13, 8 + (5 * i) % 11)
                save(
                    make_image(c, i, size=size),
                    tmp_path / split / "ab"[c] / f"{i:02d}.{('png', 'jpg')[i % 2]}",
                )
    return tmp_path


def test_describe(mixed):
    description = describe(folder(mixed))
    source, test = (open_source(folder(mixed), split) for split in ("train", "test"))
    views = decode(source, 8) / 255
    np.testing.assert_allclose(description["mean"], views.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(description["std"], views.std(axis=(0, 2, 3)), rtol=1e-12)
    sizes = [part.image(i).size[::-1] for part in (source, test) for i in range(len(part))]
    assert description["sizes"] == {
        "min": np.min(sizes, axis=0).tolist(),
        "median": np.quantile(sizes, 0.5, axis=0, method="lower").tolist(),
        "max": np.max(sizes, axis=0).tolist(),
    }
    assert description["train"] == {"count": 140, "per_class": [70, 70], "listing": source.listing}
    assert description["test"] == {"count": 6, "per_class": [3, 3], "listing": test.listing}
    assert description["unreadable"] == description["warnings"] == []
    assert json.loads(json.dumps(description)) == description


def test_files_of_other_formats_are_counted(cats_and_dogs):
    cat, test = cats_and_dogs / "train" / "cat", cats_and_dogs / "test" / "dog" / "deep"
    test.mkdir()
    for name in ("a.heic", "b.HEIC", "c.avif", "plain", "x.\udcff", "Thumbs.db", "desktop.ini", "._a.heic"):
        (cat / name).write_bytes(b"")
    (test / "d.heic").write_bytes(b"")
    (cats_and_dogs / "train" / "beside.heic").write_bytes(b"")
    save(make_image(3), cat / "e.jpe", format="jpeg")
    description = describe(folder(cats_and_dogs))
    assert description["train"]["per_class"] == [5, 3]
    (line,) = description["warnings"]
    told = "6 files of other formats are left out: 3 .heic, 1 .avif, 1 without a suffix, 1 ."
    assert line.startswith(told) and line.isascii()


def test_files_of_other_formats_are_counted_once_where_the_test_part_is_drawn(tmp_path):
    make_folders(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "b" / "x.avif").write_bytes(b"")
    (tmp_path / "b" / "notes.txt").write_bytes(b"")
    assert describe(folder(tmp_path))["warnings"] == ["1 files of other formats are left out: 1 .avif"]


def test_validation_part_needs_no_test_folder(cats_and_dogs):
    shutil.rmtree(cats_and_dogs / "test")
    settings = {**folder(cats_and_dogs, validation_fraction=0.4, classes=2), "source": "imagenet1k"}
    assert describe(settings)["test"]["per_class"] == [2, 1]


def test_describe_of_a_single_class(tmp_path):
    make_folders(tmp_path, {"only": 4})
    with fails(f"root: {tmp_path} holds one class, only;", "at least two"):
        describe(folder(tmp_path))


def test_sizes_are_taken_by_height_and_by_width(tmp_path):
    for i, size in enumerate([(9, 20), (30, 10), (12, 14), (11, 16)]):
        save(make_image(i, size=size), tmp_path / "ab"[i % 2] / f"{i}.png")
    sizes = describe(folder(tmp_path))["sizes"]
    assert sizes == {"min": [10, 9], "median": [14, 11], "max": [20, 30]}


def test_describe_is_the_same_for_any_number_of_workers(mixed):
    (mixed / "train" / "a" / "30.png").write_bytes(b"")
    (mixed / "test" / "b" / "01.jpg").write_bytes(b"not an image")
    settings = folder(mixed, on_unreadable="skip")
    assert json.dumps(describe(settings, workers=2)) == json.dumps(describe(settings, workers=1))


def exchange(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


CHANGES = {
    "added": lambda train: save(make_image(7), train / "cat" / "new.png"),
    "removed": lambda train: (train / "cat" / "003.png").unlink(),
    "renamed": lambda train: (train / "cat" / "003.png").rename(train / "cat" / "004.png"),
    "replaced": lambda train: save(make_image(7, size=(11, 8)), train / "cat" / "003.png"),
    "exchanged": lambda train: exchange(train / "cat" / "003.png", train / "dog" / "001.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_changed_since_they_were_described(cats_and_dogs, change):
    save(make_image(8, size=(20, 8)), cats_and_dogs / "train" / "cat" / "003.png")
    settings = folder(cats_and_dogs)
    description = {**describe(settings), "header": {"settings": settings}}
    CHANGES[change](cats_and_dogs / "train")
    with fails(f"root: {cats_and_dogs} has changed since some.json", "`-R some.json`"):
        open_described(description, "train", "some.json")
    assert len(open_described(description, "test", "some.json")) == 3
    assert describe(settings)["train"]["listing"] != description["train"]["listing"]


def test_a_drawn_part_notices_a_change_of_the_other(tmp_path):
    make_folders(tmp_path, {"a": 8, "b": 8})
    settings = folder(tmp_path)
    description = {**describe(settings), "header": {"settings": settings}}
    (tmp_path / open_source(settings, "train").names[0]).write_bytes(b"")
    with fails("has changed since"):
        open_described(description, "test", "some.json")


def test_a_copy_elsewhere_is_described_alike(cats_and_dogs):
    copy = shutil.copytree(cats_and_dogs, cats_and_dogs / "copy", copy_function=shutil.copyfile)
    description = describe(folder(cats_and_dogs))
    assert describe(folder(copy)) == description
    settings = folder(cats_and_dogs)
    described = {**description, "header": {"settings": settings}}
    assert len(open_described(described, "train", "some.json")) == 7
    for split in ("train", "test"):  # as described before there were listings, and kept by `accept_code`
        del described[split]["listing"]
    assert len(open_described(described, "train", "some.json")) == 7


def test_links_to_nowhere_are_listed_and_told_when_read(cats_and_dogs):
    (cats_and_dogs / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    with fails("1 of 11 images", "train/cat/gone.png .*No such file"):
        describe(folder(cats_and_dogs))


def test_describe_keeps_given_mean_and_std(mixed):
    given_values = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    description = describe(folder(mixed, **given_values))
    assert {key: description[key] for key in given_values} == given_values
    measured = describe(folder(mixed))
    assert describe(folder(mixed, std=[1, 1, 1]))["mean"] == measured["mean"]


@pytest.mark.parametrize(
    ("key", "value"), [("mean", [0.5, 0.5]), ("mean", 0.5), ("mean", [0.5, 0.5, 128]), ("std", [0.2, 0.2, 0])]
)
def test_describe_checks_mean_and_std(mixed, key, value):
    with fails(f"{key}: ", "three numbers"):
        describe(folder(mixed, **{key: value}))


def test_describe_of_a_single_colour(tmp_path):
    for i in range(4):
        save(Image.new("RGB", (8, 8), "red"), tmp_path / "ab"[i % 2] / f"{i}.png")
    with fails("std: ", "one and the same value"):
        describe(folder(tmp_path))


def spoil(cats_and_dogs: Path) -> None:
    """Three training images that cannot be read, each in its way."""
    buffer = io.BytesIO()
    make_image(1, size=(60, 60)).save(buffer, "jpeg")
    (cats_and_dogs / "train" / "cat" / "truncated.jpg").write_bytes(buffer.getvalue()[:-900])
    png = bytearray((cats_and_dogs / "train" / "dog" / "000.png").read_bytes())
    png[60:70] = bytes(10)
    (cats_and_dogs / "train" / "dog" / "corrupt.png").write_bytes(png)
    (cats_and_dogs / "train" / "dog" / "empty.png").write_bytes(b"")


def test_unreadable_images_stop(cats_and_dogs):
    spoil(cats_and_dogs)
    with fails(
        "3 of 13 images",
        "train/cat/truncated.jpg .*truncated",
        "corrupt.png",
        "empty.png",
        "on_unreadable: skip",
    ):
        describe(folder(cats_and_dogs))


def without_listing(description: dict) -> list[dict]:
    return [{k: v for k, v in description[s].items() if k != "listing"} for s in ("train", "test")]


def test_unreadable_images_are_skipped_and_listed(cats_and_dogs):
    clean = describe(folder(cats_and_dogs))
    spoil(cats_and_dogs)
    settings = folder(cats_and_dogs, on_unreadable="skip")
    description = describe(settings)
    listed = [entry["file"] for entry in description["unreadable"]]
    assert listed == ["train/cat/truncated.jpg", "train/dog/corrupt.png", "train/dog/empty.png"]
    assert all(entry["reason"] for entry in description["unreadable"])
    assert "3 of 13" in description["warnings"][0]
    for key in ("mean", "std", "sizes"):
        assert description[key] == clean[key]
    assert without_listing(description) == without_listing(clean)
    source = open_source(settings, "train", skip=listed)
    assert len(decode(source, 8)) == len(source) == 7
    description["header"] = {"settings": settings}
    assert open_described(description, "train", "description.json").names[:] == source.names[:]


def test_unreadable_image_is_named_when_it_is_read(cats_and_dogs):
    spoil(cats_and_dogs)
    source = open_source(folder(cats_and_dogs), "train")
    for workers in (1, 2):
        with fails("train/cat/truncated.jpg cannot be read", "replace or remove it"):
            decode(source, 8, indices=[0, 4] * 40, workers=workers)


def test_class_left_without_a_readable_image(cats_and_dogs):
    for split in ("test", "train"):
        for file in (cats_and_dogs / split / "dog").iterdir():
            file.write_bytes(b"")
        with fails(f"no readable {split} image of class dog"):
            describe(folder(cats_and_dogs, on_unreadable="skip"))


def test_class_left_without_a_readable_drawn_image(tmp_path):
    make_folders(tmp_path, {"a": 2, "b": 4})
    settings = folder(tmp_path, on_unreadable="skip")
    (tmp_path / open_source(settings, "test").names[0]).write_bytes(b"")
    with fails("no readable test image of class a"):  # it has two images: no excuse for an absent class
        describe(settings)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_that_leaves_a_class_without_a_drawn_part_is_named(tmp_path, split):
    make_folders(tmp_path, {"a": 4, "emu": 2})
    settings = folder(tmp_path, on_unreadable="skip")
    broken = open_source(settings, split).names[-1]
    (tmp_path / broken).write_bytes(b"")
    with fails(f"no readable {split} image of class emu; delete {broken}, add images"):
        describe(settings)
    (tmp_path / broken).unlink()
    description = describe(settings)
    assert (description["train"]["per_class"], description["test"]["per_class"]) == ([3, 1], [1, 0])


def test_on_unreadable_is_checked(cats_and_dogs):
    with fails("on_unreadable: 'ignore'"):
        describe(folder(cats_and_dogs, on_unreadable="ignore"))


# Decoding and stores


def test_decode(mixed):
    source = open_source(folder(mixed), "train")
    images = decode(source, 12)
    assert images.dtype == np.uint8
    assert images.shape == (140, 3, 12, 12)
    for i in (0, 139):
        np.testing.assert_array_equal(images[i], centre_view(source.image(i), 12))
    np.testing.assert_array_equal(decode(source, 12, workers=2), images)
    np.testing.assert_array_equal(decode(source, 12, indices=[139, 3, 3]), images[[139, 3, 3]])
    assert decode(source, 12, indices=[]).shape == (0, 3, 12, 12)


def test_decode_to_and_stores(mixed, tmp_path):
    source = open_source(folder(mixed), "train")
    images, path = decode(source, 8), tmp_path / "images.npy"
    decode_to(path, source, 8, workers=2)
    np.testing.assert_array_equal(np.load(path), images)
    stores = (ImageStore.from_array(path, source.labels), ImageStore.from_source(source, 8))
    for store in (*stores, *pickle.loads(pickle.dumps(stores)), *(s.in_memory() for s in stores)):
        assert len(store) == 140
        np.testing.assert_array_equal(store.labels, source.labels)
        for indices in ([5, 0, 5], np.array([7]), torch.tensor([100, 3]), []):
            batch = store.read(indices)
            assert batch.dtype == torch.uint8
            np.testing.assert_array_equal(batch, images[np.asarray(indices, dtype=int)])
        np.testing.assert_array_equal(store.read(slice(2, 9, 3)), images[2:9:3])
    assert len(pickle.dumps(stores[0])) < 3000
    batch.zero_()  # a copy: the file stays as it is
    np.testing.assert_array_equal(np.load(path), images)


def test_decode_to_leaves_nothing_half_written(cats_and_dogs, tmp_path):
    spoil(cats_and_dogs)
    (tmp_path / "out").mkdir()
    with fails("truncated.jpg"):
        decode_to(tmp_path / "out" / "images.npy", open_source(folder(cats_and_dogs), "train"), 8)
    assert not list((tmp_path / "out").iterdir())


def test_decode_to_on_a_full_disk(cats_and_dogs, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with fails("images.npy cannot be written", "No space left", "MB"):
        decode_to(tmp_path / "out" / "images.npy", open_source(folder(cats_and_dogs), "train"), 8)
    assert not list((tmp_path / "out").iterdir())


def test_store_checks_its_array(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 8, 8), dtype=np.uint8))
    with fails("x.npy holds uint8", r"expected uint8 \(5, 3, R, R\)", "delete"):
        ImageStore.from_array(tmp_path / "x.npy", np.zeros(5))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with fails("x.npy is damaged", "delete"):
        ImageStore.from_array(tmp_path / "x.npy", np.zeros(4))


# Distilled sets made elsewhere


CLASSES = ("ant", "bee")


def test_external_folder_per_class(tmp_path):
    make_folders(tmp_path, {"bee": 2, "ant": 1})
    images, labels, weights = read_image_folder(tmp_path, CLASSES, 8)
    assert labels.tolist() == [0, 1, 1]
    assert weights.tolist() == [1, 0.5, 0.5]
    np.testing.assert_array_equal(images[2], centre_view(make_image(0, 0, 1), 8))


@pytest.mark.parametrize("resolution", [32, 96])
def test_external_images_of_the_right_size_are_kept(tmp_path, resolution):
    for name in CLASSES:
        save(make_image(1, size=(resolution, resolution)), tmp_path / name / "0.png")
    images, *_ = read_image_folder(tmp_path, CLASSES, resolution)
    np.testing.assert_array_equal(
        images[1], np.asarray(make_image(1, size=(resolution,) * 2)).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("folders", [True, False])
def test_external_released_layout(tmp_path, folders):
    for c in range(2):
        for i in range(11):
            name = f"class{c:03d}_id{i:03d}.jpg"
            save(make_image(c, i), tmp_path / (f"new{c:03d}/{name}" if folders else name))
    images, labels, _ = read_image_folder(tmp_path, CLASSES, 8)
    assert images.shape == (22, 3, 8, 8)
    assert labels.tolist() == [0] * 11 + [1] * 11


def test_external_released_layout_contradicts_itself(tmp_path):
    save(make_image(0), tmp_path / "new000" / "class001_id000.jpg")
    save(make_image(0), tmp_path / "new001" / "class001_id000.jpg")
    with fails("new000/class001_id000.jpg", "is not 0"):
        read_image_folder(tmp_path, CLASSES, 8)


def test_external_released_layout_of_another_dataset(tmp_path):
    for c in (0, 2, 3):
        save(make_image(0), tmp_path / f"new{c:03d}" / f"class{c:03d}_id000.jpg")
    with fails("2 classes", r"missing: 1 \(bee\); surplus: 2, 3"):
        read_image_folder(tmp_path, CLASSES, 8)


def test_external_folders_of_another_dataset(tmp_path):
    make_folders(tmp_path, {"ant": 1, "wasp": 1})
    with fails("missing: bee; surplus: wasp", "new000"):
        read_image_folder(tmp_path, CLASSES, 8)


def test_external_class_without_an_image(tmp_path):
    make_folders(tmp_path, {"ant": 1})
    (tmp_path / "bee").mkdir()
    with fails(r"missing: 1 \(bee\)"):
        read_image_folder(tmp_path, CLASSES, 8)


def test_external_file_of_unknown_class(tmp_path):
    save(make_image(0), tmp_path / "picture.png")
    with fails("picture.png", "class000_id000.jpg"):
        read_image_folder(tmp_path, CLASSES, 8)


def save_arrays(path: Path, **arrays: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_external_arrays(tmp_path, suffix, channels_last, weighted):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    stored = images.transpose(0, 2, 3, 1) if channels_last else images
    arrays = {"images": stored, "labels": np.array([1, 0, 1, 0], dtype=np.int32)}
    if weighted:
        arrays["weights"] = np.array([0.5, 1, 1.5, 3], dtype=np.float32)
    path = save_arrays(tmp_path / f"x{suffix}", **arrays)
    found, labels, weights = read_image_folder(path, CLASSES, 96)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 0, 1, 1]
    assert weights.tolist() == ([0.25, 0.75, 0.25, 0.75] if weighted else [0.5] * 4)
    np.testing.assert_array_equal(found, images[[1, 3, 0, 2]])
    for resolution in (24, 80):  # above 64 pixels, too, nothing is cut off
        smaller, *_ = read_image_folder(path, CLASSES, resolution)
        whole = centre_view(Image.fromarray(images[1].transpose(1, 2, 0)), resolution, resolution)
        np.testing.assert_array_equal(smaller[0], whole)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 8, 8), dtype=np.float32), np.arange(2), "float32"),
        (np.zeros((2, 1, 8, 8), dtype=np.uint8), np.arange(2), r"\(2, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), np.arange(3), r"\(3,\)"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), np.arange(2.0), "float64"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), np.array([0, 2]), r"missing: 1 \(bee\); surplus: 2"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), np.array([0, -1]), "surplus: -1"),
    ],
)
def test_external_arrays_are_checked(tmp_path, images, labels, message):
    with fails("x.npz", message):
        read_image_folder(save_arrays(tmp_path / "x.npz", images=images, labels=labels), CLASSES, 8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"\(3,\)"),
        (np.ones(2, dtype=np.int64), "int64"),
        (np.array([1.0, 0.0]), "not all finite and above 0"),
        (np.array([1.0, np.nan]), "not all finite and above 0"),
    ],
)
def test_external_weights_are_checked(tmp_path, weights, message):
    images, labels = np.zeros((2, 3, 8, 8), dtype=np.uint8), np.arange(2)
    path = save_arrays(tmp_path / "x.npz", images=images, labels=labels, weights=weights)
    with fails("x.npz", message):
        read_image_folder(path, CLASSES, 8)


def test_external_files_are_never_unpickled(tmp_path, monkeypatch):
    images = np.array([[1, 2]], dtype=object)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(2))
    (tmp_path / "y.npz").write_bytes(pickle.dumps({"images": 1}))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled a user's file"))
    for file in ("x.npz", "y.npz"):
        with fails(file, "never loaded"):
            read_image_folder(tmp_path / file, CLASSES, 8)


def test_external_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    save_arrays(tmp_path / "y.npz", images=np.zeros((2, 3, 8, 8), dtype=np.uint8))
    (tmp_path / "z.pt").write_bytes(b"")
    for file, part in (
        ("x.safetensors", "cannot be read"),
        ("y.npz", "labels"),
        ("z.pt", "neither"),
        ("no", "exist"),
    ):
        with fails(file, part):
            read_image_folder(tmp_path / file, CLASSES, 8)
