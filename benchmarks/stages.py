"""The stages as work for two sides, `ours` and `plain`, from equal inputs.

A stage is a function (side, device, folder, **sizes) → `Work`. What both sides read is made here, outside
the timed part, from fixed seeds; `folder` holds image files and takes what a side writes. PyTorch is imported
where it is needed: the barycenter's memory is to be measured without it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NORMALISATION = ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
NO_VIEWS = {"crop_scale_min": 1.0, "flip": False}
VIEWS = {"crop_scale_min": 0.08, "flip": True}
TEACHER_BATCH = 100


@dataclass(frozen=True)
class Work:
    """`check()` gives named arrays that must agree between the sides; `run()` is what is timed.

    `run` returns figures to print beside the time. Views are drawn differently by the two sides, so where a
    stage has views, `check` does the same work on whole, unmixed images.
    """

    check: Callable[[], dict[str, np.ndarray]]
    run: Callable[[], dict[str, float]]


def write_images(folder: Path, count: int, classes: int, resolution: int, suffix: str = ".jpg") -> list[str]:
    """Write `count` smooth random images, sorted by class, unless they are there; the files."""
    from PIL import Image

    generator, files = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        file = folder / f"{i * classes // count:03}_{i:06}{suffix}"
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution, resolution), Image.Resampling.BICUBIC).save(file)
        files.append(str(file))
    return files


def listed_images(folder: str, count: int) -> tuple[list[str], list[int]]:
    """The first images of each class of an image folder, `count` in all: files and labels."""
    classes = sorted(p for p in Path(folder).iterdir() if p.is_dir())
    files, labels = [], []
    for c, path in enumerate(classes):
        chosen = sorted(p for p in path.iterdir() if p.is_file())[: count // len(classes)]
        files += map(str, chosen)
        labels += [c] * len(chosen)
    if len(files) != count:
        raise SystemExit(f"error: {folder} has {len(files)} of {count} images; give a smaller --count")
    return files, labels


def normalisation():
    """Channel means and deviations, (3,) each."""
    import torch

    return tuple(torch.tensor(v) for v in NORMALISATION)


def teacher(architecture: str, classes: int, resolution: int, side: str, device: str):
    """A frozen random network whose BatchNorm has seen a batch; contiguous for `plain`."""
    import torch

    from wmdd_core.models import batchnorm_layers, build_model, freeze

    model = build_model(architecture, classes, resolution, seed=0)
    for layer in batchnorm_layers(model).values():
        layer.momentum = None  # the running statistics are those of the batch
    batch = torch.randn(16, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(batch)
    return freeze(placed(model, side, device))


def placed(model, side: str, device: str):
    """The network on its device; contiguous, with PyTorch's own convolutions for `plain`."""
    import torch

    from wmdd_core.convolution import Conv2d

    if side == "plain":
        model = model.to(memory_format=torch.contiguous_format)
        for module in model.modules():
            if isinstance(module, Conv2d):
                module.__class__ = torch.nn.Conv2d
    return model.to(device)


def autocast(device: str, bfloat16: bool):
    """bfloat16 where it is asked for, else float32."""
    from contextlib import nullcontext

    import torch

    return torch.autocast(device, torch.bfloat16) if bfloat16 else nullcontext()


# ---- features -----------------------------------------------------------------------------------


