"""Shared-prefix attention of one step on pages: the kernels' counterpart of attention_cpu.

What a step's tokens read is the same on every device (Chunk, SharedRead); here it becomes one tile plan for each
sliding window, and each layer is one launch over all of them and one merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from batchllm_kernels.attention import AttentionOptions
from batchllm_kernels.kernel_set import KernelSet
from batchllm_kernels.tile_config import tile_config
from torch import Tensor

from batchllm.executor.paged_pool import PagedPool
from batchllm.executor.step_plans import PlanKind, Plans


@dataclass(frozen=True)
class StepTensors:
    """A step on the device: what StepBatch says of its T tokens."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    copy_from: Tensor | None = None  # int64 [C]
    copy_to: Tensor | None = None
    logit_rows: Tensor | None = None  # int64 [L]; None: every token's logits are read
    only_logits: bool = False  # in the last layer nothing but `logit_rows` matters


class PagedStepAttention:
    """`StepAttention` over a PagedPool, used by every layer of a step.

    Layers that write keys and values themselves (`slots`, `pool`) call `copy_shared` and `attend_written`.
    """

    def __init__(self, pool: PagedPool, step: StepTensors, plans: Plans, target: str, kernels: KernelSet):
        self.pool = pool
        self.step = step
        self.slots = step.slots.int()  # as the kernels are compiled for in the checked table
        self.logit_rows = step.logit_rows if step.only_logits else None
        self.positions = step.positions.int()
        self._plans = plans
        self._target = target
        self._kernels = kernels
        self._last_positions = None if self.logit_rows is None else self.positions[self.logit_rows]

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
        pages, in_page = self.slots // self.pool.page_size, self.slots % self.pool.page_size
        for buffer, new in ((self.pool.keys[layer], key), (self.pool.values[layer], value)):
            buffer[pages, :, in_page] = new.transpose(0, 1)
        self.copy_shared(layer)
        rows = query.transpose(0, 1)
        return self.attend_written(
            layer,
            rows if rows.stride(-1) == 1 else rows.contiguous(),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            last_only=last_only,
        )

    def copy_shared(self, layer: int) -> None:
        """What a node takes over from an earlier one, once this step's own keys and values are written."""
        if self.step.copy_from is not None and self.step.copy_to is not None and len(self.step.copy_to):
            self.pool.copy_slots(self.step.copy_from, self.step.copy_to, layer)

    def attend_written(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """query [T, Hq, Dk], of `logit_rows` alone with `last_only` → [T, Hq, Dv]. The step's keys are written."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        tokens, heads, dim = query.shape
        kv_heads, value_dim = keys.shape[1], values.shape[-1]
        if not tokens:  # a step in the middle of a long prompt: no token's logits are read
            return query.new_empty(0, heads, value_dim)
        config = tile_config(
            heads, kv_heads, dim, value_dim, self._target, self.pool.page_size, keys.dtype == torch.float32
        )
        positions = self._last_positions if last_only else self.positions
        assert positions is not None
        attended: Tensor = self._kernels.tree_attention(
            query,
            keys,
            values,
            positions,
            self._plans.of(PlanKind(config, heads, kv_heads, window, last_only)),
            config,
            AttentionOptions(scale, window, softcap),
            sinks,
        )
        return attended


def kernel_target(device: torch.device) -> str:
    """The device as tile_config names it."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def resident_programs(device: torch.device) -> int:
    """Programs of the attention kernel that run at once: two on each multiprocessor (docs/kernels.md)."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
