"""A change makes stale what depends on it and nothing else: the table in docs/cluster.md holds."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_snakemake
from PIL import Image

from wmdd_core.artifacts import read_tensors, write_tensors
from workflow_scripts.status import count_jobs

pytestmark = pytest.mark.workflow


def rows_of_the_table() -> list[tuple[str, str, dict[str, int]]]:
    """(change, overlay, rule → jobs) of each row; the overlay is laid over the smoke preset."""
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    section = re.search(r"^## What a change reruns$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| (.+?) \|$", section, re.MULTILINE)
    return [(c, o, {r: int(n) for r, n in re.findall(r"`(\w+)` (\d+)", jobs)}) for c, o, jobs in rows]


def planned_counts(directory: Path, overlay: str) -> dict[str, int]:
    """Rule → number of jobs that a dry run plans with `overlay` laid over the smoke preset."""
    path = directory.parent / "overlay.yaml"
    path.write_text(overlay, encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(path)]
    done = run_snakemake(directory, "--dry-run", *files, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    return count_jobs(done.stdout + done.stderr)


def test_the_table_has_the_changes_that_people_make():
    told = " ".join(change for change, _, _ in rows_of_the_table())
    for word in ("λ", "IPC", "seed", "teacher", "barycenter", "temperature", "label", "epochs"):
        assert word in told


@pytest.mark.parametrize(
    ("overlay", "jobs"),
    [pytest.param(overlay, jobs, id=change) for change, overlay, jobs in rows_of_the_table()],
)
def test_a_change_reruns_what_the_table_says(smoke, overlay, jobs):
    assert planned_counts(smoke, overlay) == jobs


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("λ of a method", "distilled/wmdd/ipc1/shards"),
        ("λ of a method", "labels/wmdd/wmdd/ipc1/labels.npy"),
        ("epochs of the teacher", "teachers/convnet"),
        ("epochs of the teacher", "features/convnet"),
        ("iterations of the barycenter", "barycenters"),
        ("epochs of a recipe", "labels"),
    ],
)
def test_a_job_that_failed_after_a_change_is_planned_again(smoke, tmp_path, change, lost):
    """Snakemake removes a job's outputs when it starts, and what it knew of them when it fails: nothing is
    left to be out of date."""
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    (found,) = directory.glob(f"**/digits/{lost}")
    files = [file for file in found.rglob("*") if file.is_file()] or [found]
    names = [str(file.relative_to(directory)) for file in files]
    done = run_snakemake(directory, "--cleanup-metadata", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        file.unlink()
    ((overlay, jobs),) = [(o, j) for c, o, j in rows_of_the_table() if c == change]
    assert planned_counts(directory, overlay) == jobs


def test_a_dry_run_names_the_setting_that_changed(smoke, tmp_path):
    (tmp_path / "overlay.yaml").write_text("methods: {wmdd: {lambda_bn: 20}}", encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    done = run_snakemake(smoke, "--dry-run", *files, preset="")
    assert "last execution: lambda_bn: 30 → 20\n" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "deleted", [("tables/main.csv", "figures/gallery.png"), ("tables/main.md", "figures/gallery.pdf")]
)
def test_deleted_tables_and_figures_are_made_again(smoke, tmp_path, deleted):
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    for name in deleted:
        (found,) = directory.glob(f"**/report/{name}")
        found.unlink()
    done = run_snakemake(directory, "--dry-run")
    planned = count_jobs(done.stdout + done.stderr)
    assert {"tabulate_accuracy", "plot_gallery", "build_page"} <= planned.keys()
    assert not planned.keys() & {"recover_images", "evaluate_student"}


@pytest.mark.parametrize("target", ["main", "gallery", "all"])
def test_a_dataset_that_could_not_be_described_anew_is_described_again(smoke, tmp_path, target):
    """A forced job that fails leaves no description, and nothing that is older than its inputs."""
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    (found,) = directory.glob("**/digits/description.json")
    found.unlink()
    done = run_snakemake(directory, "--dry-run", "--", target)
    planned = count_jobs(done.stdout + done.stderr)
    assert {"describe_dataset", "decode_images", "recover_images", "gather_images"} <= planned.keys()


def test_a_figure_of_a_table_that_failed_is_drawn_again(smoke, tmp_path):
    """The table's job leaves no file then, and the figure is younger than all that the table is made of."""
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    files = list(directory.glob("**/report/tables/main.*"))
    done = run_snakemake(directory, "--cleanup-metadata", *(str(f.relative_to(directory)) for f in files))
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        file.unlink()
    (tmp_path / "overlay.yaml").write_text("tables: {main: {seeds: 1}}", encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    done = run_snakemake(directory, "--dry-run", "accuracy", *files, preset="")
    assert count_jobs(done.stdout + done.stderr) == {"tabulate_accuracy": 1, "plot_accuracy": 1}


def test_leave_to_download_reruns_nothing_of_a_dataset(smoke):
    assert planned_counts(smoke, "datasets: {digits: {download: true}}") == {"build_page": 1}


def test_another_file_of_weights_or_of_a_set_made_elsewhere_is_taken_in(smoke, tmp_path):
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    made = directory / "results/smoke/digits"
    sources = {
        "teacher": made / "teachers/convnet/checkpoint.safetensors",
        "set": made / "distilled/wmdd/ipc2/images.safetensors",
    }
    given = {n: Path(shutil.copy(file, tmp_path / f"{n}.safetensors")) for n, file in sources.items()}
    (tmp_path / "overlay.yaml").write_text(
        f"teachers: {{loaded: {{architecture: convnet, width: 16, depth: 2, weights: {given['teacher']}}}}}\n"
        f"methods: {{theirs: {{kind: external, external: {given['set']}}}}}\n",
        encoding="utf-8",
    )
    targets = [
        f"results/smoke/digits/{file}"
        for file in ("teachers/loaded/checkpoint.safetensors", "distilled/theirs/ipc2/images.safetensors")
    ]
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]

    def run(*options: str) -> dict[str, int]:
        done = run_snakemake(directory, *options, *targets, *files, preset="")
        assert done.returncode == 0, done.stdout + done.stderr
        return count_jobs(done.stdout + done.stderr)

    assert run("--cores", "2") == {"pretrain_teacher": 1, "import_images": 1, "gather_images": 1}
    assert run("--dry-run") == {}
    taken, theirs = (
        read_tensors(file)[0] for file in (made / "distilled/theirs/ipc2/images.safetensors", sources["set"])
    )
    assert torch.equal(taken["images"], theirs["images"])
    torch.testing.assert_close(taken["weights"], theirs["weights"])
    assert len(theirs["weights"].unique()) > 2
    overlay = (tmp_path / "overlay.yaml").read_text()  # with a schedule that nothing is trained by
    (tmp_path / "overlay.yaml").write_text(
        overlay.replace("{architecture: convnet,", "{like: convnet, epochs: 9,")
    )
    assert run("--dry-run") == {}
    for file in given.values():  # gone, as from a scratch disk: what was made of it stays
        file.rename(file.with_suffix(".away"))
    for target, key in zip(targets, ("teachers.loaded.weights", "methods.theirs.external"), strict=True):
        done = run_snakemake(directory, "--cores", "1", target, *files, preset="")
        assert done.returncode == 1 and f"{key}: there is no file or folder" in done.stdout + done.stderr
    assert all((directory / target).exists() for target in targets)
    for file in given.values():
        file.with_suffix(".away").rename(file)
    assert run("--dry-run") == {}
    for file in given.values():
        tensors, header = read_tensors(file)
        write_tensors(file, {name: tensor + (tensor.ndim == 4) for name, tensor in tensors.items()}, header)
        os.utime(file, (10**9, 10**9))  # older than what was made of the one before, as copied with its times
    assert run("--dry-run") == {"pretrain_teacher": 1, "import_images": 1, "gather_images": 1}


