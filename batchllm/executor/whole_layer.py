"""A fused decoder layer whose parts are all the kernels' is one call: Python between them costs 6% of a step.

Layers keep their own code for what this does not do: weights in another form, a last layer that is computed for some
rows only, steps that copy KV.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from batchllm_kernels.cpu.decoder_layer import DecoderLayer, LayerStep, Norm, Weights
from torch import Tensor

from batchllm.executor.attention_native import NativeStepAttention
from batchllm.executor.native_linear import NativeGatedLinear, NativeLinear

if TYPE_CHECKING:
    from batchllm.executor.fused_layer import FusedDecoderLayer


class WorkMemory:
    """What layers work in, kept from step to step: fresh pages are slow."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.bfloat16)

    def of(self, numbers: int) -> Tensor:
        if len(self._kept) < numbers:
            self._kept = torch.empty(0, dtype=torch.bfloat16)  # goes before the new memory comes
            self._kept = torch.empty(numbers, dtype=torch.bfloat16)
        return self._kept


class WholeLayer:
    """One layer of a model. `memory` is the same for all of them."""

    def __init__(self, call: DecoderLayer, layer: FusedDecoderLayer, memory: WorkMemory):
        self._call, self._memory = call, memory
        self._index, self._scale, self._window = layer.layer_idx, layer.scale, layer.window

    @classmethod
    def of(cls, layer: FusedDecoderLayer, kernels: ctypes.CDLL, memory: WorkMemory) -> WholeLayer | None:
        """None where parts of the layer are not the kernels'."""
        attention, mlp = layer.original.self_attn, layer.original.mlp
        qkv, output, gated, down = layer.qkv, attention.o_proj, layer.gated, mlp.down_proj
        if not isinstance(gated, NativeGatedLinear):
            return None
        if not all(isinstance(part, NativeLinear) for part in (qkv, output, down)):
            return None
        norms = [_norm(layer.original.input_layernorm), _norm(layer.original.post_attention_layernorm)]
        call = DecoderLayer(
            kernels,
            *(_weights(qkv), _weights(output), Weights(gated.packed, 2 * gated.size), _weights(down)),
            (norms[0], norms[1]),
            (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
            *(layer.q_size // layer.head_dim, layer.kv_size // layer.head_dim, layer.head_dim),
        )
        return cls(call, layer, memory)

    def run(self, hidden: Tensor, positions: tuple[Tensor, Tensor], step: NativeStepAttention) -> bool:
        """hidden [n, hidden] goes through the layer, in place; positions: cos and sin [1, n, dim].

        False where the step is not one for this, and nothing has happened."""
        pool = step.plain_pool(self._index, self._call.kv_heads, self._call.dim)
        if pool is None or not hidden.is_contiguous():
            return False
        if step.shared is None or not step.shared.is_of(hidden, positions[0]):
            step.shared = self._begin(hidden, positions, step)
        self._call.run(step.shared, *pool, self._scale, self._window)
        return True

    def _begin(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor], step: NativeStepAttention
    ) -> LayerStep:
        call = self._call
        memory = self._memory.of(len(hidden) * sum(call.widths))
        reads = step.reads(call.heads // call.kv_heads)
        cos, sin = (states[0].contiguous() for states in positions)
        return LayerStep(call, hidden, cos, sin, step.slots, reads, memory)


def _weights(linear: Any) -> Weights:
    return Weights(linear.packed, linear.out_features, linear.bias)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))
