"""Times on a device, and what it does at best: bytes copied and matrix products a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from batchllm.executor.cuda_graph import Graph, recorder_for
from batchllm.executor.device_memory import is_out_of_memory

_CALLS = 20  # in one graph


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, the mean of `repeats` after one that is not counted."""
    work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class Timing:
    """Of one call."""

    seconds: float
    by_graph: bool  # the device alone; else what the host takes for each call is in it


def device_seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """Calls that are short beside what Python takes for them: some of them are recorded, and replays are timed. Where
    they cannot be recorded, as `seconds_of`."""
    graph = _recorded(work, device)
    if graph is None:
        return Timing(seconds_of(work, device, repeats), False)
    return Timing(seconds_of(graph.replay, device, max(1, repeats // _CALLS)) / _CALLS, True)


def _recorded(work: Callable[[], object], device: torch.device) -> Graph | None:
    """A graph of _CALLS calls. None where there is none, for want of memory as well: single calls need less."""
    if device.type != "cuda":
        return None
    recorder = recorder_for(device)
    work()  # what is compiled or set up in the first call may wait for the device

    def calls() -> None:
        for _ in range(_CALLS):
            work()

    if recorder.watch(work) is not None:
        return None
    try:
        return recorder.record(calls, ())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


@dataclass(frozen=True)
class Rates:
    """Measured."""

    copy_bytes: float  # a second, read and written together
    product_flops: float  # a second, square matrices in the model's dtype


def measure_rates(device: torch.device, dtype: torch.dtype, tiny: bool) -> Rates:
    size = 1 << (16 if tiny else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, 2 if tiny else 20)
    width = 64 if tiny else 8192
    left = torch.randn(width, width, dtype=dtype, device=device)
    product = seconds_of(lambda: left @ left, device, 2 if tiny else 20)
    return Rates(2 * size / copy, 2 * width**3 / product)
