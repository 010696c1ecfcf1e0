"""Shared-prefix attention of one step on a CPU.

Each token's keys are split by who stores them, and each stored stretch is read once:
  - its own stretch: decode tokens whose stretches lie side by side are one batched call over a strided view of the
    pool; short prompt chunks are one padded call over a gathered copy; a long prompt chunk is a causal call, plus
    one for what its node held before;
  - every shared node above it: one call for all tokens below the node, with the query heads of a KV head packed
    into the row dimension.
Parts are merged by log-sum-exp in float32. Few, large calls matter: each one is a parallel region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchllm.executor.attention_math import attend_block, merge_into
from batchllm.executor.attention_plan import BlockLevel, BlockRead, PaddedGroup, Run, StepReads, plan_reads
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.step import StepBatch


class CpuStepAttention:
    """`StepAttention` over a KvPool. Built once per step, used by every layer."""

    def __init__(self, pool: KvPool, batch: StepBatch):
        self._pool = pool
        self._slots = torch.from_numpy(batch.slots)
        self._copy_from = torch.from_numpy(batch.copy_from)
        self._copy_to = torch.from_numpy(batch.copy_to)
        self._all = (batch.chunks, batch.shared_reads)
        self._last = batch.logit_tokens()
        self.logit_rows = None if self._last is None else torch.from_numpy(batch.logit_rows)
        self._reads: dict[tuple[int | None, bool], StepReads] = {}  # by sliding window and last_only

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
        dim, value_dim = self._pool.layers[layer].row_dim, value.shape[-1]
        self._store(layer, key, value)
        reads = self._planned(window, last_only, query.dtype)
        job = _LayerJob(_padded(query, dim), self._pool.keys[layer], self._pool.values[layer], scale, softcap)
        for run in reads.runs:
            job.own_run(run)
        for group in reads.padded:
            job.own_padded(group)
        for chunk in reads.causal:
            job.own_causal(chunk)
        for level in reads.levels:
            job.merge_level(level)
        if sinks is not None:
            # A sink is one more key with no value: it only takes its share of the softmax.
            job.output *= torch.sigmoid(job.lse - sinks.float()).unsqueeze(-1)
        return job.output[..., :value_dim].to(query.dtype)

    def _planned(self, window: int | None, last_only: bool, dtype: torch.dtype) -> StepReads:
        if (window, last_only) not in self._reads:
            work = self._last if last_only else self._all
            assert work is not None, "logits are read of every token"
            self._reads[window, last_only] = plan_reads(*work, window, dtype)
        return self._reads[window, last_only]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        dim = self._pool.layers[layer].row_dim
        for buffer, new in ((self._pool.keys[layer], key), (self._pool.values[layer], value)):
            buffer.index_copy_(0, self._slots, _padded(new, dim).transpose(0, 1))
            if len(self._copy_to):
                buffer.index_copy_(0, self._copy_to, buffer.index_select(0, self._copy_from))


class _LayerJob:
    """One layer of one step: fills `output` [T, Hq, D] and `lse` [T, Hq], both float32.

    Every token has exactly one own read, which writes its row; block reads are merged in afterwards.
    """

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None):
        self.query, self.keys, self.values = query, keys, values
        self.scale, self.softcap = scale, softcap
        heads, tokens, dim = query.shape
        self.heads, self.dim = heads, dim
        self.kv_heads, self.group = keys.shape[1], heads // keys.shape[1]
        self.output = torch.empty(tokens, heads, dim, dtype=torch.float32)
        self.lse = torch.empty(tokens, heads, dtype=torch.float32)

    def own_run(self, run: Run) -> None:
        """Single tokens over their own stretches: [r, Hkv, G, D] against [r, Hkv, longest, D]."""
        count = len(run.rows)
        packed = self.query.index_select(1, run.rows).view(self.kv_heads, self.group, count, self.dim)
        output, lse = attend_block(
            packed.permute(2, 0, 1, 3),
            self._own_stretches(self.keys, run),
            self._own_stretches(self.values, run),
            scale=self.scale,
            mask=run.mask,
            softcap=self.softcap,
        )
        self._write(run.rows, output.reshape(count, self.heads, self.dim), lse.reshape(count, self.heads))

    def _own_stretches(self, buffer: Tensor, run: Run) -> Tensor:
        count = len(run.rows)
        if run.slots is not None:
            gathered = buffer.index_select(0, run.slots.flatten())
            return gathered.view(count, run.longest, self.kv_heads, self.dim).transpose(1, 2)
        token, head, lane = buffer.stride()
        shape = (count, self.kv_heads, run.longest, self.dim)
        return buffer.as_strided(shape, (run.stride * token, head, token, lane), run.offset * token)

    def own_padded(self, group: PaddedGroup) -> None:
        """Short prompt chunks, padded to the longest: [b, Hq, n, D] against a gathered [b, Hkv, L, D]."""
        chunks, longest_query = group.rows.shape
        longest_key = group.slots.shape[1]
        query = self.query.index_select(1, group.rows.flatten()).view(
            self.heads, chunks, longest_query, self.dim
        )
        shape = (chunks, longest_key, self.kv_heads, self.dim)
        slots = group.slots.flatten()
        output, lse = attend_block(
            query.transpose(0, 1),
            self.keys.index_select(0, slots).view(shape).transpose(1, 2),
            self.values.index_select(0, slots).view(shape).transpose(1, 2),
            scale=self.scale,
            mask=group.mask,
            softcap=self.softcap,
        )
        flat = output.transpose(1, 2).reshape(-1, self.heads, self.dim)
        flat_lse = lse.transpose(1, 2).reshape(-1, self.heads)
        self._write(group.real_rows, flat[group.real], flat_lse[group.real])

    def own_causal(self, chunk: BlockRead) -> None:
        """A long prompt chunk over itself."""
        rows = slice(int(chunk.rows[0]), int(chunk.rows[-1]) + 1)
        output, lse = self._attend(self.query[:, rows].unsqueeze(0), chunk, causal=chunk.mask is None)
        self.output[rows] = output[0].transpose(0, 1)
        self.lse[rows] = lse[0].transpose(0, 1)

    def merge_level(self, level: BlockLevel) -> None:
        """Tokens over stretches that lie wholly before them: query heads packed into rows, no causal mask."""
        count = len(level.rows)
        grouped = self.query.reshape(self.kv_heads, self.group, -1, self.dim).transpose(1, 2)
        packed = grouped.index_select(1, level.rows).view(1, self.kv_heads, count * self.group, self.dim)
        outputs, lses, first = [], [], 0
        for block in level.blocks:
            rows = len(block.rows) * self.group
            mask = None if block.mask is None else block.mask.repeat_interleave(self.group, dim=2)
            output, lse = self._attend(packed[:, :, first : first + rows], block, causal=False, mask=mask)
            outputs.append(output)
            lses.append(lse)
            first += rows
        part = _joined(outputs).view(self.kv_heads, count, self.group, self.dim).transpose(0, 1)
        part_lse = _joined(lses).view(self.kv_heads, count, self.group).transpose(0, 1)
        merge_into(
            self.output,
            self.lse,
            part.reshape(count, self.heads, self.dim),
            part_lse.reshape(count, self.heads),
            level.rows,
        )

    def _attend(
        self, query: Tensor, block: BlockRead, causal: bool, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        stretch = slice(block.offset, block.offset + block.length)
        return attend_block(
            query,
            self.keys[stretch].transpose(0, 1).unsqueeze(0),
            self.values[stretch].transpose(0, 1).unsqueeze(0),
            scale=self.scale,
            mask=block.mask if mask is None else mask,
            causal=causal,
            softcap=self.softcap,
        )

    def _write(self, rows: Tensor, output: Tensor, lse: Tensor) -> None:
        self.output.index_copy_(0, rows, output.float())
        self.lse.index_copy_(0, rows, lse)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts [1, Hkv, rows, ...] one after another along the rows, contiguous."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=2)


def _padded(states: Tensor, dim: int) -> Tensor:
    missing = dim - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states
