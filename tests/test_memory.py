"""Memory does not grow with the dataset where work is done piece by piece, nor from step to step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from rules.configuration import prepare_environment
from wmdd_core.artifacts import read_json, read_tensors, write_arrays, write_tensors
from wmdd_core.memory import ENVIRONMENT
from wmdd_core.models import build_model

RESOLUTION = 128
PER_CLASS = 400
SIZES = (10, 40)
"""Classes of the two datasets: 4,000 and 16,000 images."""

TOLERANCE = 60.0
"""MB by which peaks may differ: 12,000 images more, as bytes, are 562; equal runs have differed by 27."""

MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run_as_job(code: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess:
    """Run Python code to its end, with `given` as its input, where it finds what a job's process finds."""
    command, environment = [sys.executable, "-c", code, *arguments], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def peak_of_command(*command: str, given: str = "") -> float:
    """Run a command as a job is started; the largest resident memory of one of its processes, MB.

    A small process starts it, as a process inherits the peak of the one that starts it.
    """
    done = run_as_job(MEASURE, *command, given=given)
    return int(done.stdout) / 1024


def peak_of(
    script: str, folder: Path, inputs: dict, outputs: dict, settings: dict, **wildcards: str
) -> float:
    """Run a rule's script to its end; the largest resident memory of its process, MB."""
    job = {
        "wildcards": {"dataset": "photos", **wildcards},
        "input": inputs,
        "output": {k: str(folder / v) for k, v in outputs.items()},
        "device": "cpu",
        "checkpoints": str(folder / "checkpoints"),
    }
    given = f"{json.dumps(job)}\n{json.dumps(settings)}\n"
    return peak_of_command(sys.executable, "-m", f"workflow_scripts.{script}", "code", given=given)


def make_photos(root: Path, classes: int) -> None:
    """A file name for each image, and the file of its class behind it."""
    for c in range(classes):
        pixels = np.random.default_rng(c).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        root.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"{c:02d}.bmp")
        for split, count in (("train", PER_CLASS), ("test", 1)):
            (root / split / f"{c:02d}").mkdir(parents=True)
            for i in range(count):
                os.link(root / f"{c:02d}.bmp", root / split / f"{c:02d}" / f"{i:03d}.bmp")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, list[float]]:
    """Peaks of both steps in MB, at each size."""
    found = {"features": [], "recovery": []}
    for classes in SIZES:
        folder = tmp_path_factory.mktemp(f"classes{classes}")
        make_photos(folder / "photos", classes)
        settings = {
            "source": "imagefolder",
            "root": str(folder / "photos"),
            "resolution": RESOLUTION,
            "seed": 0,
        }
        peak_of("describe_dataset", folder, {}, {"description": "description.json"}, settings)
        description = read_json(folder / "description.json")
        # Four features an image: pages of the mapped output count as resident, too, until they are wanted.
        # Thin, too: a heap keeps a hole of an activation's size in one run and not in the next.
        network = {"architecture": "convnet", "width": 4, "depth": 7}
        network |= {"classes": classes, "resolution": RESOLUTION}
        header = {"network": network, "lineage": description["header"]["lineage"]}
        model = build_model(**network, seed=0)
        write_tensors(folder / "teacher.safetensors", model.state_dict(), header)
        inputs = {
            "description": str(folder / "description.json"),
            "teacher": str(folder / "teacher.safetensors"),
        }
        made = {"features": "features.npy", "index": "index.json", "statistics": "statistics.safetensors"}
        found["features"].append(peak_of("extract_features", folder, inputs, made, {}, teacher="t"))
        features = np.load(folder / "features.npy", mmap_mode="r")
        assert features.shape == (classes * PER_CLASS, model.classifier.in_features)
        assert np.isfinite(features).all() and features[-1].any()
        found["recovery"].append(peak_of_recovery(folder, inputs, features, classes))
    print({k: [round(v, 1) for v in values] for k, values in found.items()}, "MB")
    return found


