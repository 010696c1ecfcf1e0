"""Shared-prefix attention of one step on a CPU: products of matrices around one softmax.

For each band of rows (see attention_reads) the scores of all its reads are written side by side into one buffer, one
softmax runs over it, and each read adds its share of the values:
  - a node above: one product for all rows below it, with the query heads of a KV head packed into the row dimension;
  - decode tokens' own stretches that lie side by side: one batched product for each KV head over a strided view;
  - prompt chunks over themselves, in tiles.
Nothing is merged afterwards. Scores are in the model's dtype, as in transformers' eager attention; softmax and the
sums inside products are in float32. On CPUs with bfloat16 products this is about twice as fast as torch's flash kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchllm.executor.attention_math import add_product, products, scores
from batchllm.executor.attention_plan import plan_reads
from batchllm.executor.attention_reads import Band, NodeRead, OwnRead, Run, StepReads
from batchllm.executor.kv_pool import KvPool, KvWriter
from batchllm.executor.pool_attention import PoolAttention
from batchllm.executor.step import StepBatch


class CpuStepAttention(PoolAttention):
    """`StepAttention` over a KvPool. Built once per step, used by every layer."""

    def __init__(self, pool: KvPool, batch: StepBatch):
        super().__init__(pool, batch, KvWriter(pool, batch))
        # By window, last_only, query heads and whether reads are kept apart.
        self._reads: dict[tuple[int | None, bool, int, bool], StepReads] = {}
        self._scratch = torch.empty(0)

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
        self._writer.write(layer, key, value)
        reads = self._planned(window, last_only, query)
        heads, kv_heads, value_dim = len(query), len(key), value.shape[-1]
        if reads.order is not None:
            query = query.index_select(1, reads.order)
        packed = torch.empty(kv_heads, query.shape[1], heads // kv_heads, query.shape[2], dtype=query.dtype)
        by_kv_head = query.unflatten(0, (kv_heads, -1))  # type: ignore[no-untyped-call]
        torch.mul(by_kv_head.transpose(1, 2), scale, out=packed)
        output = torch.empty(*packed.shape[:3], value_dim, dtype=query.dtype)
        job = _LayerJob(
            packed,
            self._pool.keys[layer][..., : key.shape[-1]],
            self._pool.values[layer][..., :value_dim],
            output,
            softcap,
            None if sinks is None else sinks.view(kv_heads, 1, -1).to(query.dtype),
        )
        self._run(job, reads)
        if reads.mixed and math.isnan(output.sum()):
            # A mask hides numbers only: NaN of one sequence would be in others, and long after its end.
            self._run(job, self._planned(window, last_only, query, apart=True))
        return self._unpacked(output, reads)

    def _planned(self, window: int | None, last_only: bool, query: Tensor, apart: bool = False) -> StepReads:
        key = (window, last_only, len(query), apart)
        if key not in self._reads:
            self._reads[key] = plan_reads(*self._work(last_only), window, query.dtype, len(query), apart)
        return self._reads[key]

    def _run(self, job: _LayerJob, reads: StepReads) -> None:
        for band in reads.bands:
            job.attend(band, self._buffer(band, job.kv_heads * job.group, job.query.dtype))

    def _buffer(self, band: Band, heads: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer for a band's scores, kept from band to band: fresh memory is slow."""
        size = heads * (band.last - band.first) * (band.width + 1)
        if self._scratch.numel() < size or self._scratch.dtype != dtype:
            self._scratch = torch.empty(size, dtype=dtype)
        return self._scratch

    @staticmethod
    def _unpacked(output: Tensor, reads: StepReads) -> Tensor:
        """[Hkv, T, G, Dv] in tree order → [T, Hq, Dv] in the order of the step."""
        kv_heads, rows, group, dim = output.shape
        by_row = output.transpose(0, 1).reshape(rows, kv_heads * group, dim)
        if reads.order is None:
            return by_row
        return torch.empty_like(by_row).index_copy_(0, reads.order, by_row)


