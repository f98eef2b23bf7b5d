"""What a user's machine does to a run: kills, full and read-only disks, odd and broken images."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fingerprint, run_snakemake, start_snakemake
from PIL import Image

from wmdd_core.artifacts import read_tensors
from wmdd_core.progress import Progress

pytestmark = pytest.mark.workflow


# ---- kills -----------------------------------------------------------------------------------


def finished_jobs(directory: Path) -> int:
    return len(list((directory / "results/smoke/benchmarks").rglob("*.tsv")))


def saved_since(directory: Path, start: float, rule: str = "") -> bool:
    """Whether a job, of this rule or of any, has saved a checkpoint since `start` and is not done."""
    for path in (directory / "results/smoke/checkpoints" / rule).rglob("*.pt"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > start:
                return True
    return False


def stop_run(
    directory: Path, cores: int, reached: Callable[[], bool], delay: float, by: signal.Signals, *targets: str
) -> None:
    """Start the smoke workflow and send `by` to all of it, `delay` seconds after `reached()` first holds.

    It is halted before, and goes on if `reached()` holds no longer: a job may have ended in the meantime.
    """
    # Checkpoints are saved after every step.
    process = start_snakemake(directory, "--cores", str(cores), *targets, WMDD_SAVE_EVERY="0")
    deadline = time.monotonic() + 300
    while True:
        while not reached():
            assert process.poll() is None, "the run has ended"
            assert time.monotonic() < deadline, "no progress in five minutes"
            time.sleep(0.02)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.02)  # until every process has halted
        if reached():
            break
        os.killpg(process.pid, signal.SIGCONT)
        delay = 0
    os.killpg(process.pid, by)
    os.killpg(process.pid, signal.SIGCONT)  # what is halted does not heed Ctrl-C
    told = process.communicate(timeout=120)[1].decode()
    assert process.returncode == (-by if by == signal.SIGKILL else 1), told


EVALUATIONS = [
    f"results/smoke/digits/evaluation/wmdd/random/ipc{ipc}/convnet/seed{seed}.json"
    for ipc in (1, 2)
    for seed in (0, 1)
]

AWAITED = {1: ("evaluate_student", *EVALUATIONS), 3: ("recover_images",)}
"""Kill → the rule whose checkpoint it waits for, of those that cannot all be done by then, and targets."""


def test_ten_kills_and_ctrl_c_change_no_byte_on_one_core_or_two(smoke, tmp_path):
    """SIGKILL to Snakemake and all of its jobs, as a power cut does; then `--unlock`, as Snakemake says.

    Every other kill comes soon after a checkpoint, as most of a small job's time passes before its first; so
    soon that the job, which lasts a tenth of a second from then on, is still at work on a fast machine.
    Ctrl-C comes last and needs no `--unlock`. Runs take turns on one core and on two.
    """
    generator, resumed = random.Random(0), set()
    for kill in range(11):
        start, before = time.time(), finished_jobs(tmp_path)
        wanted, share = before + generator.randint(0, 4), generator.random()
        by = signal.SIGKILL if kill < 10 else signal.SIGINT
        if kill % 2:
            rule, *targets = AWAITED.get(kill, ("",))
            saved = functools.partial(saved_since, tmp_path, start, rule)
            stop_run(tmp_path, 2, saved, 0.02 * share, by, *targets)
        else:
            stop_run(tmp_path, 1, lambda wanted=wanted: finished_jobs(tmp_path) >= wanted, 3 * share, by)
        print(f"kill {kill}, {time.time() - start:.2f} s: {finished_jobs(tmp_path) - before} jobs had ended")
        if by == signal.SIGKILL:
            unlocked = run_snakemake(tmp_path, "--unlock")
            assert unlocked.returncode == 0, unlocked.stderr
        resumed |= resumed_rules(tmp_path)
    done = run_snakemake(tmp_path, "--cores", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    resumed |= resumed_rules(tmp_path)
    print("went on from a checkpoint:", *sorted(resumed))
    assert resumed >= {rule for rule, *_ in AWAITED.values()}
    assert fingerprint(tmp_path) == fingerprint(smoke)
    left = [p for p in (tmp_path / "results").rglob("*") if p.name.endswith(".tmp")]
    assert not left, left


def resumed_rules(directory: Path) -> set[str]:
    """Rules with a job that went on from a checkpoint, by the logs."""
    logs = directory / "results/smoke/logs"
    return {
        log.relative_to(logs).parts[0]
        for log in logs.rglob("*.log")
        if "resuming after step" in log.read_text()
    }


# ---- disks and permissions ---------------------------------------------------------------------


def run_on_smoke(directory: Path, *arguments: str, overlay: str = "", **options):
    """Run Snakemake on the smoke preset with `overlay` laid over it."""
    (directory / "overlay.yaml").write_text(overlay or "{}", encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(directory / "overlay.yaml")]
    return run_snakemake(directory, "--cores", "2", *arguments, *files, preset="", **options)


def error_of(log: Path) -> str:
    """The one line of a log that says what the user can do, without a traceback beside it."""
    text = log.read_text(encoding="utf-8")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


@pytest.fixture
def small_disk(tmp_path):
    """A folder `results` of 200 kB below the working directory."""
    results = tmp_path / "results"
    results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(results)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(results)], check=True)


def test_a_full_disk_is_told_leaves_nothing_and_goes_on_when_there_is_room(small_disk):
    images = "results/smoke/digits/images/train.npy"  # 276 kB
    done = run_on_smoke(small_disk, images)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    told = error_of(small_disk / "results/smoke/logs/decode_images/digits/train.log")
    assert "train.npy cannot be written (No space left on device); it needs" in told
    assert list((small_disk / "results/smoke/digits").rglob("*.npy*")) == []
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk / "results")], check=True)
    done = run_on_smoke(small_disk, images)
    assert done.returncode == 0 and (small_disk / images).stat().st_size > 276_000


def test_an_array_that_the_disk_cannot_hold_is_refused_before_it_is_filled(small_disk):
    """A map whose pages the disk does not have would end the job by SIGBUS in the middle of its work."""
    path = small_disk / "results/labels.npy"
    with pytest.raises(OSError, match="No space left on device") as refused:
        Progress("labels", path.with_suffix(".pt")).array("float16", (1000, 200))
    assert refused.value.filename == str(path) and not path.exists()
    array = Progress("labels", path.with_suffix(".pt")).array("float16", (100, 200))
    array[:] = 1
    array.flush()
    assert np.load(path).sum() == 20_000


def heed_permissions() -> None:
    """Have the process that is about to start refused what permissions refuse, even if it is root's."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; of no effect for others than root


