"""The kernels of a step as one object, so that an executor can be given others: tests take the torch references."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from batchllm_kernels import attention, gated_activation, rms_norm, rope_kv_write, sampler, token_logprobs
from batchllm_kernels.attention import AttentionOptions
from batchllm_kernels.device_plan import DevicePlan
from batchllm_kernels.tile_config import TileConfig


class KernelSet(Protocol):
    """Contracts are those of the functions of the same names."""

    def rms_norm(
        self, states: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor: ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...

    def rope_kv_write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        slots: Tensor,
        **options: Any,
    ) -> Tensor: ...

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
    ) -> Tensor: ...

    def sample_tokens(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        keys: Tensor,
        indices: Tensor,
    ) -> Tensor: ...

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor: ...


class TritonKernels:
    """The kernels of this package."""

    def rms_norm(
        self, states: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        return rms_norm.rms_norm(states, weight, epsilon, residual=residual)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return gated_activation.silu_and_mul(gate_up)

    def rope_kv_write(self, *tensors: Tensor, **options: Any) -> Tensor:
        return rope_kv_write.rope_kv_write(*tensors, **options)

    def tree_attention(self, *arguments: Any) -> Tensor:
        return attention.tree_attention(*arguments)

    def sample_tokens(self, *arguments: Tensor) -> Tensor:
        return sampler.sample_tokens(*arguments)

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return token_logprobs.token_logprobs(logits, tokens)
