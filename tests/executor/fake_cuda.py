"""What of torch.cuda a recorder of graphs uses, as torch 2.11 behaves: pools that die with their last graph, streams
that stay where a recording fails, an allocator that goes on counting it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

WAITS = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:158.)"


class FakeCuda:
    """State of the device. `patch` puts it in torch.cuda's place."""

    def __init__(self) -> None:
        self.stream = "main"
        self.pools: dict[int, int] = {}  # graphs that use it
        self.underway: list[int] = []  # pools that are recorded into
        self.handles = 0
        self.debug_mode = 0
        self.collected = False  # whether Python collected garbage in a recording

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = self

        class Graph:
            pool: int | None = None

            def reset(self) -> None:
                if self.pool is not None:
                    here.pools[self.pool] -= 1
                    self.pool = None

            def replay(self) -> None:
                pass

            def __del__(self) -> None:
                self.reset()

        class Recording:
            def __init__(self, graph: Any, pool: int):
                self.graph, self.pool = graph, pool

            def __enter__(self) -> None:
                self.before, here.stream = here.stream, "recording"
                if here.pools.get(self.pool, 1) == 0:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                here.pools[self.pool] = here.pools.get(self.pool, 0) + 1
                here.underway.append(self.pool)
                here.collected |= gc.isenabled()

            def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
                if "not permitted" in str(error):
                    raise RuntimeError("operation failed due to a previous error during capture")
                here.underway.remove(self.pool)
                self.graph.pool = self.pool
                here.stream = self.before

        cuda: dict[str, Callable[..., Any]] = {
            "CUDAGraph": Graph,
            "graph": Recording,
            "graph_pool_handle": self._next_handle,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "get_sync_debug_mode": lambda: self.debug_mode,
            "set_sync_debug_mode": self._set_debug_mode,
            "synchronize": lambda *_: None,
            "current_device": lambda: 0,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release, raising=False)

    def wait(self) -> None:
        """An operation that waits for the device."""
        if self.underway:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.debug_mode:
            warnings.warn(WAITS, stacklevel=2)

    def _next_handle(self) -> int:
        self.handles += 1
        return self.handles

    def _set_debug_mode(self, mode: int | str) -> None:
        self.debug_mode = {"default": 0, "warn": 1, "error": 2}.get(str(mode), mode)  # type: ignore[assignment]

    def _end_allocate(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _release(self, device: int, pool: int) -> None:
        self.pools[pool] -= 1
