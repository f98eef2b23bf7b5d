"""A Slurm on this machine alone, for the tests: munge, slurmctld and slurmd, started and ended by process id.

One node that pretends to be large (so that the profile's requests fit), one GPU that is /dev/null,
partitions named as in profiles/slurm. Memory is enforced by Slurm's own accounting: a job that holds
more than it asked for is killed. Nothing is left on the machine but the packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

CONFIGS = Path("/etc/slurm/slurm.conf"), Path("/etc/slurm/gres.conf")
"""Jobs look nowhere else: the plugin strips SLURM_CONF from their environment."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
SNAKEMAKE = """
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

# Whenever no job has ended the plugin looks ten seconds later than before, and no option limits that.
Executor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, seconds: None)
main()
"""
FAILED = ("FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL")


class Unavailable(Exception):
    """Why there can be no Slurm here."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = 600, every: float = 0.2):
    """The first true value of `condition()`; fails by name after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s in vain for {what}")
        time.sleep(every)


def _die_with_parent() -> None:
    """Linux: end this daemon if the tests are killed without a chance to clean up."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _heed_ctrl_c() -> None:
    """As in a terminal, also where the tests themselves run in the background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    """A running single-node Slurm; use as a context manager. What its daemons say stays in `logs`."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    def __enter__(self) -> Cluster:
        self._lock = open("/tmp/wmdd-slurm-tests.lock", "w")  # noqa: SIM115
        fcntl.lockf(self._lock, fcntl.LOCK_EX)  # another run of these tests: wait for its end
        self._refuse()
        self.home = Path(tempfile.mkdtemp(prefix="wmdd-slurm-"))
        self.home.chmod(0o755)
        self.daemons: list[subprocess.Popen] = []
        self.runs: list[Run] = []
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for run in self.runs:
            run.kill()
        if len(self.daemons) == 3:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.call("scancel", "--full", "--state=RUNNING,PENDING", "--user=root", check=False)
                deadline = time.monotonic() + 15
                while self.active() and time.monotonic() < deadline:
                    time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in [*self.processes(), *self._step_daemons()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in CONFIGS:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)
        self._lock.close()

    def _refuse(self) -> None:
        missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
        if missing:
            raise Unavailable(f"{', '.join(missing)} not found; run tests/slurm/install.sh")
        if os.geteuid() != 0:
            raise Unavailable("Slurm's daemons need root here")
        for path in CONFIGS:
            if path.exists():
                raise Unavailable(f"{path} belongs to a Slurm of this machine, which the tests leave alone")

    def _start(self) -> None:
        host, home = socket.gethostname().partition(".")[0], self.home
        for name in ("control", "node"):
            (home / name).mkdir()
        (home / "munge.key").write_bytes(os.urandom(128))
        (home / "munge.key").chmod(0o400)

        (home / "gres.conf").write_text("Name=gpu Type=pretended File=/dev/null\n")
        (home / "slurm.conf").write_text(f"""ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=15
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
StateSaveLocation={home}/control
SlurmdSpoolDir={home}/node
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldTimeout=300
SlurmdTimeout=300
MinJobAge=36000
KillWait=20
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:pretended:1 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
""")
        for path in CONFIGS:
            # A link through this process: should it be killed, the machine is again one without Slurm.
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(f"/proc/{os.getpid()}/root{home}/{path.name}")
        munge = [f"--{option}={home}/munge.{end}" for option, end in MUNGE_FILES.items()]
        self._daemon("munged", "--foreground", "--force", *munge)
        wait_until((home / "munge.socket").exists, "munged", 30)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        try:
            wait_until(self._idle, "an idle node", 60)
        except AssertionError as error:
            told = "\n".join(p.read_text(errors="replace")[-1000:] for p in sorted(self.logs.glob("*.out")))
            raise Unavailable(f"Slurm did not come up ({error}):\n{told}") from None

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self.logs / f"{program}.out", "w") as out:
            self.daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env={**os.environ, "PATH": PATH},
                    executable=shutil.which(program, path=PATH),
                    cwd=self.home,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def _idle(self) -> bool:
        return self.call("sinfo", "--noheader", "--format=%t", check=False).startswith("idle")

    def call(self, *command: str, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": PATH}
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, directory: Path | None = None) -> list[dict[str, str]]:
        """What Slurm knows of every job so far (of those that `directory` submitted), oldest first."""
        told = self.call("scontrol", "show", "job", "--oneliner", check=False)
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in told.splitlines() if "JobId=" in line]
        mine = [j for j in jobs if directory is None or j["WorkDir"] == str(directory)]
        return sorted(mine, key=lambda job: int(job["JobId"]))

    def active(self, directory: Path | None = None) -> list[dict[str, str]]:
        """The jobs that have not ended."""
        return [j for j in self.jobs(directory) if j["JobState"] in ("PENDING", "RUNNING", "COMPLETING")]

    def processes(self, directory: Path | None = None) -> dict[int, list[str]]:
        """Process id → command line of this cluster's jobs and their helpers (of those in `directory`)."""
        found, mark = {}, f"WMDD_TEST_CLUSTER={self.home}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if pid == os.getpid() or mark not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if directory is None or os.readlink(entry / "cwd") == str(directory):
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    found[pid] = command.split("\0")
        return found

    def _step_daemons(self) -> list[int]:
        """What slurmd has started for steps and outlives it, to call a controller that is gone.

        They wipe their environment; the folder in which they run is slurmd's.
        """
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if os.readlink(entry / "cwd") == str(self.home):
                    found.append(pid)
        return found

    def script(self, directory: Path, rule: str, **wildcards: str) -> int | None:
        """The process id of the job of `rule` with these wildcards, while it is at work."""
        wanted = {f"{key}-{value}" for key, value in wildcards.items()}
        running = self.processes(directory)
        for lock in directory.glob(f"results/*/checkpoints/{rule}/**/*.lock"):
            if wanted <= set(lock.with_suffix("").parts):
                with contextlib.suppress(OSError, ValueError):
                    pid = json.loads(lock.read_text())["pid"]
                    if pid in running:
                        return pid
        return None

    def run(self, directory: Path, *arguments: str, presets: tuple[Path, ...] = (), jobs: int = 4) -> Run:
        """Start Snakemake with the Slurm profile; results and Slurm's logs go to `directory`."""
        run = Run(self, directory, arguments, presets or (ROOT / "presets/smoke.yaml",), jobs)
        self.runs.append(run)
        return run


MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Run:
    """One Snakemake on the login node."""

    def __init__(
        self,
        cluster: Cluster,
        directory: Path,
        arguments: tuple[str, ...],
        presets: tuple[Path, ...],
        jobs: int,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.before = directory, {job["JobId"] for job in cluster.jobs(directory)}
        self.cluster, self.presets = cluster, presets
        self.out = directory / f"run{len(cluster.runs)}.out"
        command = [sys.executable, "-c", SNAKEMAKE, "--snakefile", str(ROOT / "Snakefile")]
        command += ["--configfile", *map(str, presets), "--profile", str(ROOT / "profiles/slurm")]
        # The profile as it is, but for waits that suit a quick and local cluster.
        command += ["--latency-wait", "5", "--jobs", str(jobs)]
        environment = {
            **os.environ,
            "PATH": PATH,
            "WMDD_COMMIT": "tests",
            "WMDD_SAVE_EVERY": "0",
            "WMDD_TEST_CLUSTER": str(cluster.home),
        }
        with open(self.out, "w") as out:
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
            )

    @property
    def told(self) -> str:
        """What Snakemake has printed."""
        return self.out.read_text(errors="replace")

    def wait(self, seconds: float = 1800) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.told[-3000:]}") from None

    def jobs(self) -> list[dict[str, str]]:
        """The Slurm jobs that it has submitted."""
        return [j for j in self.cluster.jobs(self.directory) if j["JobId"] not in self.before]

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, to Snakemake alone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def slurm_job_of(pid: int) -> str:
    """The Slurm job that a process belongs to."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(e.partition(b"=")[2].decode() for e in entries if e.startswith(b"SLURM_JOB_ID="))
