"""What every workflow script shares: its command line, device, header, progress and error texts.

A script makes four moves: read, build, call one or two library functions, write. Its rule's command is
`python -m workflow_scripts.<rule> CODE --threads N`, with two lines of JSON as its standard input: wildcards,
input and output files and the device in the first, what the step reads in the second.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from wmdd_core.artifacts import make_header, read_array, read_json, still_there
from wmdd_core.code import code_hash, code_variable, source_stamp
from wmdd_core.digests import digest
from wmdd_core.errors import UserError
from wmdd_core.memory import keep_freed_memory
from wmdd_core.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `lockf` says where a file system is mounted without locks."""

GPU_FULL = re.compile(r"CUDA (error: )?out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")
"""What PyTorch and CUDA's libraries say of a full GPU; not all of it is an `OutOfMemoryError`."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Job:
    """One job of a rule: files, wildcards, settings, and where to compute."""

    rule: str
    wildcards: dict[str, str]
    input: dict
    output: dict
    settings: dict
    code: str
    device_name: str
    threads: int
    checkpoints: str

    @property
    def name(self) -> str:
        """Rule and wildcards, as paths below a folder are made of them."""
        return job_name(self.rule, self.wildcards)

    def description(self) -> dict:
        """The dataset's description among the inputs."""
        return read_json(self.input["description"])

    def header(self, inputs: Iterable[Mapping] = (), **more: object) -> dict:
        """The header of this job's artefacts; `inputs` are the headers of what it read."""
        device = vars(self).get("device")
        used = device.type if device else None
        return make_header(self.rule, self.wildcards, self.settings, self.code, inputs, used, **more)

    def mapped(self, name: str) -> np.ndarray:
        """Array `name` among the inputs, memory-mapped, to be read at random.

        If WMDD_SCRATCH names a folder, a copy on the node's own disk: its name is removed at once, and its
        place is free again when the process ends, in whatever way.
        """
        scratch = os.environ.get("WMDD_SCRATCH")
        if not scratch:
            return read_array(self.input[name])
        place = {"prefix": "wmdd-", "dir": os.path.expandvars(scratch)}
        # NFS keeps a file that is open, and its folder.
        with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as folder:
            return read_array(shutil.copy(self.input[name], folder))

    def progress(self, inputs: Iterable[Mapping], **place: str) -> Progress:
        """Report and checkpoint a long loop that depends on these settings and the job's input files alone.

        `inputs` are their headers; `place` tells a loop from the others of its job, as wildcards do.
        """
        header, name = self.header(inputs), job_name(self.rule, {**self.wildcards, **place})
        made_by = [header[k] for k in ("lineage", "devices", "wildcards", "versions")]
        save_every = float(os.environ.get("WMDD_SAVE_EVERY", 60))
        # Outside the job's outputs, which Snakemake removes before each try.
        checkpoint = Path(self.checkpoints) / f"{name}.pt"
        return Progress(name, checkpoint, digest([*made_by, place, self._files()]), save_every=save_every)

    def _files(self) -> list[list]:
        """Size and time of every input file: one made anew by the same settings may hold something else."""
        found = []
        for path in (path for files in self.input.values() for path in listed(files)):
            opened = os.open(path, os.O_RDONLY)  # NFS asks its server then, where a bare stat may be outdated
            status = os.fstat(opened)
            os.close(opened)
            found.append([path, status.st_size, int(status.st_mtime)])
        return found

    @functools.cached_property
    def device(self) -> torch.device:
        """The device that was asked for; `auto` is a free GPU if there is one, otherwise the CPU.

        A job that has asked for it names it in its headers.
        """
        import torch

        from wmdd_core.device import compute_reproducibly

        gpus = torch.cuda.device_count() if self.device_name != "cpu" else 0
        if gpus:
            try:
                torch.cuda.init()
            except RuntimeError as error:  # a GPU is counted whether or not its driver is new enough
                told, remedy = first_sentence(str(error)), "update its driver, or set device: cpu"
                raise UserError(f"the GPU cannot be used ({told}); {remedy}") from None
        if self.device_name == "auto":
            device = torch.device("cuda", _free_gpu(gpus)) if gpus else torch.device("cpu")
        else:
            device = torch.device(self.device_name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if device.index >= gpus:
                raise UserError(
                    f"device: {self.device_name} is not there, PyTorch sees {gpus} GPUs; set another"
                )
            torch.cuda.set_device(device)  # or else parts of PyTorch would hold memory of the first GPU, too
            compute_reproducibly()
        return device


def job_name(rule: str, wildcards: Mapping[str, str]) -> str:
    """Rule and wildcards, as paths below a folder are made of them."""
    return "/".join([rule, *(f"{key}-{value}" for key, value in wildcards.items())])


def listed(files: str | list[str]) -> list[str]:
    """The files of an input that may hold one or several."""
    return [files] if isinstance(files, str) else list(files)


_HELD: list = []
"""Lock files that live as long as the process."""


def _free_gpu(count: int) -> int:
    """The first GPU that no other job of this machine holds, so that two never share one by accident.

    The lock carries the GPU's own identity: a scheduler shows each job its GPUs numbered from 0.
    """
    import torch

    while True:
        for gpu in range(count):
            identity = torch.cuda.get_device_properties(gpu).uuid
            file = open(f"/tmp/wmdd-gpu-{identity}-{os.getuid()}.lock", "w")  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            _HELD.append(file)
            return gpu
        print("every GPU is in use by another job; waiting", flush=True)
        time.sleep(10)


def run(main: Callable[[Job], None]) -> None:
    """Read what is to be done, run `main`, and tell the user's mistakes in one line with exit status 1."""
    rule = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(prog=f"python -m workflow_scripts.{rule}")
    parser.add_argument("code", help="hash of the code, for the header")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    described, settings = map(json.loads, sys.stdin)
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    keep_freed_memory()
    job = Job(
        rule=rule,
        settings=settings,
        code=given.code,
        threads=given.threads,
        device_name=described.pop("device"),
        **described,
    )
    try:
        check_code(rule)
        with _alone(job) as needed:
            if needed:
                main(job)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except RuntimeError as error:
        if not GPU_FULL.search(str(error)):
            raise
        sys.exit(f"error: {gpu_is_full(str(error))}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(
            f"error: cannot read or write {error.filename or 'an output'}: {error.strerror};"
            " free or unlock it and rerun"
        )


def gpu_is_full(told: str) -> str:
    """What PyTorch said of a full GPU, as one line for the user."""
    return f"the GPU's memory is full ({first_sentence(told)}); lower a batch_size, or free the GPU"


def first_sentence(told: str) -> str:
    """The first line of a message, as far as its first sentence goes."""
    return re.split(r"\.\s+(?=[A-Z])", told.strip().splitlines()[0])[0]


def check_code(rule: str) -> None:
    """Raise `UserError` if the rule's code is not what Snakemake read when the run began.

    Its results would bear the hash of the code that was there then.
    """
    known = os.environ.get(code_variable(rule))
    if known and os.environ.get("WMDD_SOURCES") != source_stamp() and code_hash(rule) != known:
        raise UserError(f"the code of {rule} was edited since this run began; start snakemake again")


@contextlib.contextmanager
def _alone(job: Job):
    """Hold the job's lock: a twin that an earlier, killed Snakemake left running finishes or dies first.

    Yields whether there is anything left to do: not if the twin has just done it. The file says who holds
    the lock; `workflow_scripts.status` reads it.
    """
    path = Path(job.checkpoints) / f"{job.name}.lock"
    work = digest([job.settings, job.code, job.device_name, job._files()])
    path.parent.mkdir(parents=True, exist_ok=True)
    file, twin = _locked(path, job.name)
    with file:
        slurm = os.environ.get("SLURM_JOB_ID")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "slurm": slurm, "work": work}
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        made = [f for files in job.output.values() for f in listed(files)]
        # Snakemake removed the outputs before this process began: what is there is the twin's, and whole.
        done = bool(made) and work in twin and all(map(os.path.exists, made))
        if done:
            print("the other process has done the work", flush=True)
        try:
            yield not done
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, name: str) -> tuple[IO[str], str]:
    """The file `path`, opened and locked as soon as nobody else holds it, and what the last holder wrote."""
    holder = ""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if still_there(path, file):
                return file, holder
            wait = 0.0  # its holder has just ended and removed it: the next to come lock a new file
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"warning: {path.parent} cannot be locked ({error.strerror}); see docs/cluster.md")
                return file, holder
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read()
            print(f"another process is at work on {name} {holder}; waiting for it to end", flush=True)
            wait = 5.0
        file.close()
        time.sleep(wait)