def test_a_folder_made_elsewhere_that_changes_is_imported_again(smoke, tmp_path):
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    theirs = Path(
        shutil.copytree(smoke / "results/smoke/digits/distilled/wmdd/ipc1/png", tmp_path / "theirs")
    )
    (tmp_path / "overlay.yaml").write_text(
        f"methods: {{theirs: {{kind: external, external: {theirs}}}}}\n", encoding="utf-8"
    )
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    target = "results/smoke/digits/distilled/theirs/ipc1/images.safetensors"

    def run(*options: str) -> dict[str, int]:
        done = run_snakemake(directory, *options, target, *files, preset="")
        assert done.returncode == 0, done.stdout + done.stderr
        return count_jobs(done.stdout + done.stderr)

    assert run("--cores", "2") == {"import_images": 1, "gather_images": 1}
    assert run("--dry-run") == {}
    image = next(theirs.rglob("*.png"))
    size, times = Image.open(image).size, (image.stat().st_atime, image.stat().st_mtime)
    Image.new("RGB", size).save(image)
    assert run("--dry-run") == {"import_images": 1, "gather_images": 1}
    theirs.rename(tmp_path / "away")  # as on a disk that is not mounted
    done = run_snakemake(directory, "--dry-run", target, *files, preset="")
    assert done.returncode == 1 and "methods.theirs.external: there is no file" in done.stdout + done.stderr
    (tmp_path / "away").rename(theirs)
    # An import that failed leaves no record, and no file to be older than.
    image.unlink()
    assert run_snakemake(directory, "--cores", "2", target, *files, preset="").returncode != 0
    Image.new("RGB", size).save(image)
    os.utime(image, times)
    assert run("--cores", "2") == {"import_images": 1, "gather_images": 1}
    assert run("--dry-run") == {}


