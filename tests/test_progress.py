"""Checkpoints: saved when due, taken up by the same settings alone, and gone when the work is done."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wmdd_core import progress as progress_module
from wmdd_core.progress import RESUMABLE_EXIT, STOPS, Progress

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _keep_the_signal_handler():
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def count_to(total: int, progress: Progress, stop_after: int | None = None) -> int:
    """A loop as the library's: sums the numbers below `total`, and can be killed after a step."""
    done, sum_ = -1, torch.zeros((), dtype=torch.int64)
    if state := progress.resume():
        done, sum_ = state["index"], state["sum"]
    for index in range(done + 1, total):
        sum_ = sum_ + index
        progress.step(index, total, lambda: {"index": index, "sum": sum_}, lambda: {"sum": float(sum_)})  # noqa: B023
        if index == stop_after:
            raise KeyboardInterrupt
    return int(sum_)


def test_a_killed_loop_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "deep" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        count_to(10, Progress("sum", path, "stamp", save_every=0), stop_after=6)
    assert "resuming" not in capsys.readouterr().out
    again = Progress("sum", path, "stamp")
    assert again.resume()["index"] == 6
    assert "sum: resuming after step 7" in capsys.readouterr().out
    assert count_to(10, again) == sum(range(10))
    (path.parent / ".state.pt.tmp").write_text("half")  # SIGKILL while saving leaves this
    again.finish()
    assert list(path.parent.iterdir()) == []
    again.finish()  # twice does no harm
    assert Progress("sum", path, "stamp").resume() is None


@pytest.mark.parametrize("left", [0, 1, 300])
def test_a_damaged_checkpoint_is_told_and_ignored(tmp_path, capsys, left):
    """A power cut leaves a file of the right name with some of its bytes, or none."""
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        count_to(10, Progress("sum", path, "stamp", save_every=0), stop_after=6)
    path.write_bytes(path.read_bytes()[:left])
    again = Progress("sum", path, "stamp", save_every=60)
    assert count_to(10, again) == sum(range(10))
    assert "the checkpoint is damaged" in capsys.readouterr().out
    assert not path.exists()


def test_an_array_is_on_the_disk_before_a_checkpoint_says_so(tmp_path, monkeypatch):
    progress, order = Progress("labels", tmp_path / "state.pt", save_every=0), []
    array = progress.array(np.float32, (4, 3))
    monkeypatch.setattr(type(array), "flush", lambda _: order.append("array"))
    monkeypatch.setattr(torch, "save", lambda _, path: order.append("state") or Path(path).touch())
    progress.step(0, 4, dict, dict)
    assert order == ["array", "state"]


def test_an_array_reaches_a_folder_on_another_disk(tmp_path, monkeypatch):
    progress = Progress("labels", tmp_path / "state.pt", save_every=0)
    progress.array(np.float32, (4, 3))[:] = 7
    progress.step(0, 4, dict, dict)
    target, move = tmp_path / "elsewhere/labels.npy", os.replace

    def replace(source: Path, to: Path) -> None:
        if Path(source).parent != Path(to).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        move(source, to)

    monkeypatch.setattr(os, "replace", replace)
    progress.finish(str(target))
    assert np.load(target).tolist() == [[7.0] * 3] * 4
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["labels.npy"]


@pytest.mark.parametrize(("dtype", "shape"), [(np.float16, (4, 3)), (np.float32, (2, 3))])
def test_an_array_of_another_shape_or_kind_is_made_anew(tmp_path, dtype, shape):
    first = Progress("labels", tmp_path / "state.pt", "stamp", save_every=0)
    first.array(np.float32, (4, 3))[:] = 7
    first.step(0, 4, lambda: {"index": 0}, dict)
    again = Progress("labels", tmp_path / "state.pt", "stamp")
    array = again.array(dtype, shape)
    assert (array.dtype, array.shape) == (dtype, shape) and not array.any()
    assert again.resume() is None


@pytest.mark.parametrize("left", [0, 60])
def test_a_damaged_array_is_told_and_made_anew(tmp_path, capsys, left):
    path = tmp_path / "state.pt"
    first = Progress("labels", path, "stamp", save_every=0)
    first.array(np.float32, (4, 3)).flush()
    first.step(0, 4, lambda: {"index": 0}, dict)
    first.partial.write_bytes(first.partial.read_bytes()[:left])
    again = Progress("labels", path, "stamp")
    assert again.array(np.float32, (4, 3)).shape == (4, 3)
    assert again.resume() is None
    assert "the array beside the checkpoint is damaged" in capsys.readouterr().out