def features(
    side: str,
    device: str,
    folder: Path,
    *,
    architecture: str,
    resolution: int,
    images: int,
    classes: int,
    root: str | None = None,
) -> Work:
    """Embed images kept as files and measure per-class BatchNorm statistics."""
    import torch

    mean, std = normalisation()
    if root:
        files, labels = listed_images(root, images)
        classes = labels[-1] + 1
    else:
        files = write_images(folder / "images", images, classes, resolution)
        labels = [i * classes // images for i in range(images)]
    model = teacher(architecture, classes, resolution, side, device)

    def ours() -> dict[str, np.ndarray]:
        from wmdd_core.data import ImageStore
        from wmdd_core.features import extract_features
        from wmdd_core.sources import FileSource
        from workflow_scripts.real_images import in_order

        names = tuple(str(c) for c in range(classes))
        source = FileSource(names, names, np.array(labels), files, Path("/"))
        store = ImageStore.from_source(source, resolution)
        description = {"mean": mean.tolist(), "std": std.tolist()}
        found = np.empty((len(store), model.classifier.in_features), np.float32)

        def batches(start: int):
            return in_order(store, description, torch.device(device), start)

        statistics = extract_features(model, batches, found, classes).statistics().values()
        layers = {f"layer{i}": torch.cat([s.mean, s.var], 1).numpy() for i, s in enumerate(statistics)}
        return {"features": found, **layers}

    def plain() -> dict[str, np.ndarray]:
        from benchmarks.plain import Files, features_and_statistics

        data = Files(files, labels, mean, std)
        found, statistics = features_and_statistics(model, data, TEACHER_BATCH, torch.device(device))
        layers = {f"layer{i}": torch.cat(s, 1).numpy() for i, s in enumerate(statistics)}
        return {"features": found, **layers}

    call = {"ours": ours, "plain": plain}[side]

    def run() -> dict[str, float]:
        call()
        return {}

    return Work(call, run)


# ---- barycenter ---------------------------------------------------------------------------------


def class_features(count: int, dimension: int) -> np.ndarray:
    """Points (count, dimension) as a network's last layer gives them: clusters, rectified, float64."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((8, dimension))
    basis = generator.standard_normal((32, dimension)) / 4
    points = centres[generator.integers(8, size=count)] + generator.standard_normal((count, 32)) @ basis
    return np.maximum(points + 0.3 * generator.standard_normal((count, dimension)), 0)


def w2_squared(points: np.ndarray, support: np.ndarray, weights: np.ndarray) -> float:
    """W₂² between uniform points and a weighted support, by exact transport."""
    from wmdd_core.transport import solve_transport, squared_cost

    uniform = np.full(len(points), 1 / len(points))
    return solve_transport(weights, uniform, squared_cost(support, points)).value


def barycenter(side: str, device: str, folder: Path, *, points: int, dimension: int, atoms: int) -> Work:
    """A class's barycenter as the workflow computes it, beside ten k-means runs of scikit-learn.

    `check` gives W₂² of ours; of k-means (its clusters' shares as weights) and of POT's free support.
    """
    data = class_features(points, dimension)

    def ours() -> dict[str, np.ndarray]:
        from wmdd_core.barycenter import wasserstein_barycenter

        found = wasserstein_barycenter(data, atoms, generator=np.random.default_rng(0))
        return {"w2_squared": np.array(w2_squared(data, found.support, found.weights))}

    def plain() -> dict[str, np.ndarray]:
        from sklearn.cluster import KMeans

        fitted = KMeans(atoms, n_init=10, random_state=0).fit(data)
        shares = np.bincount(fitted.labels_, minlength=atoms) / points
        return {"w2_squared": np.array(w2_squared(data, fitted.cluster_centers_, shares))}

    def free_support() -> np.ndarray:
        import ot

        start = np.random.default_rng(0).standard_normal((atoms, dimension))
        uniform = np.full(points, 1 / points)
        found = ot.lp.free_support_barycenter([data], [uniform], start, numItermax=100)
        return np.array(w2_squared(data, found, np.full(atoms, 1 / atoms)))

    if side == "ours":
        return Work(ours, lambda: {"w2_squared": float(ours()["w2_squared"])})
    return Work(
        lambda: {**plain(), "free_support": free_support()},
        lambda: {"w2_squared": float(plain()["w2_squared"])},
    )


# ---- recover ------------------------------------------------------------------------------------


def recover(
    side: str,
    device: str,
    folder: Path,
    *,
    architecture: str,
    resolution: int,
    classes: int,
    ipc: int,
    iterations: int,
    bfloat16: bool = False,
) -> Work:
    """Iterations of Eq. 15 on `classes` × `ipc` images; the plain side is float32 either way.

    `check` does one iteration: later ones start from images that rounding has moved apart.
    """
    import torch

    from wmdd_core.batchnorm import StatisticsAccumulator, record_input_moments
    from wmdd_core.recovery import RecoverySettings, Shard, recover_images

    mean, std = normalisation()
    model = teacher(architecture, classes, resolution, side, device)
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(2 * classes, 3, resolution, resolution, generator=generator)
    initial = torch.randn(classes * ipc, 3, resolution, resolution, generator=generator)
    accumulator, own = StatisticsAccumulator(classes), torch.arange(classes)
    with torch.no_grad(), record_input_moments(model) as moments:
        embedded = [model.features(part.to(device)).cpu() for part in real.split(classes)]
        for part in real.split(classes):
            model.features(part.to(device))
            accumulator.add(moments, own)
    statistics = accumulator.statistics()
    group = own.repeat_interleave(ipc)
    atoms = embedded[0][group]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def ours(views: dict, iterations: int) -> tuple:
        shard = Shard(
            own,
            group,
            torch.arange(ipc).repeat(classes),
            torch.full((classes * ipc,), 1 / ipc),
            statistics,
            atoms,
        )
        settings = RecoverySettings(iterations=iterations, learning_rate=0.1, lambda_bn=10, **views)
        found = recover_images(
            model,
            shard,
            settings,
            resolution=resolution,
            mean=mean,
            std=std,
            seed_names=("benchmark",),
            device=torch.device(device),
            initial=initial,
            precision=autocast(device, bfloat16),
        )
        terms = [found.losses[name].double().sum(1) for name in ("feature_loss", "bn_loss")]
        return found.images, torch.stack(terms, 1)

    def plain(views: dict, iterations: int) -> tuple:
        from benchmarks.plain import recover as plain_recover

        targets = [(s.mean.float().to(device), s.var.float().to(device)) for s in statistics.values()]
        images, losses = plain_recover(
            model,
            initial.to(device),
            atoms.to(device),
            targets,
            mean,
            std,
            iterations=iterations,
            learning_rate=0.1,
            lambda_bn=10,
            **views,
        )
        return images.cpu(), torch.tensor(losses)

    call = {"ours": ours, "plain": plain}[side]

    def check() -> dict[str, np.ndarray]:
        images, losses = call({**NO_VIEWS, "roll": 0}, 1)
        return {"movement": (images - initial).numpy(), "losses": losses.numpy()}

    def run() -> dict[str, float]:
        start = time.perf_counter()
        call({**VIEWS, "roll": resolution // 7}, iterations)  # ends with the images on the CPU
        return {"image-iterations a second": classes * ipc * iterations / (time.perf_counter() - start)}

    return Work(check, run)


# ---- relabel ------------------------------------------------------------------------------------


def distilled(folder: Path, count: int, resolution: int) -> tuple[list[str], np.ndarray]:
    """A distilled set as PNG files, and their pixels, uint8 (count, 3, R, R)."""
    from PIL import Image

    files = write_images(folder / "distilled", count, 10, resolution, ".png")
    pixels = np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files])
    return files, pixels


def emptied(folder: Path) -> Path:
    """The folder, without what an earlier repeat wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def fixed_order(count: int, batch_size: int) -> Callable[[int], Sequence]:
    """Batches of image numbers for each epoch, the same on both sides."""
    from wmdd_core.relabeling import shuffled

    return lambda epoch: shuffled(count, batch_size, ("benchmark",), epoch)


def plain_labels(
    model, files: list[str], folder: Path, resolution: int, device: str, epochs: int, views: dict
) -> Path:
    """The folder with the reference's labels of every image in each epoch."""
    import torch

    from benchmarks.plain import relabel as plain_relabel

    order, (mean, std) = fixed_order(len(files), TEACHER_BATCH), normalisation()
    target = torch.device(device)
    plain_relabel(model, files, emptied(folder), order, resolution, mean, std, target, epochs=epochs, **views)
    return folder


def relabel(
    side: str,
    device: str,
    folder: Path,
    *,
    architecture: str,
    resolution: int,
    images: int,
    epochs: int,
    bfloat16: bool = False,
) -> Work:
    """The teacher's logits on a view of each image in each epoch."""
    import torch

    mean, std = normalisation()
    files, pixels = distilled(folder, images, resolution)
    model = teacher(architecture, 10, resolution, side, device)
    written = folder / side

    def ours(views: dict, epochs: int) -> None:
        from wmdd_core.device import images_per_pass
        from wmdd_core.relabeling import ViewSettings, label_views

        shape = (epochs, images, 10)
        labels = np.lib.format.open_memmap(emptied(written) / "labels.npy", "w+", np.float16, shape)
        label_views(
            model,
            torch.from_numpy(pixels).to(device),
            ViewSettings(seed=0, **views),
            mean,
            std,
            labels,
            batch_size=images_per_pass(torch.device(device)),
            precision=autocast(device, bfloat16),
        )
        labels.flush()

    def plain(views: dict, epochs: int) -> None:
        plain_labels(model, files, written, resolution, device, epochs, views)

    def check() -> dict[str, np.ndarray]:
        views, compared = {**NO_VIEWS, "cutmix": False}, min(epochs, 3)  # without views, epochs are alike
        if side == "ours":
            ours(views, compared)
            return {"logits": np.load(written / "labels.npy").astype(np.float32)}
        plain(views, compared)
        found = np.empty((compared, images, 10), np.float32)
        for path in written.rglob("*.pt"):
            chosen, *_, logits = torch.load(path, weights_only=False)
            found[int(path.parent.name.removeprefix("epoch_")), chosen] = logits.float()
        return {"logits": found}

    def run() -> dict[str, float]:
        {"ours": ours, "plain": plain}[side]({**VIEWS, "cutmix": True}, epochs)
        sizes = [p.stat().st_size for p in written.rglob("*") if p.is_file()]
        return {"files": len(sizes), "bytes": sum(sizes)}

    return Work(check, run)


# ---- evaluate -----------------------------------------------------------------------------------


def evaluate(
    side: str,
    device: str,
    folder: Path,
    *,
    architecture: str,
    resolution: int,
    images: int,
    epochs: int,
    test: int,
    bfloat16: bool = False,
) -> Work:
    """Train a student on soft labels and test it: ours once at the end, plain after every tenth epoch."""
    import torch

    from benchmarks.plain import Files, epochs_tested
    from benchmarks.plain import evaluate as plain_evaluate
    from wmdd_core.models import build_model
    from wmdd_core.relabeling import ViewSettings, label_views, soft_label_batches, soft_label_loss
    from wmdd_core.training import Schedule, fit, test_batches

    mean, std = normalisation()
    files, pixels = distilled(folder, images, resolution)
    test_files = write_images(folder / "test", test, 10, resolution, ".png")
    shown = torch.from_numpy(pixels).to(device)
    labeller = teacher("convnet", 10, resolution, side, device)  # whose labels they are makes no difference
    whole, mixed = {**NO_VIEWS, "cutmix": False}, {**VIEWS, "cutmix": True}
    compared = min(epochs, 10)  # over hundreds, rounding would grow into other students

    def prepare(views: dict, epochs: int) -> Path | np.ndarray:
        """The labels, as each side keeps them."""
        if side == "ours":
            labels = np.empty((epochs, images, 10), np.float16)
            label_views(labeller, shown, ViewSettings(seed=0, **views), mean, std, labels)
            return labels
        kept = folder / f"labels-{views['cutmix']}"
        return plain_labels(labeller, files, kept, resolution, device, epochs, views)

    labels = {False: prepare(whole, compared), True: prepare(mixed, epochs)}

    def ours(views: dict, epochs: int) -> tuple:
        schedule = Schedule(epochs, "adamw", 1e-3, weight_decay=0.01, decay_matrices_only=True)
        student = build_model(architecture, 10, resolution, seed=1).to(device)
        batches = soft_label_batches(
            shown,
            torch.ones(images),
            labels[views["cutmix"]],
            ViewSettings(seed=0, **views),
            TEACHER_BATCH,
            mean,
            std,
            ("benchmark",),
        )
        precision = autocast(device, bfloat16)
        curve = fit(student, schedule, batches, soft_label_loss(20), precision=precision)
        start = time.perf_counter()
        student.eval()
        with torch.no_grad(), precision:
            pairs = test_batches(read(test_files), torch.zeros(test), mean, std, torch.device(device))
            logits = torch.cat([student(part).float().cpu() for part, _ in pairs])
        return logits, curve.train_loss, time.perf_counter() - start

    def plain(views: dict, epochs: int) -> tuple:
        student = placed(build_model(architecture, 10, resolution, seed=1), side, device)
        tested = Files(test_files, [0] * test, mean, std)
        return plain_evaluate(
            student,
            files,
            labels[views["cutmix"]],
            tested,
            resolution,
            mean,
            std,
            torch.device(device),
            epochs=epochs,
            learning_rate=1e-3,
            weight_decay=0.01,
            temperature=20,
        )

    def read(paths: list[str]):
        from wmdd_core.data import ImageStore
        from wmdd_core.sources import FileSource

        source = FileSource(("0",), ("0",), np.zeros(len(paths), np.int64), paths, Path("/"))
        return ImageStore.from_source(source, resolution).read(slice(None))

    call = {"ours": ours, "plain": plain}[side]

    def check() -> dict[str, np.ndarray]:
        logits, curve, _ = call(whole, compared)
        return {"logits": logits.numpy(), "losses": np.array(curve)}

    def run() -> dict[str, float]:
        start = time.perf_counter()
        *_, testing = call(mixed, epochs)
        training = time.perf_counter() - start - testing
        tested = test * {"ours": 1, "plain": len(epochs_tested(epochs))}[side]
        return {"seconds an epoch": training / epochs, "seconds a test image": testing / tested}

    return Work(check, run)
