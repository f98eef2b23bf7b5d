"""Images of a dataset as uint8 arrays: checked and described, decoded, stored, read in batches."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wmdd_core.artifacts import read_array, replacing
from wmdd_core.errors import UserError
from wmdd_core.layouts import class_folders, compare_names, image_files, other_files
from wmdd_core.sources import FileSource, ImageSource, PackedNames, UnreadableImage, open_source, to_rgb

if TYPE_CHECKING:
    import torch

_CHUNK = 64


def centre_view(image: Image.Image, resolution: int, resize: int | None = None) -> np.ndarray:
    """The centre of `image` as uint8 (3, resolution, resolution).

    The shorter side is resized to `resize` (bilinear, antialiased), then the centre is cut out.
    `resize` defaults to the resolution up to 64 pixels and to 256/224 of it above. Equal to
    torchvision's Resize and CenterCrop on a PIL image, bit for bit.
    """
    if resize is None:
        resize = resolution if resolution <= 64 else round(resolution * 256 / 224)
    if resize < resolution:
        raise UserError(f"resize: {resize} is below the resolution {resolution}; give at least {resolution}")
    image = to_rgb(image)
    short, long = sorted(image.size)
    longer = int(resize * long / short)
    width, height = (resize, longer) if image.width <= image.height else (longer, resize)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


_worker_source: ImageSource


def _adopt(source: ImageSource) -> None:
    """Keep `source` in a worker process, so that it travels once rather than with every chunk."""
    global _worker_source
    _worker_source = source


def _work(task: Callable[[ImageSource, np.ndarray], Any], indices: np.ndarray) -> Any:
    return task(_worker_source, indices)


def _map_chunks(
    task: Callable[[ImageSource, np.ndarray], Any], source: ImageSource, indices: np.ndarray, workers: int
) -> Iterator[Any]:
    """`task(source, chunk)` for successive chunks of `indices`, in order; few results wait at a time."""
    chunks = (indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK))
    if workers <= 1 or len(indices) <= _CHUNK:
        yield from (task(source, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, initializer=_adopt, initargs=(source,)) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, task, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def describe(settings: Mapping[str, Any], workers: int = 1) -> dict[str, Any]:
    """Read every image of both splits and say what the dataset is, ready for JSON.

    source, classes (in label order), titles, resolution; train and test: count, per_class and the
    source's listing, by which later jobs notice that the images are others; mean and std: per
    channel, in units of [0, 1], of the training images in `centre_view`, summed exactly (std over
    all pixels, without Bessel's correction) unless `settings` give them; sizes: [height, width] of
    all images upright, each of the two taken for itself (the median is the lower one); unreadable:
    file and reason; warnings: lines for the report.

    Raises `UserError` for a single class, for unreadable images unless `on_unreadable: skip`, for a
    class without a training image, and for one without a test image (see `open_source` for the exception).
    """
    resolution = settings["resolution"]
    if settings.get("on_unreadable", "stop") not in ("stop", "skip"):
        raise UserError(f"on_unreadable: {settings['on_unreadable']!r} is not one of stop, skip")
    mean, std = _given(settings, "mean", 0.0), _given(settings, "std", 1e-6)
    splits = {split: open_source(settings, split) for split in ("train", "test")}
    classes = splits["train"].classes
    if len(classes) < 2:
        raise UserError(
            f"root: {settings['root']} holds one class, {classes[0]}; at least two classes are needed"
        )
    total = sum(map(len, splits.values()))
    sums, sizes, unreadable = np.zeros((2, 3), dtype=np.int64), [], []
    for split, source in splits.items():
        measured = resolution if split == "train" and (mean is None or std is None) else None
        for part_sums, part_sizes, part_unreadable in _map_chunks(
            partial(_measure, measured), source, np.arange(len(source)), workers
        ):
            sums += part_sums
            sizes.append(part_sizes)
            unreadable += part_unreadable
    if unreadable:
        if settings.get("on_unreadable", "stop") == "stop":
            raise UserError(_stop_message(unreadable, total))
        skip = {entry["file"] for entry in unreadable}
        splits = {split: open_source(settings, split, skip) for split in splits}
    train, test = splits["train"], splits["test"]
    measured_mean, measured_std = _mean_and_std(sums, len(train) * resolution**2, train.classes, mean, std)
    sizes = np.sort(np.concatenate(sizes), axis=0)
    return {
        "source": settings["source"],
        "classes": list(train.classes),
        "titles": list(train.titles),
        "resolution": resolution,
        "train": _counts(train),
        "test": _counts(test),
        "mean": measured_mean,
        "std": measured_std,
        "sizes": {
            "min": sizes[0].tolist(),
            "median": sizes[(len(sizes) - 1) // 2].tolist(),
            "max": sizes[-1].tolist(),
        },
        "unreadable": unreadable,
        "warnings": _warnings(test, unreadable, total, other_files(settings)),
    }


def _counts(source: ImageSource) -> dict[str, Any]:
    return {"count": len(source), "per_class": source.per_class().tolist(), "listing": source.listing}


def _measure(
    resolution: int | None, source: ImageSource, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[dict[str, str]]]:
    """Sums and sums of squares (2, 3) of views of `resolution`, if any; sizes (n, 2); unreadable files."""
    sums, sizes, unreadable = np.zeros((2, 3), dtype=np.int64), [], []
    for i in indices:
        try:
            image = source.image(i)
        except UnreadableImage as error:
            unreadable.append({"file": error.file, "reason": error.reason})
            continue
        sizes.append((image.height, image.width))
        if resolution is not None:
            view = centre_view(image, resolution)
            sums[0] += view.sum(axis=(1, 2), dtype=np.int64)
            sums[1] += np.square(view, dtype=np.uint16).sum(axis=(1, 2), dtype=np.int64)  # 255² fits 16 bits
    return sums, np.array(sizes, dtype=np.int32).reshape(-1, 2), unreadable


def _given(settings: Mapping[str, Any], key: str, above: float) -> list[float] | None:
    """The optional settings `mean` and `std`: three numbers in [above, 1], one per channel."""
    values = settings.get(key)
    if values is None:
        return None
    numbers = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and above <= value <= 1 for value in values
    )
    if not numbers or len(values) != 3:
        raise UserError(
            f"{key}: {values!r} is not a list of three numbers from {above:g} to 1; correct or remove it"
        )
    return [float(value) for value in values]


def _mean_and_std(
    sums: np.ndarray, pixels: int, classes: Sequence[str], mean: list[float] | None, std: list[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and std in units of [0, 1] from integer sums over `pixels` values; given ones are kept."""
    first, second = ([int(value) for value in row] for row in sums)
    if mean is None:
        mean = [s / (pixels * 255) for s in first]
    if std is None:
        # Python's integers make the difference of two large numbers exact.
        std = [math.sqrt((pixels * q - s * s) / pixels**2) / 255 for s, q in zip(first, second, strict=True)]
        if min(std) == 0:
            raise UserError(
                "std: a colour channel has one and the same value in all training images, so nothing can be "
                "normalised by it; check the images, or give `std` in the settings"
            )
    return mean, std


def _stop_message(unreadable: Sequence[Mapping[str, str]], total: int) -> str:
    first = ", ".join(f"{entry['file']} ({entry['reason']})" for entry in unreadable[:5])
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return (
        f"{len(unreadable)} of {total} images cannot be read: {first}{more}; replace or remove them, "
        "or set `on_unreadable: skip`"
    )


def _warnings(
    test: ImageSource, unreadable: Sequence[Mapping[str, str]], total: int, others: Counter[str]
) -> list[str]:
    untested = [test.classes[c] for c in np.flatnonzero(test.per_class() == 0)]
    warnings = [
        f"class {name} has one image, kept for training: its accuracy is not measured" for name in untested
    ]
    if unreadable:
        warnings.append(f"{len(unreadable)} of {total} images cannot be read and are left out")
    if others:
        # Escaped, as a suffix may hold what no JSON file can.
        counts = [f"{n} {ascii(s)[1:-1] or 'without a suffix'}" for s, n in others.most_common(10)]
        warnings.append(f"{others.total()} files of other formats are left out: {', '.join(counts)}")
    return warnings


def _views(resolution: int, resize: int | None, source: ImageSource, indices: np.ndarray) -> np.ndarray:
    return np.stack([centre_view(source.image(i), resolution, resize) for i in indices])


def decode(
    source: ImageSource,
    resolution: int,
    indices: Iterable[int] | None = None,
    workers: int = 1,
    resize: int | None = None,
) -> np.ndarray:
    """`centre_view` of the images at `indices` (all if None): uint8 (N, 3, resolution, resolution)."""
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    images = np.empty((len(indices), 3, resolution, resolution), dtype=np.uint8)
    done = 0
    for views in _map_chunks(partial(_views, resolution, resize), source, indices, workers):
        images[done : done + len(views)] = views
        done += len(views)
    return images


def decode_to(path: str | Path, source: ImageSource, resolution: int, workers: int = 1) -> None:
    """Write `decode(source, resolution)` to the .npy file `path`, a chunk at a time.

    The file appears under its name when it is complete. Raises `UserError` where it cannot be written.
    """
    shape = (len(source), 3, resolution, resolution)
    task = partial(_views, resolution, None)
    try:
        # Written rather than memory-mapped: a full disk is then an error, where a map's late page
        # would be the process's death by a signal.
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for views in _map_chunks(task, source, np.arange(len(source)), workers):
                file.write(views.tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); it needs {math.prod(shape) / 1e6:,.0f} MB in a "
            "folder that you may write to"
        ) from error


