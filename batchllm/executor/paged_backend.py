"""The backend of a GPU: paged KV and the kernels of batchllm_kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchllm_kernels.kernel_set import KernelSet, TritonKernels
from batchllm_kernels.tile_config import best_page_size

from batchllm.executor.attention_paged import (
    PagedStepAttention,
    StepTensors,
    kernel_target,
    resident_programs,
)
from batchllm.executor.device_memory import largest_pool
from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.paged_pool import PagedPool
from batchllm.executor.step import StepBatch
from batchllm.executor.step_plans import Plans, StepPlans
from batchllm.executor.upload import upload


class PagedBackend:
    """On a GPU; on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

    def __init__(self, device: torch.device, page_size: int | None = None, kernels: KernelSet | None = None):
        """page_size: a power of two, at least 16; None: what suits the model's heads."""
        self.device = device
        self.page_size = page_size
        self.kernels: KernelSet = kernels or TritonKernels()
        self.target = kernel_target(device)
        self.resident_programs = resident_programs(device)

    def make_pool(self, layers: Sequence[LayerKv], kv_tokens: int, dtype: torch.dtype) -> PagedPool:
        best = min(best_page_size(layer.key_dim, layer.value_dim) for layer in layers)
        page_size = self.page_size or best
        return largest_pool(
            lambda tokens: PagedPool(layers, tokens, dtype, self.device, page_size), kv_tokens, page_size
        )

    def bytes_per_token(self, layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
        return sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize

    def release_kept(self) -> None:
        """Keeps none: torch's own cache of the device's memory is emptied where free memory is asked for."""

    def attention(self, pool: PagedPool, batch: StepBatch) -> PagedStepAttention:
        last = batch.logit_tokens()
        plans = StepPlans(batch, last, self.device, self.resident_programs)
        return self.attention_over(pool, self.tensors(batch, last is not None), plans)

    def attention_over(self, pool: PagedPool, step: StepTensors, plans: Plans) -> PagedStepAttention:
        return PagedStepAttention(pool, step, plans, self.target, self.kernels)

    def tensors(self, batch: StepBatch, only_logits: bool) -> StepTensors:
        """The step's arrays on the device, in one copy."""
        tokens, positions, slots, copy_from, copy_to, rows = upload(
            [batch.tokens, batch.positions, batch.slots, batch.copy_from, batch.copy_to, batch.logit_rows],
            self.device,
        )
        return StepTensors(tokens, positions, slots, copy_from, copy_to, rows, only_logits)
