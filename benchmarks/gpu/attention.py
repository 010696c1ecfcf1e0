"""Tree attention of one decode step and layer against what copying its KV takes, and against torch's own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from batchllm.executor.device_memory import is_out_of_memory
from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.step import StepBatch
from batchllm.executor.step_builder import Ancestor, StepBuilder
from benchmarks.gpu.clock import Rates, Timing, device_seconds_of


@dataclass(frozen=True)
class Case:
    """Rows that decode below `groups` nodes of `shared` tokens, each with `own` tokens of its own."""

    rows: int
    groups: int
    shared: int
    own: int

    @property
    def name(self) -> str:
        return f"{self.rows} rows, {self.groups} x {self.shared} shared, {self.own} own"


CASES = (
    Case(256, 0, 0, 1024),
    Case(1024, 0, 0, 256),
    Case(256, 16, 2000, 250),
    Case(1024, 64, 2000, 250),
    Case(1024, 1, 2000, 250),
    Case(64, 1, 8000, 128),
)
TINY = (Case(4, 0, 0, 20), Case(4, 2, 33, 9))
_HEADS, _KV_HEADS, _DIM = 32, 8, 128


def measure(device: torch.device, dtype: torch.dtype, rates: Rates, tiny: bool) -> list[dict[str, Any]]:
    heads, kv_heads, dim = (4, 2, 16) if tiny else (_HEADS, _KV_HEADS, _DIM)
    return [
        _case(case, (heads, kv_heads, dim), device, dtype, rates, tiny) for case in (TINY if tiny else CASES)
    ]


def _case(
    case: Case,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    rates: Rates,
    tiny: bool,
) -> dict[str, Any]:
    heads, kv_heads, dim = shape
    repeats = 1 if tiny else 100
    timed = _our_seconds(case, shape, dtype, device, repeats, 16 if tiny else None)
    theirs = _torch_seconds(case, shape, dtype, device, max(1, repeats // 5))
    ours = timed.seconds
    tokens = case.groups * case.shared + case.rows * case.own
    kv_bytes = tokens * 2 * kv_heads * dim * dtype.itemsize
    flops = 4 * case.rows * (case.own + (case.shared if case.groups else 0)) * heads * dim
    floor = max(kv_bytes / rates.copy_bytes, flops / rates.product_flops)
    return {
        "case": case.name,
        "microseconds": ours * 1e6,
        "by_graph": timed.by_graph,
        "of_floor": floor / ours,
        "kv_bytes_per_second": kv_bytes / ours,
        "torch_microseconds": None if theirs is None else theirs.seconds * 1e6,
        "torch_by_graph": None if theirs is None else theirs.by_graph,
        "times_torch": None if theirs is None else theirs.seconds / ours,
    }


def _our_seconds(
    case: Case,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    page_size: int | None,
) -> Timing:
    heads, kv_heads, dim = shape
    backend = PagedBackend(device, page_size)
    slots = case.groups * (case.shared + 64) + case.rows * (case.own + 64)
    pool = backend.make_pool([LayerKv(kv_heads, dim, dim)], slots, dtype)
    for part in (*pool.keys, *pool.values):
        part.normal_()
    attention = backend.attention(pool, _step(case, pool))
    query = torch.randn(case.rows, heads, dim, dtype=dtype, device=device)
    return device_seconds_of(lambda: attention.attend_written(0, query, scale=dim**-0.5), device, repeats)


def _step(case: Case, pool: Any) -> StepBatch:
    shared = [pool.allocate(case.shared, high=True) for _ in range(case.groups)]
    builder = StepBuilder()
    start = case.shared if case.groups else 0
    for row in range(case.rows):
        extent = pool.allocate(case.own)
        above: list[Ancestor] = []
        if case.groups:
            group = row * case.groups // case.rows
            above = [(group, shared[group], 0, case.shared)]
        builder.add_chunk(np.zeros(1, dtype=np.int64), start + case.own - 1, start, extent, above, 0)
    builder.read_all_logits()
    return builder.build()


def _torch_seconds(
    case: Case, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int
) -> Timing | None:
    """Every row over all it sees, side by side: the best case of a kernel that knows nothing of sharing."""
    heads, kv_heads, dim = shape
    length = case.own + (case.shared if case.groups else 0)
    try:
        query = torch.randn(case.rows, heads, 1, dim, dtype=dtype, device=device)
        key = torch.randn(case.rows, kv_heads, length, dim, dtype=dtype, device=device)
        value = torch.randn_like(key)
        return device_seconds_of(
            lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True), device, repeats
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
