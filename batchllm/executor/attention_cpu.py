"""Shared-prefix attention of one step on a CPU.

Each token's keys are split by who stores them, and each stored stretch is read once:
  - its own stretch: a run of decode tokens is one batched call, a prompt chunk is one causal call
    (plus one call for what the chunk's node held before);
  - every shared node above it: one call for all tokens below the node, with the query heads of a KV head packed
    into the row dimension.
Parts are merged by log-sum-exp in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchllm.executor.attention_math import attend_block, merge_into
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.step import Chunk, SharedRead, StepBatch


@dataclass(frozen=True)
class _Run:
    """Decode tokens whose extents lie one after another, equally long: one strided view reads them all."""

    rows: Tensor  # [r] flat indices
    offset: int  # slot of the first extent
    stride: int  # slots from one extent to the next
    lengths: Tensor  # [r] tokens to read in each extent
    positions: Tensor  # [r] absolute position of each query


@dataclass(frozen=True)
class _Read:
    """One shared node and the flat rows that read it."""

    rows: Tensor  # [n] flat indices
    positions: Tensor  # [n] absolute positions
    offset: int
    start: int  # absolute position of the node's first token
    length: int


class CpuStepAttention:
    """`StepAttention` over a KvPool. Built once per step, used by every layer."""

    def __init__(self, pool: KvPool, batch: StepBatch):
        self._pool = pool
        self._slots = torch.from_numpy(batch.slots)
        self._copy_from = torch.from_numpy(batch.copy_from)
        self._copy_to = torch.from_numpy(batch.copy_to)
        self._prompt_chunks = [chunk for chunk in batch.chunks if chunk.count > 1]
        self._runs = _find_runs([chunk for chunk in batch.chunks if chunk.count == 1])
        self._reads = [_node_read(read) for read in batch.shared_reads]
        self._masks: dict[tuple[object, ...], Tensor | None] = {}
        self.calls: list[int] = []  # layers that have called, in order

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
    ) -> Tensor:
        """See StepAttention.attend."""
        self.calls.append(layer)
        dim, value_dim = self._pool.layers[layer].row_dim, value.shape[-1]
        self._store(layer, key, value)
        job = _LayerJob(
            _padded(query, dim),
            self._pool.keys[layer],
            self._pool.values[layer],
            scale,
            window,
            softcap,
            self._masks,
        )
        for number, run in enumerate(self._runs):
            job.own_run(number, run)
        for chunk in self._prompt_chunks:
            job.own_chunk(chunk)
        for number, read in enumerate(self._reads):
            job.shared(number, read)
        if sinks is not None:
            # A sink is one more key with no value: it only takes its share of the softmax.
            job.output *= torch.sigmoid(job.lse - sinks.float()).unsqueeze(-1)
        return job.output[..., :value_dim].to(query.dtype)

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        dim = self._pool.layers[layer].row_dim
        for buffer, new in ((self._pool.keys[layer], key), (self._pool.values[layer], value)):
            buffer.index_copy_(0, self._slots, _padded(new, dim).transpose(0, 1))
            if len(self._copy_to):
                buffer.index_copy_(0, self._copy_to, buffer.index_select(0, self._copy_from))


class _LayerJob:
    """One layer of one step: fills `output` [T, Hq, D] and `lse` [T, Hq], both float32."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        masks: dict[tuple[object, ...], Tensor | None],
    ):
        self.query, self.keys, self.values = query, keys, values
        self.scale, self.window, self.softcap = scale, window, softcap
        self.masks = masks
        heads, tokens, dim = query.shape
        self.kv_heads, self.group = keys.shape[1], heads // keys.shape[1]
        self.output = torch.empty(tokens, heads, dim, dtype=torch.float32)
        self.lse = torch.empty(tokens, heads, dtype=torch.float32)

    def own_run(self, number: int, run: _Run) -> None:
        """Decode tokens over their own stretches: [r, Hkv, G, D] against a strided view of the pool."""
        rows, longest = len(run.rows), int(run.lengths.max())
        packed = (
            self.query.index_select(1, run.rows).view(self.kv_heads, self.group, rows, -1).permute(2, 0, 1, 3)
        )
        shape = (rows, self.kv_heads, longest, self.keys.shape[2])
        token, head, lane = self.keys.stride()
        strides, start = (run.stride * token, head, token, lane), run.offset * token
        output, lse = attend_block(
            packed,
            self.keys.as_strided(shape, strides, start),
            self.values.as_strided(shape, strides, start),
            scale=self.scale,
            mask=self._run_mask(number, run, longest),
            softcap=self.softcap,
        )
        self.output[run.rows] = output.reshape(rows, self.kv_heads * self.group, -1).float()
        self.lse[run.rows] = lse.reshape(rows, -1)

    def own_chunk(self, chunk: Chunk) -> None:
        """A piece of prompt over its own node: the piece itself causally, then what the node held before."""
        rows = slice(chunk.first, chunk.first + chunk.count)
        query = self.query[:, rows].unsqueeze(0)
        begin = chunk.extent.offset + chunk.held_before
        mask = _causal_window_mask(chunk.count, self.window, query.dtype)
        output, lse = self._attend(query, begin, chunk.count, mask, causal=mask is None)
        self.output[rows] = output[0].transpose(0, 1).float()
        self.lse[rows] = lse[0].transpose(0, 1)
        if chunk.held_before:
            positions = torch.arange(chunk.position, chunk.position + chunk.count)
            held = _Read(
                torch.arange(rows.start, rows.stop),
                positions,
                chunk.extent.offset,
                chunk.node_start,
                chunk.held_before,
            )
            self.shared(("held", chunk.first), held)

    def shared(self, number: object, read: _Read) -> None:
        """Tokens over a stretch that lies wholly before them: query heads packed into rows, no causal mask."""
        visible = self._window_rows(number, read)
        if visible is None:
            return
        rows, begin, length, mask = visible
        count = len(rows)
        packed = self.query.index_select(1, rows).reshape(1, self.kv_heads, self.group * count, -1)
        output, lse = self._attend(packed, begin, length, mask, causal=False)
        heads = self.kv_heads * self.group
        part = output.reshape(heads, count, -1).transpose(0, 1)
        merge_into(self.output, self.lse, part, lse.reshape(heads, count).transpose(0, 1), rows)

    def _attend(
        self, query: Tensor, begin: int, length: int, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        keys = self.keys[begin : begin + length].transpose(0, 1).unsqueeze(0)
        values = self.values[begin : begin + length].transpose(0, 1).unsqueeze(0)
        return attend_block(
            query, keys, values, scale=self.scale, mask=mask, causal=causal, softcap=self.softcap
        )

    def _run_mask(self, number: int, run: _Run, longest: int) -> Tensor | None:
        """[r, 1, 1, longest]: hides slots beyond each row's length or before its window."""
        cache_key = ("run", number, self.window)
        if cache_key not in self.masks:
            slot = torch.arange(longest)
            hidden = slot >= run.lengths.unsqueeze(1)
            if self.window is not None:
                hidden |= slot < (run.lengths - self.window).unsqueeze(1)
            mask = _additive(hidden, self.query.dtype)[:, None, None] if bool(hidden.any()) else None
            self.masks[cache_key] = mask
        return self.masks[cache_key]

    def _window_rows(self, number: object, read: _Read) -> tuple[Tensor, int, int, Tensor | None] | None:
        """Which rows still see the stretch, and how much of it: (rows, first slot, length, mask), or None."""
        if self.window is None:
            return read.rows, read.offset, read.length, None
        first_seen = read.positions - (self.window - 1)
        seeing = first_seen < read.start + read.length
        if not bool(seeing.any()):
            return None
        rows, first_seen = read.rows[seeing], first_seen[seeing]
        skipped = max(0, int(first_seen.min()) - read.start)
        position = torch.arange(read.start + skipped, read.start + read.length)
        hidden = position < first_seen.unsqueeze(1)
        mask = None
        if bool(hidden.any()):  # rows are packed as [G, n]
            mask = _additive(hidden, self.query.dtype).repeat(self.group, 1)[None, None]
        return rows, read.offset + skipped, read.length - skipped, mask


def _find_runs(chunks: Sequence[Chunk]) -> list[_Run]:
    """Groups single tokens whose extents are neighbours of equal capacity."""
    ordered = sorted(chunks, key=lambda chunk: chunk.extent.offset)
    groups: list[list[Chunk]] = []
    for chunk in ordered:
        if groups and _follows(groups[-1][-1], chunk):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return [_run_of(group) for group in groups]


def _follows(previous: Chunk, chunk: Chunk) -> bool:
    return chunk.extent.capacity == previous.extent.capacity and chunk.extent.offset == previous.extent.end


def _run_of(chunks: Sequence[Chunk]) -> _Run:
    return _Run(
        rows=torch.tensor([chunk.first for chunk in chunks]),
        offset=chunks[0].extent.offset,
        stride=chunks[0].extent.capacity,
        lengths=torch.tensor([chunk.held_before + 1 for chunk in chunks]),
        positions=torch.tensor([chunk.position for chunk in chunks]),
    )


def _node_read(read: SharedRead) -> _Read:
    rows = np.concatenate([np.arange(chunk.first, chunk.first + chunk.count) for chunk in read.chunks])
    positions = np.concatenate(
        [np.arange(chunk.position, chunk.position + chunk.count) for chunk in read.chunks]
    )
    return _Read(
        torch.from_numpy(rows), torch.from_numpy(positions), read.extent.offset, read.start, read.length
    )


def _causal_window_mask(count: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """[1, 1, n, n] when the window is shorter than the chunk, else None: the kernel's own causal mask does."""
    if window is None or count <= window:
        return None
    distance = torch.arange(count).unsqueeze(1) - torch.arange(count)
    return _additive((distance < 0) | (distance >= window), dtype)[None, None]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _padded(states: Tensor, dim: int) -> Tensor:
    missing = dim - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states
