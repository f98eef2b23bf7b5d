"""Datasets as sequences of upright RGB images, ordered by class, with their splits."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wmdd_core.artifacts import still_there
from wmdd_core.errors import UserError
from wmdd_core.layouts import (
    FolderLayout,
    check_class_count,
    class_titles,
    find_layout,
    list_images,
    root_folder,
    some,
    source_name,
)
from wmdd_core.seeding import derive_seed

DEFAULT_TEST_FRACTION = 0.2

IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz"

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(UserError):
    """One image that cannot be decoded: `file` as in `ImageSource.names`, and the `reason`."""

    def __init__(self, path: str, file: str = "", reason: str = "") -> None:
        super().__init__(
            f"{path} cannot be read as an image ({reason}); replace or remove it"
            if file
            # PyTorch makes the exception of a decoding process anew, of the traceback that it printed.
            else path.rstrip().rpartition("\n")[2].partition(f"{type(self).__name__}: ")[2]
        )
        self.path, self.file, self.reason = path, file, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from `args`, which is the message; worker processes need the parts.
        return type(self), (self.path, self.file, self.reason)


class PackedNames(Sequence[str]):
    """A read-only list of names in two arrays.

    A million Python strings take 100 MB, which every worker process would come to own by
    touching their reference counts; the arrays stay shared.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode() for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes().decode()


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A split of a dataset, ordered by class and within a class by name; can be pickled.

    `classes` are unique identifiers in the order of the labels, `titles` their readable names,
    `labels` (N,) int64 ascending, `names` the file relative to the root, or "split/index". `listing` is
    a digest of the files that were found, before any was drawn or left out; "" for arrays.
    """

    classes: tuple[str, ...]
    titles: tuple[str, ...]
    labels: np.ndarray
    names: Sequence[str]
    listing: str = field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Image `i`, upright, in RGB; raises `UnreadableImage` naming the file."""
        raise NotImplementedError

    def subset(self, indices: np.ndarray) -> ImageSource:
        """The images at `indices`, which ascend."""
        return replace(self, labels=self.labels[indices], names=PackedNames(self.names[i] for i in indices))

    def per_class(self) -> np.ndarray:
        """Images in each class, (classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.classes))


@dataclass(frozen=True, eq=False)
class FileSource(ImageSource):
    """Images kept as files; `names` are relative to `root`."""

    root: Path

    def image(self, i: int) -> Image.Image:
        name = self.names[i]
        path = self.root / name
        try:
            with Image.open(path) as image:
                image.load()
                return upright_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever their parsers trip over
            raise UnreadableImage(str(path), name, _reason(error)) from error


@dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images in memory: `pixels` uint8, (N, H, W) grey or (N, H, W, 3)."""

    pixels: np.ndarray

    def image(self, i: int) -> Image.Image:
        return upright_rgb(Image.fromarray(self.pixels[i]))

    def subset(self, indices: np.ndarray) -> ImageSource:
        return replace(super().subset(indices), pixels=self.pixels[indices])


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says, in 8-bit RGB; see `to_rgb`."""
    turn = _UPRIGHT.get(_orientation(image))
    image = to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # still holds the orientation, which would turn the image once more
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in 8-bit RGB.

    Grey becomes three equal channels, transparency is laid over white, 16-bit grey is scaled by
    1/257. Raises `ValueError` for integers beyond 16 bits and floats outside [0, 1], whose
    scale cannot be known.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_bytes(image).convert("RGB")
    if image.has_transparency_data:
        # Premultiplied modes ("La", "RGBa") convert only to their plain counterpart.
        plain = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
        rgba = plain.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing of the orientation; the pixels are sound
        return 1


def _scaled_to_bytes(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point pixels outside 0 to 1")
        return Image.fromarray(np.rint(values * 255.0).astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels beyond 16 bits")
    return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))


def open_source(settings: Mapping[str, Any], split: str, skip: Collection[str] = ()) -> ImageSource:
    """The images of `split` ("train" or "test") of the dataset that `settings` describe.

    Where the dataset has one part only (digits, a single folder of classes), `test_fraction` of
    every class is drawn for the test set. With `validation_fraction` > 0, "train" is the training
    set less a drawn part and "test" is that part: the test set is not touched. What is drawn
    depends on `seed` and on the images' names alone: a damaged or skipped image moves no other, an
    added one at most the one at the border. A drawn part takes at least one image of a class and
    leaves at least one; a class with a single image stays in "train" and is absent from "test".

    `skip` holds names to leave out, as `describe` lists them. Raises `UserError` if the data are not
    there, contradict `classes`, or leave a class without an image in any other way.
    """
    if split not in ("train", "test"):
        raise UserError(f"split: {split!r} is not one of train, test")
    validation = _fraction(settings, "validation_fraction", 0.0)
    if validation:
        whole, _ = _open_published(settings, "train")
        source, pool = _draw(whole, split, validation, settings, "validation")
    else:
        source, pool = _open_published(settings, split)
    kept = source
    if skip:
        left_out = set(skip)
        kept = source.subset(np.flatnonzero([name not in left_out for name in source.names]))
    _check_every_class(kept, split, pool, source)
    return kept


def open_described(description: Mapping[str, Any], split: str, file: str) -> ImageSource:
    """The images of `split` that `description`, which lies in `file`, tells of.

    Raises `UserError` if the files have changed since.
    """
    settings = description["header"]["settings"]
    source = open_source(settings, split, [entry["file"] for entry in description["unreadable"]])
    # What `accept_code` keeps may be older than the listing.
    if source.listing != description[split].get("listing", source.listing):
        raise UserError(
            f"root: {settings['root']} has changed since {file} was written; run snakemake again with "
            f"`-R {file}`, which makes anew all that depends on these images"
        )
    return source


def _check_every_class(
    source: ImageSource, split: str, pool: np.ndarray | None, unskipped: ImageSource
) -> None:
    """`pool`: images per class that "test" was drawn from; None where the split is given."""
    absent = source.per_class() == 0
    if split == "test" and pool is not None:
        absent &= pool > 1
    names = [source.classes[c] for c in np.flatnonzero(absent)]
    if names or not len(source):
        broken = [unskipped.names[i] for i in np.flatnonzero(absent[unskipped.labels])]
        # A skipped image keeps its place in the draw, so that no other moves; a deleted one has none.
        helps = f"delete {some(broken)}, " if broken and pool is not None else ""
        raise UserError(
            f"no readable {split} image of {'class ' + some(names) if names else 'any class'}; "
            f"{helps}add images or remove the class"
        )


def _open_published(settings: Mapping[str, Any], split: str) -> tuple[ImageSource, np.ndarray | None]:
    """The split as published, and the pool if it had to be drawn (see `_check_every_class`)."""
    source = source_name(settings)
    if source in ("cifar10", "cifar100"):
        return _open_cifar(settings, split), None
    if source == "digits":
        whole = _open_digits(settings)
    else:
        if source == "imagenette" and settings.get("download"):
            _fetch_imagenette(settings)
        layout = find_layout(settings)
        whole = _open_files(layout, source, split)
        if layout.test is not None:
            return whole, None
    fraction = _fraction(settings, "test_fraction", DEFAULT_TEST_FRACTION)
    if not fraction:
        raise UserError("test_fraction: 0 leaves no test images; give a number between 0 and 1")
    return _draw(whole, split, fraction, settings, "test")


def _fraction(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UserError(f"{key}: {value!r} is not a number from 0 to below 1")
    return float(value)


def _draw(
    whole: ImageSource, split: str, fraction: float, settings: Mapping[str, Any], purpose: str
) -> tuple[ImageSource, np.ndarray]:
    """Draw `fraction` of every class of `whole` as "test"; the rest is "train"."""
    seed = settings.get("seed", 0)
    ranks = np.array(
        [derive_seed(seed, settings["source"], purpose, name) for name in whole.names], dtype=np.int64
    )
    drawn = np.zeros(len(whole), dtype=bool)
    pool = whole.per_class()
    for size, end in zip(pool, np.cumsum(pool), strict=True):  # labels ascend: a class is one stretch
        first = end - size
        drawn[first + np.argsort(ranks[first:end], kind="stable")[: drawn_size(size, fraction)]] = True
    return whole.subset(np.flatnonzero(drawn == (split == "test"))), pool


def drawn_size(images: int, fraction: float) -> int:
    """How many of a class's `images` are drawn: at least one, and at least one is left.

    >>> drawn_size(10, 0.2), drawn_size(2, 0.1), drawn_size(2, 0.9), drawn_size(1, 0.5)
    (2, 1, 1, 0)
    """
    return min(max(round(fraction * images), 1), images - 1) if images else 0


def _open_files(layout: FolderLayout, source: str, split: str) -> FileSource:
    files = list_images(layout, split)
    return FileSource(
        classes=layout.classes,
        titles=class_titles(layout, source),
        labels=np.repeat(np.arange(len(files)), [len(found) for found in files]),
        names=PackedNames(name for found in files for name in found),
        root=layout.root,
        listing=_listing(layout.root, files),
    )


def _listing(root: Path, files: Iterable[Iterable[str]]) -> str:
    """A digest of the files' names and sizes; not of their times, which a copy of the data need not keep."""
    found = hashlib.sha256()
    for name in chain.from_iterable(files):
        try:
            size = os.stat(f"{root}/{name}").st_size
        except OSError:  # a link to nowhere, say: reading it tells more
            size = -1
        found.update(f"{name}\0{size}\0".encode())
    return found.hexdigest()[:16]


