"""The torch references as a KernelSet: what the kernels compute, on a CPU, from the very arrays they would read.

Where the interpreter is too slow: whole runs of an engine in tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm_kernels.attention import AttentionOptions
from batchllm_kernels.device_plan import DevicePlan
from batchllm_kernels.gated_activation import silu_and_mul_reference
from batchllm_kernels.reference import reference_attention
from batchllm_kernels.rms_norm import rms_norm_reference
from batchllm_kernels.rope_kv_write import rope_kv_write_reference
from batchllm_kernels.sampler import sample_tokens_reference
from batchllm_kernels.tile_config import TileConfig
from batchllm_kernels.tile_plan import TILE_COLUMNS, TilePlan
from batchllm_kernels.token_logprobs import token_logprobs_reference


class TorchKernels:
    """`noise(keys, indices, vocabulary)`: Gumbel noise [n, V] for `sample_tokens`."""

    def __init__(self, noise: Any = None) -> None:
        self._noise = noise

    def rms_norm(
        self, states: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        normed, total = rms_norm_reference(states, weight, epsilon, residual=residual)
        if residual is not None and total is not None:
            residual.copy_(total)
        return normed

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return silu_and_mul_reference(gate_up)

    def rope_kv_write(self, *tensors: Tensor, **options: Any) -> Tensor:
        return rope_kv_write_reference(*tensors, **options)

    def tree_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        plan: DevicePlan,
        config: TileConfig,
        options: AttentionOptions,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return reference_attention(
            query,
            keys,
            values,
            positions,
            read_back(plan),
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=sinks,
        )

    def sample_tokens(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        keys: Tensor,
        indices: Tensor,
    ) -> Tensor:
        noise = self._noise(keys, indices, logits.shape[1]) if self._noise else torch.zeros(logits.shape)
        return sample_tokens_reference(logits, temperature, top_k, top_p, min_p, noise)

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return token_logprobs_reference(logits, tokens).float()


def read_back(plan: DevicePlan) -> TilePlan:
    """The plan that the device's arrays describe."""

    def used(name: str, count: int) -> NDArray[np.int32]:
        found: NDArray[np.int32] = plan.array(name)[:count].cpu().numpy()
        return found

    tiles = used("tiles", int(plan.array("num_tiles")) * TILE_COLUMNS).reshape(-1, TILE_COLUMNS)
    rows = int((tiles[:, 0] + tiles[:, 1]).max()) if len(tiles) else 0
    entries = int(tiles[:, 4].max()) if len(tiles) else 0
    merges = int(plan.array("num_merge_rows"))
    merge_ptr = used("merge_ptr", merges + 1)
    return TilePlan(
        tiles=tiles,
        tile_rows=used("tile_rows", rows),
        tile_slots=used("tile_slots", rows),
        entry_pages=used("entry_pages", entries),
        entry_positions=used("entry_positions", entries),
        entry_fills=used("entry_fills", entries),
        merge_rows=used("merge_rows", merges),
        merge_ptr=merge_ptr,
        num_slots=int(merge_ptr[-1]) if merges else 0,
    )
