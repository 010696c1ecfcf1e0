"""What differs between devices: the KV pool and the attention over it. Everything else of a step is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from batchllm.executor.attention_cpu import CpuStepAttention
from batchllm.executor.attention_native import NativeStepAttention, kernels_for
from batchllm.executor.forward_context import StepAttention
from batchllm.executor.kv_buffers import KeptBuffers, LayerKv
from batchllm.executor.kv_memory import KvMemory
from batchllm.executor.kv_pool import KvPool, bytes_per_token
from batchllm.executor.step import StepBatch


class Backend(Protocol):
    """Makes a pool, and for each step the attention that reads and writes that pool."""

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> KvMemory:
        """A pool of so many tokens, or of fewer where memory does not suffice. Raises JobError."""
        ...

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        """KV bytes of one token over all layers."""
        ...

    def release_kept(self) -> None:
        """Memory kept from an earlier pool goes back to the system, where it counts as free."""
        ...

    def attention(self, pool: Any, batch: StepBatch) -> StepAttention:
        """`pool` is one that this backend made."""
        ...


class CpuBackend:
    """Contiguous extents. Attention by our kernel in C where the machine can compile and run it, otherwise by large
    calls of torch's products."""

    def __init__(self, native: bool = True):
        self.native = native
        self._memory = KeptBuffers()

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> KvPool:
        if self.native:
            kernels_for(layers, dtype)  # compiled now rather than in the first step
        return KvPool(self._memory.lend(layers, kv_tokens, dtype))

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        return bytes_per_token(layers, dtype)

    def release_kept(self) -> None:
        self._memory.release()

    def attention(self, pool: KvPool, batch: StepBatch) -> StepAttention:
        kernels = kernels_for(pool.layers, pool.dtype) if self.native else None
        return CpuStepAttention(pool, batch) if kernels is None else NativeStepAttention(kernels, pool, batch)