def _open_digits(settings: Mapping[str, Any]) -> ArraySource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    classes = tuple(str(name) for name in digits.target_names)
    check_class_count(settings, len(classes), "source digits")
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _array_source(classes, pixels, digits.target, "digits")


def _open_cifar(settings: Mapping[str, Any], split: str) -> ArraySource:
    """CIFAR through torchvision, which compares checksums before it unpickles.

    So only the published files are ever unpickled; an unpacked archive, or the archive itself
    with `download: true`, may lie under `root` beforehand.
    """
    source = source_name(settings)
    root = _download_root(settings)  # before the slow import: its errors are the frequent ones
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
    check_class_count(settings, {"cifar10": 10, "cifar100": 100}[source], f"source {source}")
    if root.name == dataset.base_folder:
        root = root.parent
    folder = root / dataset.base_folder
    download = bool(settings.get("download"))
    try:
        try:
            data = dataset(root, train=split == "train")
        except RuntimeError:
            if not download:
                raise
            with _one_download(root):
                data = dataset(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        if download:
            raise UserError(_no_download(source, dataset.url, root, error)) from error
        state = "differs from the published files (checksum)" if folder.exists() else "does not exist"
        raise UserError(
            f"{folder} {state}; unpack {dataset.filename} from {dataset.url} under `root`, or set "
            "`download: true`; for images of your own use source: imagefolder"
        ) from error
    check_class_count(settings, len(data.classes), str(folder))
    return _array_source(tuple(data.classes), data.data, np.asarray(data.targets), split)


def _array_source(
    classes: tuple[str, ...], pixels: np.ndarray, targets: np.ndarray, prefix: str
) -> ArraySource:
    order = np.argsort(targets, kind="stable")
    return ArraySource(
        classes=classes,
        titles=classes,
        labels=targets[order].astype(np.int64),
        names=PackedNames(f"{prefix}/{i}" for i in order),
        pixels=pixels[order],
    )


def _download_root(settings: Mapping[str, Any]) -> Path:
    """`root`, which a download may create."""
    if settings.get("download") and settings.get("root"):
        return Path(os.path.expanduser(settings["root"]))
    return root_folder(settings)


@contextmanager
def _one_download(root: Path) -> Iterator[None]:
    """Datasets that share `root` download one after the other: the second finds what the first brought."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / ".download.lock"
    while True:
        with open(path, "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            if not still_there(path, file):
                continue  # its holder has removed it meanwhile: the next to come lock a new file
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _no_download(source: str, url: str, root: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"download of {source} to {root} failed ({reason}); fetch {url} by other means and unpack it there"


def _fetch_imagenette(settings: Mapping[str, Any]) -> None:
    """Download Imagenette (the full-size archive) if asked to and not there.

    It is unpacked out of sight and moved into place, so that half an archive is never taken for all.
    """
    root = _download_root(settings)

    def there() -> bool:
        return any(path.is_dir() for path in (root / "train", *root.glob("imagenette2*/train")))

    if there():
        return
    from torchvision.datasets import Imagenette

    partial = root / ".download"
    try:
        with _one_download(root):
            if there():
                return
            partial.mkdir(exist_ok=True)
            shutil.rmtree(partial / "imagenette2", ignore_errors=True)
            Imagenette(partial, split="train", size="full", download=True)
            os.replace(partial / "imagenette2", root / "imagenette2")
            shutil.rmtree(partial)
    except (OSError, RuntimeError) as error:
        raise UserError(_no_download("imagenette", IMAGENETTE_URL, root, error)) from error