PHOTOS = """
student_seeds: 1
datasets: {{photos: {{source: imagefolder, root: "{}", resolution: 8, store_train: true, teacher: convnet}}}}
teachers: {{convnet: {{batch_size: {{photos: 8, default: 64}}}}}}
tables: {{main: {{datasets: [digits, photos], methods: [random], ipc: [1]}}}}
"""


def draw_class(root: Path, name: str, shade: int) -> None:
    """A class folder of grey photographs, for training and for testing."""
    generator = np.random.default_rng(shade)
    for split, count in (("train", 8), ("test", 2)):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(generator.normal(shade, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_a_new_class_folder_or_description_reruns_its_dataset_and_no_other(smoke, tmp_path):
    directory, root = Path(shutil.copytree(smoke, tmp_path / "run")), tmp_path / "photos"
    for shade, name in ((40, "dark"), (120, "middle")):
        draw_class(root, name, shade)
    overlay = PHOTOS.format(root)
    of_one_dataset = {
        "describe_dataset": 1,
        "decode_images": 2,
        "pretrain_teacher": 1,
        "select_images": 1,
        "gather_images": 1,
        "relabel_images": 1,
        "evaluate_student": 1,
    }
    (tmp_path / "overlay.yaml").write_text(overlay, encoding="utf-8")
    files = ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    done = run_snakemake(directory, "--cores", "2", "main", *files, preset="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert count_jobs(done.stdout + done.stderr) == {**of_one_dataset, "tabulate_accuracy": 1}

    forced = ("-R", "results/smoke/photos/description.json")
    done = run_snakemake(directory, "--dry-run", "main", *forced, *files, preset="")
    assert count_jobs(done.stdout + done.stderr) == {**of_one_dataset, "tabulate_accuracy": 1}

    draw_class(root, "light", 220)
    done = run_snakemake(directory, "--dry-run", "main", *files, preset="")
    assert count_jobs(done.stdout + done.stderr) == {**of_one_dataset, "tabulate_accuracy": 1}
    assert "digits" not in " ".join(re.findall(r"^Job \d+: (.+)$", done.stdout + done.stderr, re.MULTILINE))
    for split in ("train", "test"):  # as many classes as there were, but of other names
        (root / split / "light").rename(tmp_path / f"{split}-light")
        (root / split / "dark").rename(root / split / "light")
    done = run_snakemake(directory, "--dry-run", "main", *files, preset="")
    assert count_jobs(done.stdout + done.stderr) == {**of_one_dataset, "tabulate_accuracy": 1}
