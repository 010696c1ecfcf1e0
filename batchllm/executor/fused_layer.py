"""A faster decoder layer for the Llama family, swapped in for transformers' own where it matches.

Same arithmetic with fewer passes over memory: q, k and v are one product, gate and up are one product, and what lies
between products is in `layer_ops`. In the last layer, tokens whose logits nobody reads need only their K and V.
"""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor, nn

from batchllm.executor.attention_native import NativeStepAttention
from batchllm.executor.forward_context import StepAttention, current_step
from batchllm.executor.joined_linear import join_linears, share_rows
from batchllm.executor.layer_ops import BetweenProducts, ops_for
from batchllm.executor.mapped_weights import MappedFiles
from batchllm.executor.native_linear import NativeGatedLinear, NativeLinear, add_product, can_be_native
from batchllm.executor.whole_layer import WholeLayer

# Decoder layers of exactly this form: norm, attention with rotary positions (half rotation), norm, gated MLP.
_FORMS = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
}


class GatedProjection(nn.Module):
    """The first half of a gated MLP: silu(gate) * up, by one product."""

    def __init__(self, joined: nn.Module, ops: BetweenProducts):
        """`joined`: gate and up, one after the other."""
        super().__init__()
        self.joined = joined
        self._ops = ops

    def forward(self, states: Tensor) -> Tensor:
        """states [n, hidden] → [n, size]."""
        return self._ops.gated(self.joined(states))


class FusedDecoderLayer(nn.Module):
    """Takes the place of one of transformers' decoder layers and takes over its weights: joined, or with `kernels`
    packed. The originals' become views of the joined ones, or are dropped."""

    def __init__(self, layer: Any, is_last: bool, ops: BetweenProducts, kernels: ctypes.CDLL | None):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.original = layer
        self.layer_idx = int(attention.layer_idx)
        self.is_last = is_last
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scaling)
        self.window = _window(attention)
        self.q_size, self.kv_size = attention.q_proj.out_features, attention.k_proj.out_features
        self.ops = ops
        self.qkv = _joined(kernels, attention.q_proj, attention.k_proj, attention.v_proj)
        self.gated = _gated(kernels, mlp.gate_proj, mlp.up_proj, ops)
        self.whole: WholeLayer | None = None  # set where the layer can be one call

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        """hidden_states [1, T, hidden] → the same shape; [1, L, hidden] from the last layer when only the L tokens
        with logits matter."""
        hidden = hidden_states[0]
        step = current_step()
        rows = step.logit_rows if self.is_last else None
        if rows is None and self._ran_whole(hidden, position_embeddings, step):
            return hidden_states
        query, key, value = self._project(hidden, position_embeddings)
        if rows is not None:
            query, hidden = query.index_select(0, rows), hidden.index_select(0, rows)
        attended = step.attend(
            self.layer_idx,
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            scale=self.scale,
            window=self.window,
            softcap=None,
            sinks=None,
            last_only=rows is not None,
        )
        hidden = add_product(
            self.original.self_attn.o_proj, attended.reshape(len(hidden), self.q_size), hidden
        )
        normed = self.ops.norm(hidden, self.original.post_attention_layernorm)
        return add_product(self.original.mlp.down_proj, self.gated(normed), hidden).unsqueeze(0)

    def _ran_whole(self, hidden: Tensor, positions: Any, step: StepAttention) -> bool:
        """Whether one call has done the layer's work, in place."""
        if self.whole is None or not isinstance(step, NativeStepAttention):
            return False
        return self.whole.run(hidden, positions, step)

    def _project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, heads, D] each, with positions applied to query and key."""
        attention = self.original.self_attn
        joined = self.qkv(self.ops.norm(hidden, self.original.input_layernorm))
        heads = joined.view(len(hidden), -1, self.head_dim)
        num_q, num_kv = self.q_size // self.head_dim, self.kv_size // self.head_dim
        turned, value = heads[:, : num_q + num_kv], heads[:, num_q + num_kv :]
        if hasattr(attention, "q_norm"):
            self.ops.norm_heads(turned[:, :num_q], attention.q_norm)
            self.ops.norm_heads(turned[:, num_q:], attention.k_norm)
        turned = self.ops.rotate(turned, *position_embeddings)
        return turned[:, :num_q], turned[:, num_q:], value

    def unused(self) -> list[Any]:
        """The original's linear layers whose work is done by this layer's own."""
        return _taken_over(self.original)

    def release_originals(self) -> None:
        """Lets go of their weights, so that this layer's may be kept in another form."""
        for linear in self.unused():
            _drop_weight(linear)

    def restore_originals(self) -> None:
        """Gives them their weights again, from this layer's plain ones."""
        unused = self.unused()
        if isinstance(self.qkv, nn.Linear):
            share_rows(self.qkv.weight, *unused[:3])
        if isinstance(self.gated, GatedProjection) and isinstance(self.gated.joined, nn.Linear):
            share_rows(self.gated.joined.weight, *unused[3:])


def _taken_over(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]


def _joined(kernels: ctypes.CDLL | None, *parts: nn.Linear) -> nn.Module:
    """One layer that does their work: by the kernel if possible, which takes their weights as they lie."""
    if kernels is None or not all(map(can_be_native, parts)):
        return join_linears(*parts)
    packed = NativeLinear(kernels, *parts)
    for part in parts:
        _drop_weight(part)
    return packed


def _gated(
    kernels: ctypes.CDLL | None, gate: nn.Linear, up: nn.Linear, ops: BetweenProducts
) -> GatedProjection | NativeGatedLinear:
    if kernels is None or gate.bias is not None or not (can_be_native(gate) and can_be_native(up)):
        return GatedProjection(_joined(kernels, gate, up), ops)
    packed = NativeGatedLinear(kernels, gate, up)
    for part in (gate, up):
        _drop_weight(part)
    return packed


def _drop_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)


def fuse_layers(model: Any, kernels: ctypes.CDLL | None = None) -> bool:
    """Replaces the model's decoder layers if every one has a known form. Returns whether it did.

    With `kernels`, weights of joined products are packed for these at once, layer by layer, and never lie joined in
    plain form.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not all(_matches(layer) for layer in layers):
        return False
    ops = ops_for(next(model.parameters()).dtype)
    files = MappedFiles()
    for index, layer in enumerate(layers):
        weights = [linear.weight for linear in _taken_over(layer)]
        layers[index] = FusedDecoderLayer(layer, index == len(layers) - 1, ops, kernels)
        files.let_go(*weights)
    return True


def restore_layers(model: Any) -> None:
    """Undoes `fuse_layers`."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = layer.original


def _matches(layer: Any) -> bool:
    if type(layer).__name__ not in _FORMS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    gated = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(type(module) is nn.Linear for module in (*linears, *gated)) and _is_silu(mlp)


def _is_silu(mlp: Any) -> bool:
    return type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _window(attention: Any) -> int | None:
    """The layer's sliding window; Mistral keeps it in the configuration only."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None
