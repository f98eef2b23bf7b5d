"""What jobs share: a lock for twins, a GPU each, scratch for what is read at random."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_snakemake

from wmdd_core import artifacts
from wmdd_core.artifacts import write_json
from wmdd_core.device import precision
from wmdd_core.errors import UserError
from workflow_scripts import job as jobs
from workflow_scripts import pretrain_teacher, recover_images
from workflow_scripts.job import Job


def make_job(folder: Path, **inputs: str) -> Job:
    wildcards = {"dataset": "digits", "teacher": "convnet"}
    return Job("pretrain_teacher", wildcards, inputs, {}, {}, "", "auto", 1, str(folder))


# ---- twins -----------------------------------------------------------------------------------

TWIN = """
import sys, time
from dataclasses import replace
from pathlib import Path
from workflow_scripts import job as jobs
from workflow_scripts.job import Job

jobs.time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05))
folder = Path(sys.argv[1])
job = Job("rule", {"class": "7"}, {}, {}, {}, "", "auto", 1, str(folder))
with jobs._alone(job):
    trace = open(folder / "trace", "a")
    for mark in "ab":
        trace.write(mark)
        trace.flush()
        time.sleep(0.1)
"""


def twin(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", TWIN, str(folder)], env=environment, stdout=subprocess.PIPE
    )


def test_twins_work_one_after_another_and_leave_no_lock(tmp_path):
    twins = [twin(tmp_path) for _ in range(4)]
    told = [t.communicate(timeout=120)[0].decode() for t in twins]
    assert [t.returncode for t in twins] == [0] * 4
    assert (tmp_path / "trace").read_text() == "ab" * 4
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["trace"]
    waits = [line for text in told for line in text.splitlines()]
    assert all(line.startswith("another process is at work on rule/class-7") for line in waits)


@pytest.mark.parametrize(
    ("change", "made", "needed"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"settings": {"epochs": 2}}, True, True),
        ({"code": "another"}, True, True),
        ({"device_name": "cpu"}, True, True),
        ({"input": {"teacher": __file__}}, True, True),
    ],
)
def test_what_a_twin_has_just_made_is_not_made_again(tmp_path, monkeypatch, change, made, needed):
    """After a crash of Snakemake its jobs go on; those of the next run wait for them."""
    output = tmp_path / "checkpoint.safetensors"
    job = replace(make_job(tmp_path), output={"checkpoint": str(output)})
    ready, go = tmp_path / "ready", tmp_path / "go"
    first = replace(job, **change)
    program = f"""
import time
from pathlib import Path
from workflow_scripts.job import Job, _alone

with _alone({first!r}):
    Path({str(ready)!r}).touch()
    while not Path({str(go)!r}).exists():
        time.sleep(0.02)
    {f"Path({str(output)!r}).touch()" if made else "pass"}