def test_a_read_only_results_folder_is_told(tmp_path):
    (tmp_path / "results").mkdir(mode=0o555)
    done = run_on_smoke(tmp_path, "results/smoke/digits/description.json", preexec_fn=heed_permissions)
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in told
    assert "Permission denied: 'results/smoke'" in told
    assert list((tmp_path / "results").iterdir()) == []


def test_an_unreadable_root_is_told_before_anything_is_made(tmp_path):
    root = tmp_path / "closed"
    root.mkdir(mode=0o000)
    done = run_on_smoke(tmp_path, "-n", overlay=photos("closed", root), preexec_fn=heed_permissions)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "datasets.closed" in errors[0] and str(root) in errors[0]
    assert "may read it" in errors[0]
    assert not (tmp_path / "results").exists()


# ---- images ----------------------------------------------------------------------------------


def photos(name: str, root: Path, more: str = "") -> str:
    """An overlay with a dataset of the user's images, and with the table made for it."""
    settings = f"source: imagefolder, root: '{root}', resolution: 8, test_fraction: 0.25, teacher: convnet"
    return f"datasets: {{{name}: {{{settings}{more}}}}}\ntables: {{main: {{datasets: [{name}]}}}}\n"


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def draw_classes(root: Path, names: tuple[str, ...] = ("a", "b"), count: int = 4) -> Path:
    for shade, name in enumerate(names):
        for i in range(count):
            save(root / name / f"{i}.png", Image.new("RGB", (9, 12), (40 * shade, 30 * i, 50 * i)))
    return root