def test_a_checkpoint_of_other_settings_is_ignored_and_told(tmp_path, capsys):
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        count_to(10, Progress("sum", path, "λ = 1", save_every=0), stop_after=6)
    other = Progress("sum", path, "λ = 2", save_every=0)
    assert other.resume() is None
    assert "of other settings or inputs" in capsys.readouterr().out
    # Killed before its first save, the other run has still touched what belongs to the checkpoint, such as a
    # memory map beside it; so going back to the first settings starts afresh, too.
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        count_to(10, other, stop_after=2)
    assert Progress("sum", path, "λ = 2").resume()["index"] == 2  # it was replaced
    assert Progress("sum", path, "λ = 1").resume() is None


def test_nothing_is_saved_before_it_is_due(tmp_path):
    path = tmp_path / "state.pt"
    count_to(50, Progress("sum", path, save_every=3600))
    assert not path.exists()
    calls = []
    progress = Progress("sum", path, save_every=3600, report_every=3600)
    for index in range(10):
        progress.step(index, 10, lambda: calls.append("state") or {}, lambda: calls.append("figures") or {})
    assert calls == ["figures"]  # the last line is always told


@pytest.mark.parametrize("first", [0, 500])
def test_states_and_lines_come_once_an_interval(tmp_path, monkeypatch, capsys, first):
    now, saved = [0.0], []
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress("sum", tmp_path / "state.pt", report_every=10, save_every=60)
    for index in range(first, first + 200):
        now[0] += 1.0
        progress.step(index, 1000, lambda: saved.append(index) or {}, dict)  # noqa: B023
    assert [index - first for index in saved] == [59, 119, 179]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].endswith(f"10 s, {990 - first} s left")


def test_without_a_checkpoint_nothing_is_kept(capsys):
    before = signal.getsignal(signal.SIGTERM)
    progress = Progress("sum", save_every=0)
    assert progress.resume() is None and count_to(10, progress) == 45
    progress.finish()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "sum: 10/10  sum 45" in capsys.readouterr().out


def test_reports_say_where_the_loop_is(capsys):
    progress = Progress("sum", report_every=0)
    count_to(3, progress)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["sum: 1/3", "sum: 2/3", "sum: 3/3"]
    assert lines[-1].endswith("0 s left")


def test_a_save_that_fails_keeps_the_last_good_one(tmp_path):
    """A full disk, for instance: torch.save stops half-way."""
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        count_to(10, Progress("sum", path, save_every=0), stop_after=3)
    progress = Progress("sum", path, save_every=0)
    with pytest.raises(Exception, match="pickle"):
        progress.step(4, 10, lambda: {"index": 4, "sum": (i for i in "cannot be saved")}, dict)
    assert Progress("sum", path).resume()["index"] == 3
    progress.finish()
    assert list(tmp_path.iterdir()) == []


LOOP = """
import os, signal, sys
from pathlib import Path
from wmdd_core.progress import Progress
progress = Progress("loop", Path(sys.argv[1]), "stamp", save_every=3600)
for index in range(1000):
    if index == 3:
        for number in map(int, sys.argv[2:]):
            os.kill(os.getpid(), number)
    print("finished", index, flush=True)
    progress.step(index, 1000, lambda: {"next": index + 1}, dict)
"""


def run_loop(path: Path, *signals: int, ignored: bool = False) -> subprocess.CompletedProcess:
    """The loop above, which sends itself the signals in its fourth step."""
    heed = signal.SIG_IGN if ignored else signal.SIG_DFL
    return subprocess.run(
        [sys.executable, "-c", LOOP, path, *(str(int(number)) for number in signals)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, heed),  # ignored where tests run in the background
    )


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_stop_finishes_the_step_saves_and_exits_with_75(tmp_path, number):
    path = tmp_path / "state.pt"
    stopped = run_loop(path, number)
    assert stopped.returncode == RESUMABLE_EXIT == 75, stopped.stderr
    assert "finished 3" in stopped.stdout and "finished 4" not in stopped.stdout
    assert "told to stop" in stopped.stdout and stopped.stderr == ""
    assert Progress("loop", path, "stamp").resume() == {"next": 4}


def test_a_second_ctrl_c_ends_a_loop_at_once(tmp_path):
    stopped = run_loop(tmp_path / "state.pt", signal.SIGINT, signal.SIGINT)
    assert stopped.returncode == -signal.SIGINT and "finished 3" not in stopped.stdout
    assert not (tmp_path / "state.pt").exists()


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    stopped = run_loop(tmp_path / "state.pt", signal.SIGINT, ignored=True)
    assert stopped.returncode == 0 and "finished 999" in stopped.stdout


def test_a_disk_that_takes_no_more_is_told_with_the_checkpoints_name(tmp_path):
    progress = Progress("job", tmp_path / "job.pt", "stamp", save_every=0)
    progress.resume()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as told:
            progress.step(0, 10, lambda: {"value": torch.zeros(100_000)}, dict)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path / "job.pt")