"""
    twin = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not ready.exists():
        assert twin.poll() is None
        time.sleep(0.02)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: go.touch() or twin.wait())
    with jobs._alone(job) as left:
        assert left == needed
    assert twin.wait() == 0


def test_work_that_nobody_else_does_is_needed_also_where_files_are(tmp_path):
    output = tmp_path / "checkpoint.safetensors"
    output.touch()
    with jobs._alone(replace(make_job(tmp_path), output={"checkpoint": str(output)})) as left:
        assert left


def lock_of(job):
    return Path(job.checkpoints) / f"{job.name}.lock"


def test_a_lock_says_who_holds_it(tmp_path):
    job = make_job(tmp_path)
    with jobs._alone(job):
        assert json.loads(lock_of(job).read_text())["pid"] == os.getpid()
    assert not lock_of(job).exists()


def test_a_job_that_fails_leaves_no_lock(tmp_path):
    job = make_job(tmp_path)
    with pytest.raises(UserError), jobs._alone(job):
        raise UserError("an image cannot be read")
    assert not lock_of(job).exists()


def test_a_lock_that_a_killed_job_left_is_taken_over(tmp_path):
    job = make_job(tmp_path)
    lock_of(job).parent.mkdir(parents=True)
    lock_of(job).write_text('{"pid": 1}')
    with jobs._alone(job):
        assert json.loads(lock_of(job).read_text())["pid"] == os.getpid()


def test_a_lock_file_that_its_holder_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    path, lock, removed = tmp_path / "job.lock", jobs.fcntl.lockf, []

    def late(file, how) -> None:
        lock(file, how)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(jobs.fcntl, "lockf", late)
    file, _ = jobs._locked(path, "job")
    with file:
        assert path.exists()


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(jobs.fcntl, "lockf", refuse)
    with jobs._alone(make_job(tmp_path)):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


# ---- GPUs ------------------------------------------------------------------------------------


def test_two_jobs_take_two_gpus_whatever_their_numbers(monkeypatch):
    import torch

    names = [f"test-{os.getpid()}-{letter}" for letter in "ab"]
    held = open(f"/tmp/wmdd-gpu-{names[0]}-{os.getuid()}.lock", "w")  # noqa: SIM115
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print(1, flush=True); time.sleep(600)",
            held.name,
        ],
        stdout=subprocess.PIPE,
    )
    held.close()
    try:
        assert holder.stdout.readline()
        order = list(names)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=order[i]))
        assert jobs._free_gpu(2) == 1
        order.reverse()  # a scheduler may show the same GPU under another number
        for file in jobs._HELD:
            file.close()
        assert jobs._free_gpu(2) == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        for name in names:
            Path(f"/tmp/wmdd-gpu-{name}-{os.getuid()}.lock").unlink(missing_ok=True)


@pytest.mark.workflow
def test_snakemake_counts_the_gpus_of_this_machine(smoke, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(smoke, tmp_path / "run"))
    (tmp_path / "overlay.yaml").write_text("student_seeds: 4", encoding="utf-8")
    cell = "results/smoke/digits/evaluation/wmdd/random/ipc1/convnet/seed{}.json"
    arguments = ["--cores", "4", cell.format(2), cell.format(3)]
    arguments += ["--configfile", str(ROOT / "presets/smoke.yaml"), str(tmp_path / "overlay.yaml")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = run_snakemake(directory, *arguments, preset="")
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "local_gpu=" in told
    events = re.findall(r"^(Job|Finished jobid:) \d+", told, re.MULTILINE)
    assert events == ["Job", "Finished jobid:"] * 2

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_snakemake(directory, *arguments, "--forcerun", "evaluate_student", preset="")
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "local_gpu" not in told
    assert re.findall(r"^(Job|Finished jobid:) \d+", told, re.MULTILINE)[:2] == ["Job", "Job"]


# ---- scratch ---------------------------------------------------------------------------------


def test_scratch_holds_a_copy_that_no_end_of_the_process_leaves_there(tmp_path, monkeypatch):
    source = tmp_path / "features.npy"
    np.save(source, np.arange(6))
    (tmp_path / "scratch").mkdir()
    job = make_job(tmp_path, features=str(source))
    monkeypatch.delenv("WMDD_SCRATCH", raising=False)
    assert job.mapped("features").filename == str(source)
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "scratch"))
    monkeypatch.setenv("WMDD_SCRATCH", "$NODE_DISK")
    copy = job.mapped("features")
    assert (tmp_path / "scratch") in Path(copy.filename).parents
    assert list((tmp_path / "scratch").iterdir()) == []  # though it can still be read
    source.write_bytes(b"")
    assert copy.tolist() == list(range(6))


def test_real_features_are_drawn_from_the_copy(tmp_path, monkeypatch):
    """Recovery draws a few rows in each step: what `mapped` is for."""
    features = np.arange(20, dtype=np.float32).reshape(10, 2)
    np.save(tmp_path / "features.npy", features)
    write_json(tmp_path / "index.json", {"offsets": [0, 4, 10]}, {})
    names = {"features": "features.npy", "index": "index.json"}
    job = make_job(tmp_path, **{name: str(tmp_path / file) for name, file in names.items()})
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("WMDD_SCRATCH", str(tmp_path / "scratch"))
    settings = {"feature_term": "mmd_linear", "bn_term": "none"}
    shard, _ = recover_images.build_shard(job, settings, [0, 1], [0], "whole_classes")
    np.save(tmp_path / "features.npy", 0 * features)
    drawn = shard.real_features(1, 6, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, torch.from_numpy(features[4:]))


# ---- states ----------------------------------------------------------------------------------


def test_a_state_is_of_the_input_files_that_it_was_made_from(tmp_path):
    """Another teacher may have the same settings, and so the same lineage: one loaded from a file."""
    teacher, blocks = tmp_path / "teacher", [tmp_path / "a", tmp_path / "b"]
    for path in (teacher, *blocks):
        path.write_bytes(b"some")
    job = make_job(tmp_path, teacher=str(teacher), blocks=list(map(str, blocks)))
    stamp = job.progress([]).stamp
    assert job.progress([]).stamp == stamp
    for path in (teacher, blocks[1]):
        path.write_bytes(b"other")
        assert job.progress([]).stamp != stamp
        stamp = job.progress([]).stamp
    os.utime(teacher, (0, 0))
    assert job.progress([]).stamp != stamp


def test_a_state_is_of_the_settings_the_code_and_what_lies_behind(tmp_path):
    job = make_job(tmp_path)
    before = [{"lineage": {"describe_dataset": digest}, "devices": {}} for digest in ("a", "b")]
    jobs_of = [job, replace(job, settings={"epochs": 2}), replace(job, code="another")]
    stamps = [one.progress([]).stamp for one in jobs_of] + [job.progress([h]).stamp for h in before]
    assert len(set(stamps)) == 5


def test_a_state_is_not_taken_up_by_another_pytorch(tmp_path, monkeypatch):
    job, installed = make_job(tmp_path), artifacts.version
    stamp = job.progress([]).stamp
    other = {"torch": "0.1"}
    monkeypatch.setattr(artifacts, "version", lambda package: other.get(package) or installed(package))
    assert job.progress([]).stamp != stamp


def test_a_loop_within_a_job_has_a_state_of_its_own_that_names_the_device(tmp_path):
    job = replace(make_job(tmp_path), device_name="cpu")
    before = job.progress([], method="wmdd")
    assert job.device.type == "cpu"
    one, other = job.progress([], method="wmdd"), job.progress([], method="random")
    assert one.checkpoint == before.checkpoint != other.checkpoint
    assert len({before.stamp, one.stamp, other.stamp}) == 3


def test_a_job_that_computes_names_its_device(tmp_path):
    """And its state is not taken up on another, whose rounding differs."""
    job = replace(make_job(tmp_path), device_name="cpu")
    assert job.header()["devices"] == {}
    idle = job.progress([]).stamp
    assert job.device.type == "cpu"
    assert job.header()["devices"] == {"pretrain_teacher (convnet)": "cpu"}
    assert job.progress([]).stamp != idle


def test_a_job_on_a_gpu_asks_for_the_same_bits_each_time(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back also where it was not set
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert replace(make_job(tmp_path), device_name="cpu").device == torch.device("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    switches = {
        f"enable_{name}": getattr(torch.backends.cuda, f"{name}_enabled")()
        for name in ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")
    }
    try:
        for name in ("cuda:1", "cuda:0", "cuda"):
            chosen.append(replace(make_job(tmp_path), device_name=name).device)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cuda.flash_sdp_enabled()  # it would only warn of its atomic additions
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        for name, before in switches.items():
            getattr(torch.backends.cuda, name)(before)
    # What a job computes on is PyTorch's current GPU, too.
    assert chosen == [torch.device("cuda", i) for i in (1, 1, 0, 0, 0, 0)]


def test_a_gpu_that_is_not_there_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(UserError, match="device: cuda:2 is not there, PyTorch sees 2 GPUs"):
        _ = replace(make_job(tmp_path), device_name="cuda:2").device


def test_a_driver_that_is_too_old_is_told_in_one_line_and_a_cpu_needs_none(tmp_path, monkeypatch):
    def refuse() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
            " by downloading and installing a new version from the URL: http://www.nvidia.com/Download"
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    told = "the GPU cannot be used (The NVIDIA driver on your system is too old (found version 12020));"
    for name in ("auto", "cuda:0"):
        with pytest.raises(UserError, match=re.escape(told)):
            _ = replace(make_job(tmp_path), device_name=name).device
    assert replace(make_job(tmp_path), device_name="cpu").device == torch.device("cpu")


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
FULL_TOLD = "the GPU's memory is full (CUDA out of memory); lower a batch_size, or free the GPU"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(FULL), "CUDA out of memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
    ],
)
def test_a_full_gpu_is_told_in_one_line_and_a_fault_of_ours_with_its_traceback(
    tmp_path, monkeypatch, error, told
):
    described = {"wildcards": {}, "input": {}, "output": {}, "device": "cpu", "checkpoints": str(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["rule", "c0de"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `run` would set it for good

    def run(error: Exception) -> None:
        def main(_job: Job) -> None:
            raise error

        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(described)}\n{{}}\n"))
        jobs.run(main)

    with pytest.raises(SystemExit) as ended:
        run(error)
    assert ended.value.code.startswith(f"error: the GPU's memory is full ({told}); lower a batch_size")
    with pytest.raises(RuntimeError, match="misaligned"):
        run(RuntimeError("CUDA error: misaligned address"))


def test_a_full_gpu_among_several_is_told_in_one_line(tmp_path, monkeypatch):
    """By the launcher's own record of how a process failed."""
    from torch.distributed.elastic.multiprocessing import errors

    record = str(tmp_path / "error.json")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", record)

    def fail(_job: Job) -> None:
        errors.get_error_handler().record_exception(torch.OutOfMemoryError(FULL))
        raise errors.ChildFailedError("train_part", {0: errors.ProcessFailure(0, 1, 1, record)})

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: fail)
    with pytest.raises(UserError) as told:
        pretrain_teacher.launch(make_job(tmp_path), 2)
    assert str(told.value) == FULL_TOLD


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    used = precision({"precision": "auto"}, torch.device("cuda"))
    assert isinstance(used, torch.autocast) == supported
    assert isinstance(precision({"precision": "bfloat16"}, torch.device("cpu")), torch.autocast)
    assert not isinstance(precision({}, torch.device("cpu")), torch.autocast)