class _LayerJob:
    """One layer of one step. Rows are in tree order: query [Hkv, T, G, D], scaled; output [Hkv, T, G, Dv]."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        softcap: float | None,
        sinks: Tensor | None,  # [Hkv, 1, G]
    ):
        self.query, self.keys, self.values, self.output = query, keys, values, output
        self.softcap, self.sinks = softcap, sinks
        self.kv_heads, _, self.group, self.dim = query.shape

    def attend(self, band: Band, buffer: Tensor) -> None:
        rows = band.last - band.first
        width = band.width + (self.sinks is not None)
        shape = (self.kv_heads, rows, self.group, width)
        raw = buffer[: self.kv_heads * rows * self.group * width].view(shape)
        for read in band.reads:
            self._score(read, raw[:, read.first - band.first : read.last - band.first])
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        self._hide(band, raw)
        if self.sinks is not None:
            raw[..., -1] = self.sinks  # one more key with no value: it only takes its share of the softmax
        weights = torch.softmax(
            raw, dim=-1, out=raw
        )  # in place: half the memory that passes through the cache
        for read in band.reads:
            self._gather(read, weights[:, read.first - band.first : read.last - band.first])

    def _hide(self, band: Band, raw: Tensor) -> None:
        for fill in band.fills:
            raw[:, fill.first - band.first : fill.last - band.first, :, fill.columns] = float("-inf")
        for own in (*band.runs, *band.tiles):
            if own.mask is not None:
                cells = raw[:, own.first - band.first : own.last - band.first]
                cells[..., own.mask_from : own.width].add_(own.mask)
        for node in band.nodes:
            if node.mask is not None:
                cells = raw[:, node.first - band.first : node.last - band.first]
                cells[..., node.column : node.column + node.length].add_(node.mask)

    def _score(self, read: OwnRead | NodeRead, cells: Tensor) -> None:
        """Writes the scores of one read into its rows' cells [Hkv, rows, G, width]."""
        query = self.query[:, read.first : read.last]
        if isinstance(read, Run) and read.last - read.first > 1:
            keys = self._own_stretches(self.keys, read)
            for head in range(self.kv_heads):
                scores(query[head], keys[:, :, head], cells[head, :, :, : read.width])
        else:
            column = read.column if isinstance(read, NodeRead) else 0
            keys = self._stretch(self.keys, read)
            part = cells[..., column : column + keys.shape[1]]
            scores(_packed(query), keys, _packed(part))

    def _gather(self, read: OwnRead | NodeRead, cells: Tensor) -> None:
        """Writes (own reads) or adds (nodes) the values of one read, weighted."""
        output = self.output[:, read.first : read.last]
        if isinstance(read, Run) and read.last - read.first > 1:
            values = self._own_stretches(self.values, read)
            for head in range(self.kv_heads):
                products(cells[head, :, :, : read.width], values[:, :, head], output[head])
            return
        column = read.column if isinstance(read, NodeRead) else 0
        values = self._stretch(self.values, read)
        part = cells[..., column : column + values.shape[1]]
        write = add_product if isinstance(read, NodeRead) else products
        write(_packed(part), values, _packed(output))

    def _stretch(self, buffer: Tensor, read: OwnRead | NodeRead) -> Tensor:
        """[Hkv, width, D] of a tile, of a node, or of a run of one row."""
        if isinstance(read, NodeRead):
            return buffer[read.offset : read.offset + read.length].transpose(0, 1)
        if read.slots is not None:
            return buffer.index_select(0, read.slots.flatten()).transpose(0, 1)
        return buffer[read.offset : read.offset + read.width].transpose(0, 1)

    def _own_stretches(self, buffer: Tensor, run: Run) -> Tensor:
        """[rows, width, Hkv, D]"""
        count = run.last - run.first
        shape = (count, run.width, self.kv_heads, buffer.shape[-1])
        if run.slots is not None:
            return buffer.index_select(0, run.slots.flatten()).view(shape)
        token, head, lane = buffer.stride()
        return buffer.as_strided(
            shape, (run.stride * token, token, head, lane), buffer.storage_offset() + run.offset * token
        )


def _packed(states: Tensor) -> Tensor:
    """[Hkv, n, G, X] → [Hkv, n * G, X], a view."""
    kv_heads, rows, group, size = states.shape
    return states.view(kv_heads, rows * group, size)