def peak_of_recovery(folder: Path, inputs: dict, features: np.ndarray, classes: int) -> float:
    """Recover the first shard, ten images of ten classes, out of a set of `classes`."""
    atoms = {
        "classes": np.arange(10),
        "support": np.array(features[: 10 * PER_CLASS : PER_CLASS, None]),
        "weights": np.ones((10, 1)),
    }
    header = read_tensors(folder / "statistics.safetensors")[1]
    write_arrays(folder / "barycenters.npz", atoms, {"lineage": header["lineage"]})
    inputs = {
        **inputs,
        "statistics": str(folder / "statistics.safetensors"),
        "barycenters": [str(folder / "barycenters.npz")],
    }
    settings = {
        "bn_term": "per_class",
        "crop_scale_min": 1,
        "feature_term": "barycenter",
        "flip": False,
        "iterations": 20,
        "lambda_bn": 10,
        "learning_rate": 0.1,
        "loss_form": "paper",
        "roll": 0,
        "seed": 0,
        "sharding": {"batch_layout": "whole_classes", "batch_size": 10, "classes": classes},
        "start": "noise",
    }
    wildcards = {"method": "wmdd", "ipc": "1", "shard": "0"}
    peak = peak_of("recover_images", folder, inputs, {"shard": "shard.safetensors"}, settings, **wildcards)
    shard = read_tensors(folder / "shard.safetensors")[0]
    assert torch.equal(shard["labels"], torch.arange(10))
    return peak


@pytest.mark.parametrize("step", ["features", "recovery"])
def test_four_times_the_dataset_takes_the_same_memory(peaks, step):
    small, large = peaks[step]
    assert abs(large - small) < TOLERANCE


def test_a_step_that_holds_the_dataset_is_found_out():
    """The measurement sees more than the tolerance allows for: 562 MB that are filled show in the peak."""
    program = "import numpy as np, sys; held = np.ones(int(sys.argv[1]), dtype=np.uint8)"
    size = (SIZES[1] - SIZES[0]) * PER_CLASS * 3 * RESOLUTION**2
    held, empty = (peak_of_command(sys.executable, "-c", program, str(n)) for n in (size, 1))
    assert held - empty > TOLERANCE


# ---- the allocator ---------------------------------------------------------------------------


def test_a_large_heap_is_kept_when_it_is_freed():
    """Beyond 2 GiB, too, which is as far as a threshold for giving back can be set."""
    code = """
import numpy as np
from wmdd_core.memory import keep_freed_memory

keep_freed_memory()
np.ones(3 * 2**30, dtype=np.uint8)
(resident,) = (v for v in open("/proc/self/status") if v.startswith("VmRSS"))
assert int(resident.split()[1]) > 2.9 * 2**20, resident
"""
    run_as_job(code)


def test_small_objects_do_not_settle_where_large_blocks_were():
    """A network's activations, its graph between them: the next step's fit where this one's were."""
    code = """
import ctypes
from wmdd_core.memory import keep_freed_memory, small_blocks_apart

libc, block = ctypes.CDLL(None), 2**22
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def aligned(size):
    found = ctypes.c_void_p()
    assert not libc.posix_memalign(ctypes.byref(found), ctypes.c_size_t(64), ctypes.c_size_t(size))
    ctypes.memset(found, 1, size)
    return found

def resident():
    (line,) = (v for v in open("/proc/self/status") if v.startswith("VmRSS"))
    return 1024 * int(line.split()[1])

@small_blocks_apart()
def grow():
    start, activations = resident(), []
    for _ in range(50):
        activations.append(aligned(block))
        for size in (24, 40, 56, 72, 88, 104):
            libc.malloc(size)
    forward = resident() - start
    for activation in activations[::-1]:
        libc.free(activation)
    for _ in range(50):
        aligned(block)
    return (resident() - start) / forward

keep_freed_memory()
growth = grow()
assert growth < 1.05, growth
"""
    run_as_job(code)


def test_jobs_start_with_what_their_memory_needs(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for changed in ("PATH", "PYTHONPATH", "WMDD_COMMIT"):
        monkeypatch.setenv(changed, os.environ.get(changed, ""))
    monkeypatch.setenv("PYTHONPATH", "/modules/torch")  # where a cluster's modules keep their packages
    for _ in range(2):
        prepare_environment(ROOT)
        assert os.environ["PYTHONPATH"] == f"{ROOT}:/modules/torch"
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    prepare_environment(ROOT)
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1"
