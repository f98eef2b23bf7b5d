"""When work is captured and what a replay reads, with a pretended graph; tests/test_gpu.py has real ones."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from wmdd_core import graphs
from wmdd_core.graphs import EAGER_CALLS, replayed


class Recorder:
    """Work that doubles a tensor into one buffer, and a graph that repeats it."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.captured, self.replays, self.result = None, 0, torch.zeros(2)
        self.current, self.captured_on, self.streams = 0, None, 0

    def work(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        if len(x) != 2:
            return 2 * x
        return self.result.copy_(2 * x)

    def replay(self) -> None:
        self.replays += 1
        self.captured = self.seen[-1] if self.captured is None else self.captured
        self.result.copy_(2 * self.captured)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorder)

    @contextmanager
    def device(chosen: torch.device):
        before, recorder.current = recorder.current, chosen.index or 0
        yield
        recorder.current = before

    def graph(_graph: Recorder, *, stream: int, **_: object):
        # What runs on another GPU would not be captured, and PyTorch makes a stream on the current one here.
        assert stream == recorder.current
        recorder.captured_on = stream
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)

    def stream(chosen: torch.device) -> int:
        recorder.streams += 1
        return chosen.index or 0

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    graphs._stream.cache_clear()
    yield recorder
    graphs._stream.cache_clear()


@pytest.mark.parametrize("index", [0, 1])
def test_work_is_captured_on_its_own_gpu(recorder, index):
    call = replayed(recorder.work, torch.device("cuda", index))
    for _ in range(EAGER_CALLS + 1):
        call(torch.ones(2))
    assert recorder.captured_on == index


def test_graphs_of_one_gpu_are_captured_on_one_stream(recorder):
    for index in (0, 1, 0):
        call = replayed(recorder.work, torch.device("cuda", index))
        for _ in range(EAGER_CALLS + 1):
            call(torch.ones(2))
    assert recorder.streams == 2


def test_the_first_calls_are_eager_and_later_ones_replay_the_capture_with_new_inputs(recorder):
    call = replayed(recorder.work, torch.device("cuda"))
    inputs = [torch.full((2,), float(i)) for i in range(EAGER_CALLS + 4)]
    for i, x in enumerate(inputs):
        assert call(x).tolist() == [2.0 * i] * 2
        assert recorder.replays == max(0, i + 1 - EAGER_CALLS)
    assert len(recorder.seen) == EAGER_CALLS + 1  # the last is the capture's own copy
    assert recorder.seen[EAGER_CALLS] is not inputs[EAGER_CALLS]
    assert (
        inputs[EAGER_CALLS].tolist() == [float(EAGER_CALLS)] * 2
    )  # which replays overwrite, not the caller's


def test_other_shapes_than_the_first_are_never_captured(recorder):
    call = replayed(recorder.work, torch.device("cuda"))
    for _ in range(EAGER_CALLS + 2):
        call(torch.ones(2))
        assert call(torch.ones(3)).tolist() == [2.0] * 3
    assert recorder.replays == 2
    assert sum(len(x) == 3 for x in recorder.seen) == EAGER_CALLS + 2


def test_on_a_cpu_work_stays_what_it_is(recorder):
    work = recorder.work
    assert replayed(work, torch.device("cpu")) is work