def test_broken_folders_are_told_each_in_one_line_and_others_are_described(tmp_path):
    """One run over all of them: what fails stops nothing else."""
    for name in ("contradicted", "broken", "skipped", "empty", "closed_loop"):
        draw_classes(tmp_path / name)
    for name in ("broken", "skipped"):
        (tmp_path / name / "a/0.png").write_bytes(b"no image")
    (tmp_path / "empty/c").mkdir()
    (tmp_path / "closed_loop/a/again").symlink_to("again")
    more = {"contradicted": ", classes: 3", "skipped": ", on_unreadable: skip"}
    wanted = {
        "contradicted": ("classes: 3 in the settings, but ", "has 2; correct `classes`"),
        "broken": ("1 of 8 images cannot be read: a/0.png", "`on_unreadable: skip`"),
        "empty": (f"no image in {tmp_path}/empty/c; add images",),
        "closed_loop": (f"{tmp_path}/closed_loop/a/again", "remove the link"),
    }
    names = [*wanted, "skipped"]
    lines = [photos(n, tmp_path / n, more.get(n, "")).splitlines()[0] for n in names]
    inner = ", ".join(line.removeprefix("datasets: {").removesuffix("}") for line in lines)
    targets = [f"results/smoke/{n}/description.json" for n in names]
    done = run_on_smoke(tmp_path, *targets, overlay=f"datasets: {{{inner}}}\n")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    for name, parts in wanted.items():
        told = error_of(tmp_path / f"results/smoke/logs/describe_dataset/{name}.log")
        assert all(part in told for part in parts), told
        assert not (tmp_path / f"results/smoke/{name}").exists()
    description = json.loads((tmp_path / "results/smoke/skipped/description.json").read_text())
    assert [u["file"] for u in description["unreadable"]] == ["a/0.png"]
    assert description["train"]["count"] + description["test"]["count"] == 7


def read_header(path: Path) -> dict:
    return read_tensors(path, "np")[1]


def test_images_of_every_kind_and_names_of_every_alphabet_reach_the_exported_set(tmp_path):
    """Grey, palette, transparent, CMYK, turned, of one pixel; one class has a single image."""
    root, red = tmp_path / "my photos – été", Image.new("RGB", (20, 10), (250, 0, 0))
    draw_classes(root, ("grüne Äpfel", "日本 語"))
    save(root / "red things/1 palette.png", red.quantize(2))
    save(root / "red things/2 CMYK.jpg", red.convert("CMYK"), quality=95)
    save(root / "red things/3 one pixel.png", red.resize((1, 1)))
    save(root / "red things/4 behind glass.png", Image.new("RGBA", (9, 9), (245, 0, 0, 250)))
    turned = Image.new("RGB", (20, 20), "white")
    turned.paste((0, 0, 0), (0, 0, 10, 20))  # left half black; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "single/turned.jpg", turned, exif=exif, quality=95)
    for i in range(4):
        save(root / f"grey/{i}.png", Image.new("L", (10, 20), 50))
    overlay = photos("odd", root, ", store_train: true, flip: false")
    distilled = "results/smoke/odd/distilled/random/ipc1"
    done = run_on_smoke(tmp_path, f"{distilled}/images.safetensors", overlay=overlay)
    assert done.returncode == 0, done.stdout + done.stderr

    exported = {p.name: p for p in (tmp_path / distilled / "png").glob("[!.]*")}
    assert set(exported) == {"grüne Äpfel", "日本 語", "red things", "single", "grey"}
    pixels = {}
    for name, folder in exported.items():
        (file,) = folder.iterdir()
        pixels[name] = np.asarray(Image.open(file)).astype(int)
    assert np.abs(pixels["red things"] - (250, 0, 0)).max() <= 8
    assert (pixels["grey"] == 50).all()
    assert pixels["single"][:3].max() < 60 and pixels["single"][5:].min() > 195
    description = json.loads((tmp_path / "results/smoke/odd/description.json").read_text())
    assert "class single " in "".join(description["warnings"])


