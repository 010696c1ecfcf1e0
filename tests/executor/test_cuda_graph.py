"""Recording steps as CUDA graphs, on a stand-in for torch.cuda: what torch does not forgive is not done."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch

from batchllm.executor.cuda_graph import CudaRecorder, NoRecorder, recorder_for
from tests.executor.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    made.patch(monkeypatch)
    return made


def nothing() -> None:
    pass


def raising(error: Exception) -> Callable[[], None]:
    def step() -> None:
        raise error

    return step


def test_graphs_share_a_pool_while_one_of_them_is_alive(cuda: FakeCuda) -> None:
    recorder = CudaRecorder()
    first, second = recorder.record(nothing, []), recorder.record(nothing, [])
    assert first is not None and second is not None and cuda.pools == {1: 2}
    del first
    third = recorder.record(nothing, [])
    assert third is not None and cuda.pools == {1: 2}
    del second, third
    assert recorder.record(nothing, []) is not None, "torch takes no pool whose graphs are all gone"
    assert recorder.failure == "" and cuda.stream == "main"


def test_a_recording_is_never_interrupted_by_a_collection(cuda: FakeCuda) -> None:
    assert gc.isenabled()
    CudaRecorder().record(nothing, [])
    assert not cuda.collected and gc.isenabled()
    gc.disable()
    try:
        CudaRecorder().record(nothing, [])
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


def test_steps_that_wait_for_the_device_are_seen(cuda: FakeCuda) -> None:
    recorder, runs = CudaRecorder(), []
    assert recorder.watch(lambda: runs.append(cuda.debug_mode)) is None
    assert runs == [1] and cuda.debug_mode == 0
    obstacle = recorder.watch(cuda.wait)
    assert obstacle is not None and "waits for the device" in obstacle and ".py, line" in obstacle
    with pytest.raises(ValueError):
        recorder.watch(raising(ValueError()))
    assert cuda.debug_mode == 0


def test_other_warnings_of_a_watched_step_reach_the_user(cuda: FakeCuda) -> None:
    with pytest.warns(FutureWarning, match="soon"):
        assert CudaRecorder().watch(lambda: warnings.warn("soon", FutureWarning, stacklevel=1)) is None


def test_a_recording_that_fails_is_unwound_and_none_is_tried_again(cuda: FakeCuda) -> None:
    recorder = CudaRecorder()
    alive = recorder.record(nothing, [])
    assert recorder.record(cuda.wait, []) is None
    assert cuda.stream == "main" and gc.isenabled()
    assert cuda.underway == [] and cuda.pools == {1: 1}, (
        "the allocator counts nothing but the graph that is alive"
    )
    assert recorder.failure == "recording failed: operation failed due to a previous error during capture"
    assert recorder.record(nothing, []) is None
    assert alive is not None


def test_a_torch_that_unwinds_by_itself_is_left_alone(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given back twice would be another graph's."""
    recorder = CudaRecorder()
    alive = recorder.record(nothing, [])
    recording = torch.cuda.graph

    class Tidy(recording):  # type: ignore[misc, valid-type]
        def __exit__(self, kind: object, error: object, trace: object) -> None:
            cuda.underway.remove(self.pool)
            cuda.pools[self.pool] -= 1
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", Tidy)
    assert recorder.record(cuda.wait, []) is None
    assert cuda.underway == [] and cuda.pools == {1: 1} and alive is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory")])
def test_memory_that_runs_out_in_a_recording_is_for_the_engine(cuda: FakeCuda, error: Exception) -> None:
    recorder = CudaRecorder()
    with pytest.raises(RuntimeError):
        recorder.record(raising(error), [])
    assert cuda.stream == "main" and cuda.underway == [] and cuda.pools == {1: 0}
    assert recorder.record(nothing, []) is not None, "with more memory it may do"


def test_other_devices_have_no_graphs() -> None:
    recorder = recorder_for(torch.device("cpu"))
    runs: list[int] = []
    assert isinstance(recorder, NoRecorder)
    assert recorder.watch(lambda: runs.append(1)) == recorder.failure and runs == [1]
    assert recorder.record(nothing, []) is None
