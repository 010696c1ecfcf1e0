"""A step's kernel launches recorded once and replayed as one: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    def replay(self) -> None:
        """Runs what was recorded, on the tensors it was recorded with."""
        ...


class Recorder(Protocol):
    """Makes graphs of steps. Tests have one for CPUs that freezes all a CUDA graph would freeze."""

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        """Records `step`, which must have run before (so that nothing is compiled or set up in it any more).

        Afterwards `state`, the tensors that the step changes, is as it was. None where steps cannot be recorded.
        """
        ...


class CudaRecorder:
    """Recording runs nothing, so `state` is left alone. All graphs share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        """None where the step waits for the device, which cannot be recorded (some models' own modules do)."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


class NoRecorder:
    """For devices without graphs: every step is launched kernel by kernel."""

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> Graph | None:
        return None


def recorder_for(device: torch.device) -> Recorder:
    return CudaRecorder() if device.type == "cuda" else NoRecorder()
