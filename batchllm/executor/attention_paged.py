"""Shared-prefix attention of one step on pages: the kernels' counterpart of attention_cpu.

What a step's tokens read is the same on every device (Chunk, SharedRead); here it becomes one tile plan for each
sliding window, and each layer is one launch over all of them and one merge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchllm_kernels.attention import AttentionOptions, tree_attention
from batchllm_kernels.device_plan import DevicePlan
from batchllm_kernels.tile_config import TileConfig, best_page_size, tile_config
from batchllm_kernels.tile_plan import Ints, KvReads, plan_tiles
from torch import Tensor

from batchllm.executor.device_memory import largest_pool
from batchllm.executor.kv_pool import LayerKv
from batchllm.executor.paged_pool import PagedExtent, PagedPool
from batchllm.executor.step import Chunk, SharedRead, StepBatch


class PagedBackend:
    """Pages and the tree attention kernels, on a GPU; on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

    def __init__(self, device: torch.device, page_size: int | None = None):
        """page_size: a power of two, at least 16; None: what suits the model's heads."""
        self.device = device
        self.page_size = page_size
        self.target = _target(device)
        self.resident_programs = _resident_programs(device)

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> PagedPool:
        best = min(best_page_size(layer.key_dim, layer.value_dim) for layer in layers)
        page_size = self.page_size or best
        return largest_pool(
            lambda tokens: PagedPool(layers, tokens, dtype, self.device, page_size), kv_tokens, page_size
        )

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        return sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize

    def attention(self, pool: PagedPool, batch: StepBatch) -> PagedStepAttention:
        return PagedStepAttention(pool, batch, self.target, self.resident_programs)


def _target(device: torch.device) -> str:
    """The device as tile_config names it."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _resident_programs(device: torch.device) -> int:
    """Programs of the attention kernel that run at once: two on each multiprocessor (docs/kernels.md)."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


class PagedStepAttention:
    """`StepAttention` over a PagedPool. Built once per step, used by every layer."""

    def __init__(self, pool: PagedPool, batch: StepBatch, target: str, resident_programs: int):
        self._pool = pool
        self._target = target
        self._resident_programs = resident_programs
        self._device = pool.keys[0].device
        self._batch = batch
        self._last = batch.logit_tokens()
        slots = self._on_device(batch.slots)
        self._pages, self._in_page = slots // pool.page_size, slots % pool.page_size
        self._copy_from, self._copy_to = self._on_device(batch.copy_from), self._on_device(batch.copy_to)
        self._positions = self._on_device(batch.positions).int()
        self.logit_rows = None if self._last is None else self._on_device(batch.logit_rows)
        self._plans: dict[tuple[TileConfig, int, int, int | None, bool], DevicePlan] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        last_only: bool = False,
    ) -> Tensor:
        """See StepAttention.attend."""
        self._store(layer, key, value)
        heads, tokens, dim = query.shape
        kv_heads, _, value_dim = value.shape
        if not tokens:  # a step in the middle of a long prompt: no token's logits are read
            return query.new_empty(0, heads, value_dim)
        config = tile_config(heads, kv_heads, dim, value_dim, self._target, self._pool.page_size)
        rows = query.transpose(0, 1)
        attended: Tensor = tree_attention(
            rows if rows.stride(-1) == 1 else rows.contiguous(),
            self._pool.keys[layer],
            self._pool.values[layer],
            self._positions[self.logit_rows] if last_only else self._positions,
            self._planned(config, heads, kv_heads, window, last_only),
            config,
            AttentionOptions(scale, window, softcap),
            sinks,
        )
        return attended

    def _planned(
        self, config: TileConfig, heads: int, kv_heads: int, window: int | None, last_only: bool
    ) -> DevicePlan:
        kind = (config, heads, kv_heads, window, last_only)
        if kind not in self._plans:
            work = self._last if last_only else (self._batch.chunks, self._batch.shared_reads)
            assert work is not None, "logits are read of every token"
            positions = self._batch.positions[self._batch.logit_rows] if last_only else self._batch.positions
            plan = plan_tiles(
                kv_reads(*work, positions),
                config.tile_shape(heads, kv_heads),
                window=window,
                resident_programs=self._resident_programs,
            )
            self._plans[kind] = DevicePlan.of(plan, self._device)
        return self._plans[kind]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        for buffer, new in ((self._pool.keys[layer], key), (self._pool.values[layer], value)):
            buffer[self._pages, :, self._in_page] = new.transpose(0, 1)
        if len(self._copy_to):
            self._pool.copy_slots(self._copy_from, self._copy_to, layer)

    def _on_device(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def kv_reads(chunks: Sequence[Chunk], shared_reads: Sequence[SharedRead], positions: Ints) -> KvReads:
    """What the rows of a step read, on pages: every chunk its own node as far as it is computed, and every shared
    node its readers."""
    start = [chunk.node_start for chunk in chunks] + [read.start for read in shared_reads]
    length = [chunk.held_before + chunk.count for chunk in chunks] + [read.length for read in shared_reads]
    extents = [chunk.extent for chunk in chunks] + [read.extent for read in shared_reads]
    pages = [_pages(extent) for extent in extents]
    readers = [(chunk,) for chunk in chunks] + [tuple(read.chunks) for read in shared_reads]
    first = np.array([chunk.first for group in readers for chunk in group])
    count = np.array([chunk.count for group in readers for chunk in group])
    chunk_ptr = np.cumsum([0, *count])
    return KvReads(
        positions=positions,
        start=np.array(start),
        length=np.array(length),
        page_ptr=np.cumsum([0, *map(len, pages)]),
        pages=np.concatenate(pages),
        row_ptr=chunk_ptr[np.cumsum([0, *map(len, readers)])],
        rows=np.arange(chunk_ptr[-1]) + np.repeat(first - chunk_ptr[:-1], count),
    )


def _pages(extent: object) -> Ints:
    assert isinstance(extent, PagedExtent), "a step over extents of another pool"
    return extent.pages