def test_images_changed_after_a_run_are_told_and_taken_in_when_asked(tmp_path):
    """By a job that reads the folder itself, and by the one that decodes it for others."""
    overlay = photos("kept", draw_classes(tmp_path / "kept"), ", store_train: true")
    loose = photos("loose", draw_classes(tmp_path / "loose")).splitlines()[0]
    overlay = overlay.replace("datasets: {", loose.removesuffix("}") + ", ", 1)
    sets = [f"results/smoke/loose/distilled/random/ipc{n}/images.safetensors" for n in (1, 2)]
    decoded = "results/smoke/kept/images/train.npy"
    descriptions = [f"results/smoke/{name}/description.json" for name in ("loose", "kept")]
    done = run_on_smoke(tmp_path, sets[0], descriptions[1], overlay=overlay)
    assert done.returncode == 0, done.stdout + done.stderr
    before = read_header(tmp_path / sets[0])["lineage"]

    for name in ("loose", "kept"):
        save(tmp_path / name / "a/new.png", Image.new("RGB", (9, 12), (0, 90, 0)))
    done = run_on_smoke(tmp_path, sets[1], decoded, overlay=overlay)
    assert done.returncode == 1 and not (tmp_path / sets[1]).exists() and not (tmp_path / decoded).exists()
    logs = ("select_images/loose/random/ipc2/shard0", "decode_images/kept/train")
    for log, description in zip(logs, descriptions, strict=True):
        told = error_of(tmp_path / f"results/smoke/logs/{log}.log")
        assert f"has changed since {description} was written" in told and f"`-R {description}`" in told

    done = run_on_smoke(tmp_path, *sets, decoded, "-R", *descriptions, overlay=overlay)
    assert done.returncode == 0, done.stdout + done.stderr
    lineages = [read_header(tmp_path / path)["lineage"] for path in sets]
    assert lineages[0]["describe_dataset"] == lineages[1]["describe_dataset"] != before["describe_dataset"]
    loose, kept = (json.loads((tmp_path / path).read_text()) for path in descriptions)
    assert loose["train"]["count"] + loose["test"]["count"] == 9
    assert len(np.load(tmp_path / decoded)) == kept["train"]["count"]


# ---- teachers --------------------------------------------------------------------------------


def test_a_teacher_of_another_network_or_dataset_is_told(smoke, tmp_path):
    """The weights of the smoke preset's ConvNet, for a ResNet and for a dataset of two classes."""
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    weights = directory / "results/smoke/digits/teachers/convnet/checkpoint.safetensors"
    overlay = photos("two", draw_classes(tmp_path / "two"), ", store_train: true")
    overlay += f"teachers: {{other: {{like: convnet, architecture: resnet18, weights: '{weights}'}},"
    overlay += f" same: {{like: convnet, weights: '{weights}'}}}}\n"
    place = "results/smoke/{}/teachers/{}/checkpoint.safetensors"
    targets = [place.format(*pair) for pair in (("digits", "other"), ("digits", "same"), ("two", "same"))]
    done = run_on_smoke(directory, *targets, overlay=overlay)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    logs = directory / "results/smoke/logs/pretrain_teacher"
    assert str(weights) in error_of(logs / "digits/other.log")
    told = error_of(logs / "two/same.log")
    assert str(weights) in told and "classifier.bias (10,) instead of (2,)" in told
    assert [(directory / t).exists() for t in targets] == [False, True, False]