class ImageStore:
    """Images read in batches, from a memory-mapped array or decoded on demand; can be pickled.

    `labels`: (N,) int64, ascending.
    """

    def __init__(self, labels: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self._read = read

    @classmethod
    def from_array(cls, path: str | Path, labels: np.ndarray) -> ImageStore:
        """Images of the .npy file that `decode_to` wrote; only what is read comes into memory."""
        reader = _MappedReader(Path(path))
        shape, dtype = reader.array.shape, reader.array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != 3 or shape[0] != len(labels):
            raise UserError(
                f"{path} holds {dtype} {shape}, expected uint8 ({len(labels)}, 3, R, R); delete it to have "
                "it made again"
            )
        return cls(labels, reader)

    @classmethod
    def from_source(cls, source: ImageSource, resolution: int) -> ImageStore:
        """Images decoded from `source` each time they are read."""
        return cls(source.labels, partial(decode, source, resolution))

    def in_memory(self) -> ImageStore:
        """The same images, decoded once and held: for what reads them again and again."""
        return ImageStore(self.labels, self._read(np.arange(len(self))).__getitem__)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Iterable[int] | slice) -> torch.Tensor:
        """The images at `indices`: uint8 (B, 3, R, R), a copy."""
        import torch

        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        return torch.from_numpy(self._read(np.asarray(indices, dtype=np.int64)))

    __getitem__ = read


