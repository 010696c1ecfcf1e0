"""What differs between devices: the KV pool and the attention over it. Everything else of a step is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from batchllm.executor.attention_cpu import CpuStepAttention
from batchllm.executor.forward_context import StepAttention
from batchllm.executor.kv_memory import KvMemory
from batchllm.executor.kv_pool import KvPool, LayerKv, bytes_per_token
from batchllm.executor.step import StepBatch


class Backend(Protocol):
    """Makes a pool, and for each step the attention that reads and writes that pool."""

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> KvMemory:
        """A pool of so many tokens, or of fewer where memory does not suffice. Raises JobError."""
        ...

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        """KV bytes of one token over all layers."""
        ...

    def attention(self, pool: Any, batch: StepBatch) -> StepAttention:
        """`pool` is one that this backend made."""
        ...


class CpuBackend:
    """Contiguous extents, and few large calls of torch's own attention."""

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> KvPool:
        return KvPool(layers, kv_tokens, dtype)

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        return bytes_per_token(layers, dtype)

    def attention(self, pool: KvPool, batch: StepBatch) -> CpuStepAttention:
        return CpuStepAttention(pool, batch)
