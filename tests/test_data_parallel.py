"""A teacher trained by two processes is the one that a single process trains, but for rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_snakemake

from wmdd_core.artifacts import read_tensors, write_json
from wmdd_core.sources import ArraySource
from wmdd_core.training import FileCrops, file_batches, real_batches

CPU = torch.device("cpu")
COUNTS = {"train": [8, 7, 7], "test": [2, 2, 2]}
SETTINGS = {
    "architecture": "convnet",
    "width": 8,
    "depth": 2,
    "norm": "instance",  # torch synchronises BatchNorm on GPUs alone
    "epochs": 40,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "batch_size": 5,  # parts of 3 and 2, and a last batch of 2: unequal ones must weigh what they hold
    "crop_scale_min": 0.5,
    "flip": True,
    "seed": 0,
}


@pytest.fixture
def inputs(tmp_path) -> dict[str, str]:
    """A described dataset of three classes of random images, 8 pixels."""
    description = {
        "classes": ["a", "b", "c"],
        "resolution": 8,
        "mean": [0.5] * 3,
        "std": [0.3] * 3,
        "unreadable": [],
        **{split: {"count": sum(n), "per_class": n} for split, n in COUNTS.items()},
    }
    write_json(tmp_path / "description.json", description, {"lineage": {}})
    generator = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        pixels = generator.integers(0, 256, (sum(counts), 3, 8, 8), dtype=np.uint8)
        np.save(tmp_path / f"{split}.npy", pixels)
    paths = {split: str(tmp_path / f"{split}.npy") for split in COUNTS}
    return {"description": str(tmp_path / "description.json"), **paths}


def start(inputs: dict[str, str], folder: Path, processes: int, **changes) -> subprocess.Popen:
    """The rule's command on `processes` CPUs in place of GPUs, its outputs and checkpoint in `folder`."""
    job = {
        "wildcards": {"dataset": "d", "teacher": "t"},
        "input": inputs,
        "output": {
            "checkpoint": str(folder / "checkpoint.safetensors"),
            "metrics": str(folder / "metrics.json"),
            "curve": str(folder / "curve.csv"),
        },
        "device": "cpu",
        "checkpoints": str(folder / "checkpoints"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "workflow_scripts.pretrain_teacher", "code"],
        env={**os.environ, "WMDD_GPUS": str(processes)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdin.write("\n".join([json.dumps(job), json.dumps({**SETTINGS, **changes})]))
    process.stdin.close()
    process.stdin = None  # or else `communicate` would use it again
    return process


def alive(session: int) -> list[str]:
    """Processes of the session that have not ended."""
    command = ["ps", "-o", "stat=,args=", "-s", str(session)]
    told = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [line for line in told if not line.startswith("Z")]


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def test_two_processes_interrupted_and_resumed_equal_one(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(inputs, one, 1))

    process = start(inputs, two, 2)
    state, deadline = two / "checkpoints/pretrain_teacher/dataset-d/teacher-t.pt", time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = "".join(process.communicate(timeout=60))
    assert process.returncode != 0, told
    deadline = time.monotonic() + 10
    while alive(process.pid) and time.monotonic() < deadline:  # a process that has ended takes a while to go
        time.sleep(0.05)
    assert not alive(process.pid)
    assert not (two / "checkpoint.safetensors").exists()
    told = finish(start(inputs, two, 2))
    assert told.count("resuming after step") == 1  # the first process's report alone
    assert not state.exists()

    found, header = read_tensors(two / "checkpoint.safetensors")
    wanted, same = read_tensors(one / "checkpoint.safetensors")
    assert header == same and list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    curves = [np.genfromtxt(f / "curve.csv", delimiter=",", skip_header=1) for f in (one, two)]
    np.testing.assert_allclose(curves[1][:, 1], curves[0][:, 1], rtol=1e-3)
    assert len(curves[1]) == SETTINGS["epochs"]


def test_what_two_processes_cannot_do_is_told_in_one_line(inputs, tmp_path):
    process = start(inputs, tmp_path, 2, norm="batch")
    told = process.communicate(timeout=300)[1].splitlines()
    assert process.returncode == 1
    assert told[-1] == "error: BatchNorm over several processes needs GPUs; train with one process on a CPU"
    process = start(inputs, tmp_path, 6)
    assert process.communicate(timeout=300)[1].startswith(
        "error: batch_size: 5 is below the number of GPUs, 6"
    )
    assert process.returncode == 1 and not (tmp_path / "checkpoint.safetensors").exists()


def pretend(monkeypatch, rank: int, world: int) -> None:
    for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", world)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)


@pytest.mark.parametrize("files", [True, False], ids=["files", "resident"])
def test_the_parts_of_three_processes_are_the_batch_of_one(files, monkeypatch):
    """22 images in batches of 6: the last one of 4 is split into 2, 1 and 1."""
    pixels = np.random.default_rng(1).integers(0, 256, (22, 8, 8, 3), dtype=np.uint8)
    labels, stats = np.arange(22), (torch.full((3,), 0.5), torch.full((3,), 0.3))

    def epoch() -> list[tuple[torch.Tensor, torch.Tensor]]:
        if files:
            source = ArraySource(("a",), ("a",), labels, [""] * 22, pixels)
            crops = FileCrops(source, 8, ("x",), 0.5, True)
            return list(file_batches(crops, 6, *stats, workers=1, device=CPU)(0))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        draw = real_batches(images, torch.arange(22), 6, *stats, ("x",), crop_scale_min=0.5, flip=True)
        return list(draw(0))

    whole, parts = epoch(), []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        parts.append(epoch())
    assert [len(p[-1][1]) for p in parts] == [2, 1, 1]
    for step, (images, targets) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][step][0], images[rank::3])
            assert torch.equal(parts[rank][step][1], targets[rank::3])


def test_a_batch_too_small_for_every_process_is_left_out(monkeypatch):
    images, labels = torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7)
    pretend(monkeypatch, 2, 3)
    stats = (torch.zeros(3), torch.ones(3))
    draw = real_batches(images, labels, 5, *stats, ("x",), crop_scale_min=1.0, flip=False)
    assert [len(targets) for _, targets in draw(0)] == [1]  # of 5 and 2 images, the first alone


@pytest.mark.workflow
def test_the_number_of_gpus_reaches_the_command_and_makes_nothing_stale(smoke):
    teacher = "results/smoke/digits/teachers/convnet/checkpoint.safetensors"
    more = ("--set-resources", "pretrain_teacher:local_gpu=2")
    done = run_snakemake(smoke, "-n", teacher, *more)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr
    for arguments, gpus in ((more, 2), ((), 1)):
        told = run_snakemake(smoke, "-n", "-p", "--forcerun", "pretrain_teacher", *arguments, "--", teacher)
        assert f"WMDD_GPUS={gpus} python" in told.stdout + told.stderr
