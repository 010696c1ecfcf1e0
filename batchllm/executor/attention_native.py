"""Shared-prefix attention of one step on a CPU, by the kernel in C. Results are those of `attention_cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from batchllm_kernels.cpu.attention import MAX_VALUE_DIM, TiledReads, attend, make_job
from batchllm_kernels.cpu.decoder_layer import LayerStep
from batchllm_kernels.cpu.layer import store_kv
from torch import Tensor

from batchllm.executor.attention_tiles import plan_tiles
from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.kv_pool import KvPool, KvWriter
from batchllm.executor.native import native_kernels
from batchllm.executor.pool_attention import PoolAttention
from batchllm.executor.step import StepBatch


def kernels_for(layers: Sequence[LayerKv], dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels, if this model and this machine can use them."""
    if any(layer.key_dim % 2 or layer.value_dim > MAX_VALUE_DIM for layer in layers):
        return None
    return native_kernels(dtype)


class NativeStepAttention(PoolAttention):
    """`StepAttention` over a KvPool, in bfloat16. Built once per step, used by every layer."""

    def __init__(self, kernels: ctypes.CDLL, pool: KvPool, batch: StepBatch):
        super().__init__(pool, batch, NativeWriter(kernels, pool, batch))
        self._kernels = kernels
        self._reads: dict[tuple[int, bool], TiledReads] = {}  # by query heads of a KV head, and last_only
        self.shared: LayerStep | None = None  # what whole layers share (whole_layer)

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
        heads, tokens, key_dim = query.shape
        output = torch.empty(tokens, heads, value.shape[-1], dtype=query.dtype)
        job = make_job(
            self.reads(heads // len(key), last_only),
            _dense_rows(query).transpose(0, 1),
            self._pool.keys[layer][..., :key_dim],
            self._pool.values[layer][..., : value.shape[-1]],
            output,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.float().contiguous(),
        )
        attend(self._kernels, job)
        return output

    def plain_pool(self, layer: int, heads: int, dim: int) -> tuple[Tensor, Tensor] | None:
        """The layer's keys and values [slots, heads, dim]; None where slots are wider, or writing them is not all."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        is_plain = keys.shape[1:] == values.shape[1:] == (heads, dim)
        return (keys, values) if is_plain and not self._writer.copies else None

    @property
    def slots(self) -> Tensor:
        """int64 [T] where the step's keys and values go."""
        return self._writer.slots

    def reads(self, group: int, last_only: bool = False) -> TiledReads:
        key = (group, last_only)
        if key not in self._reads:
            self._reads[key] = plan_tiles(*self._work(last_only), group, torch.get_num_threads())
        return self._reads[key]


class NativeWriter(KvWriter):
    """In one pass over keys and values, where a token takes a slot's full width."""

    def __init__(self, kernels: ctypes.CDLL, pool: KvPool, batch: StepBatch):
        super().__init__(pool, batch)
        self._kernels = kernels

    def _store(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        if key.shape[1:] != keys.shape[1:] or value.shape[1:] != values.shape[1:]:
            super()._store(keys, values, key, value)
            return
        pool = keys.flatten(1), values.flatten(1)
        store_kv(self._kernels, key.flatten(1), value.flatten(1), *pool, self.slots)


def _dense_rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