class _MappedReader:
    """Reads rows of a .npy file; pickles as its path, since a memory map would pickle as its content."""

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, read_array(path)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[indices])  # a list of rows is copied into memory

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


def read_image_folder(
    path: str | Path, classes: Sequence[str], resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A set made elsewhere: uint8 images (M, 3, resolution, resolution), int64 labels (M,), weights (M,).

    `path` is a folder with one folder per class named as in `classes`; or the layout of released
    WMDD and SRe2L sets, new000/class000_id000.jpg or class000_id000.jpg alone, numbered in the
    order of `classes`; or a .npz or .safetensors file with `images` (uint8, (M, 3, H, W) or
    (M, H, W, 3)), `labels` (integers) and perhaps `weights` (floating, above 0). Images of another
    size have their shorter side resized to the resolution and their centre cut out; those of the
    right size are kept as they are. What is returned is ordered by class, then as named or stored;
    its weights, float64, sum to 1 in each class.

    Raises `UserError` naming classes that are missing or surplus. Nothing is unpickled.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        files = _number_files(path, classes)
        source = FileSource(
            classes=tuple(classes),
            titles=tuple(classes),
            labels=np.array([label for label, _ in files], dtype=np.int64),
            names=PackedNames(name for _, name in files),
            root=path,
        )
        _check_classes(path, source.labels, classes)
        weights = _normalised(np.ones(len(source)), source.labels)
        return decode(source, resolution, resize=resolution), source.labels, weights
    images, labels, weights = _read_arrays(path)
    _check_classes(path, labels, classes)
    order = np.argsort(labels, kind="stable")
    images, labels, weights = images[order], labels[order], _normalised(weights, labels)[order]
    if images.shape[2:] != (resolution, resolution):
        views = [
            centre_view(Image.fromarray(image.transpose(1, 2, 0)), resolution, resolution) for image in images
        ]
        images = np.stack(views)
    return np.ascontiguousarray(images), labels, weights


def _normalised(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 in each class."""
    return weights / np.bincount(labels, weights)[labels]


def _number_files(path: Path, classes: Sequence[str]) -> list[tuple[int, str]]:
    """(label, name relative to `path`) of the images in a folder, sorted."""
    folders = class_folders(path)
    if not folders:
        return sorted((_released_number(path, name), name) for name in image_files(path))
    if all(re.fullmatch(r"new\d+", name) for name in folders) and not set(folders) <= set(classes):
        numbers = {name: int(name.removeprefix("new")) for name in folders}
    else:
        difference = compare_names(folders, classes)
        if difference:
            raise UserError(
                f"{path}: its folders are not the dataset's classes ({difference}); name them as the dataset "
                "does, or number them new000, new001, … in the order of its classes"
            )
        numbers = {name: c for c, name in enumerate(classes)}
    files = []
    for folder, number in numbers.items():
        for name in image_files(path / folder):
            if folder not in classes and _released_number(path / folder, name, number) != number:
                raise UserError(
                    f"{path / folder / name}: class in the file name is not {number}; move it or rename it"
                )
            files.append((number, f"{folder}/{name}"))
    return sorted(files)


def _released_number(folder: Path, name: str, default: int | None = None) -> int:
    """The class in class000_id000.jpg."""
    match = re.match(r"class(\d+)_id\d+\.", name)
    if match:
        return int(match[1])
    if default is None:
        raise UserError(
            f"{folder / name}: no class folder and not named as class000_id000.jpg; use one of the two"
        )
    return default


def _check_classes(path: Path, labels: np.ndarray, classes: Sequence[str]) -> None:
    present = set(labels.tolist())
    missing = [f"{c} ({name})" for c, name in enumerate(classes) if c not in present]
    surplus = [str(c) for c in sorted(present) if not 0 <= c < len(classes)]
    difference = compare_names(surplus, missing)
    if difference:
        raise UserError(
            f"{path}: its images do not cover the dataset's {len(classes)} classes exactly ({difference}); "
            "every class needs at least one image"
        )


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`images` (M, 3, H, W) uint8, `labels` (M,) int64, `weights` (M,) of a file that needs no unpickling."""
    if path.suffix not in (".npz", ".safetensors"):
        what = "is neither a folder nor a .npz or .safetensors file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}; give a folder of images per class, or arrays in one of these formats"
        )
    try:
        arrays = _load_npz(path) if path.suffix == ".npz" else _load_safetensors(path)
        images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise UserError(f"{path} lacks an array ({error}); it needs `images` and `labels`") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({error}); write plain arrays (pickled objects are never loaded)"
        ) from error
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or 3 not in (images.shape[1], images.shape[3])
        or not images.size
    ):
        raise UserError(
            f"{path}: images are {images.dtype} {images.shape}; give uint8 from 0 to 255, (M, 3, R, R) or "
            "(M, R, R, 3)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: labels are {labels.dtype} {labels.shape}; give one integer per image, ({len(images)},)"
        )
    weights = arrays.get("weights", np.ones(len(labels)))
    if weights.shape != labels.shape or not np.issubdtype(weights.dtype, np.floating):
        raise UserError(
            f"{path}: weights are {weights.dtype} {weights.shape}; give one floating number per image"
        )
    if not (weights > 0).all() or not np.isfinite(weights).all():
        raise UserError(f"{path}: its weights are not all finite and above 0; correct or remove them")
    if images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    return images, labels.astype(np.int64), weights.astype(np.float64)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("images", "labels", "weights") if name in arrays}


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
