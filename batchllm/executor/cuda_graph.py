"""A step's kernel launches recorded once and replayed as one: CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from batchllm.collection import no_collection
from batchllm.executor.device_memory import is_out_of_memory

_WAITS = "synchronizing"  # in the warning that torch gives for an operation that waits for the device
_NO_GRAPHS = "the device has no graphs"


class Graph(Protocol):
    def replay(self) -> None:
        """Runs what was recorded, on the tensors it was recorded with."""
        ...


class Recorder(Protocol):
    """Makes graphs of steps. Tests have one for CPUs that freezes all a CUDA graph would freeze."""

    failure: str  # why the last `record` gave None

    def watch(self, step: Callable[[], object]) -> str | None:
        """Runs `step`. Says what in it cannot be recorded; None where nothing of the kind was seen."""
        ...

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        """Records `step`, which must have run before (so that nothing is compiled or set up in it any more) and have
        been found recordable by `watch`.

        Afterwards `state`, the tensors that the step changes, is as it was. None where it cannot be recorded after all.
        """
        ...


class CudaRecorder:
    """Recording runs nothing, so `state` is left alone. Graphs share a pool of memory while any of them is alive."""

    def __init__(self) -> None:
        self.failure = ""
        self._pool: Any = None
        self._graphs: WeakSet[Any] = WeakSet()  # that live in the pool

    def watch(self, step: Callable[[], object]) -> str | None:
        """What waits for the device cannot be recorded, and must not be tried: torch up to 2.11 does not recover from
        a recording that fails. So torch is asked to warn of it."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in caught if _WAITS in str(warning.message)]
        for warning in caught:
            if warning not in waits:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if not waits:
            return None
        return f"{Path(waits[0].filename).name}, line {waits[0].lineno}, waits for the device"

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        """None, from then on always, where torch could not record the step."""
        if self.failure:
            return None
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # torch refuses a pool whose last graph is gone
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with no_collection(), torch.cuda.graph(graph, pool=self._pool):
                step()
        except RuntimeError as error:
            _unwind(graph, self._pool)
            if is_out_of_memory(error):
                raise
            self.failure = f"recording failed: {(str(error).splitlines() or [''])[0]}"
            return None
        finally:
            torch.cuda.set_stream(stream)  # torch.cuda.graph does not, where it fails on its way in or out
        self._graphs.add(graph)
        return graph


class NoRecorder:
    """For devices without graphs: every step is launched kernel by kernel."""

    failure = _NO_GRAPHS

    def watch(self, step: Callable[[], object]) -> str | None:
        step()
        return _NO_GRAPHS

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        return None


def recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder() if device.type == "cuda" else NoRecorder()


def _unwind(graph: Any, pool: Any) -> None:
    """Ends a recording that failed, as far as torch has left it open.

    Up to 2.11 torch's allocator goes on counting it as under way, and then frees nothing any more. Where it does not,
    the first of the two calls raises and the second, which would then take another graph's share, is not made.
    """
    torch.cuda.synchronize()
    with suppress(RuntimeError):
        graph.reset()
    if hasattr(torch._C, "_cuda_endAllocateToPool") and hasattr(torch._C, "_cuda_releasePool"):
        device = torch.cuda.current_device()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
