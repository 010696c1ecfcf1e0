"""The forward pass of the Llama family on a GPU, out of few kernels.

Of a layer: sum with the residual and norm; one product for q, k and v; per-head norms, rotary positions and KV write;
attention; output product; sum and norm; one product for gate and up; activation; down product. Layers hand on the
residual and what is still to be added to it. The sparse MLP of mixture-of-experts models is transformers' own module.
"""

from __future__ import annotations

from typing import Any

import torch
from batchllm_kernels.kernel_set import KernelSet
from torch import Tensor, nn

from batchllm.executor.attention_paged import PagedStepAttention
from batchllm.executor.joined_linear import join_linears

# Models of exactly this form: token embedding, layers, norm, output projection; layers of norm, attention with rotary
# positions (half rotation), norm, MLP.
_MODELS = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}
_FIXED_ROTARY = {"default", "linear", "llama3", "yarn"}  # frequencies that do not depend on the sequence
_BEYOND = 64  # positions past the longest sequence: rows that have ended may run on for some steps


class DeviceModel:
    """Shares its weights with the transformers model it was made of, whose linears become views of joined ones."""

    def __init__(self, model: Any, kernels: KernelSet, max_length: int):
        self._kernels = kernels
        self._embed = model.model.embed_tokens
        self._head = model.lm_head
        self._norm = model.model.norm
        self._layers = [_Layer(layer, kernels) for layer in model.model.layers]
        self._cos, self._sin = _rotary_tables(model, max_length + _BEYOND)

    @classmethod
    def of(cls, model: Any, kernels: KernelSet, max_length: int | None) -> DeviceModel | None:
        """None where the model has another form."""
        if max_length is None or not _matches(model):
            return None
        return cls(model, kernels, max_length)

    def logits(self, tokens: Tensor, attention: PagedStepAttention, logit_rows: Tensor | None) -> Tensor:
        """tokens int64 [T] at `attention.positions` → [L, V] of `logit_rows`, or of all, in the model's dtype."""
        residual = self._embed(tokens)
        normed = self._kernels.rms_norm(residual, *_weight(self._layers[0].input_norm))
        rows = attention.logit_rows
        for index, layer in enumerate(self._layers):
            is_last = index == len(self._layers) - 1
            query = layer.write(normed, self._cos, self._sin, attention)
            only = rows if is_last else None
            if only is not None and not len(only):
                nothing: Tensor = normed.new_empty(0, self._head.out_features)
                return nothing  # experts do not take zero tokens
            if only is not None:
                query, residual = query.index_select(0, only), residual.index_select(0, only)
            added = layer.attend(query, attention, only is not None)
            added = layer.mlp(self._kernels.rms_norm(added, *_weight(layer.mlp_norm), residual))
            next_norm = self._norm if is_last else self._layers[index + 1].input_norm
            normed = self._kernels.rms_norm(added, *_weight(next_norm), residual)
        if rows is None and logit_rows is not None:
            normed = normed.index_select(0, logit_rows)
        logits: Tensor = self._head(normed)
        return logits


class _Layer:
    """One decoder layer without its norms."""

    def __init__(self, layer: Any, kernels: KernelSet):
        attention = layer.self_attn
        self._kernels = kernels
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._index = int(attention.layer_idx)
        self._head_dim = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._window = _window(attention)
        self._query_heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._qkv = join_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = attention.o_proj
        self._norms: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            self._norms = {
                "query_norm": attention.q_norm.weight,
                "key_norm": attention.k_norm.weight,
                "epsilon": attention.q_norm.variance_epsilon,
            }
        self._mlp = layer.mlp
        self._gate_up = join_linears(self._mlp.gate_proj, self._mlp.up_proj) if _is_gated(self._mlp) else None

    def write(self, normed: Tensor, cos: Tensor, sin: Tensor, attention: PagedStepAttention) -> Tensor:
        """Puts the tokens' keys and values into the pool; returns their queries [T, Hq, D]."""
        heads = self._qkv(normed).view(len(normed), -1, self._head_dim)
        query, key, value = heads.split([self._query_heads, self._kv_heads, self._kv_heads], dim=1)
        rotated: Tensor = self._kernels.rope_kv_write(
            query,
            key,
            value,
            cos,
            sin,
            attention.pool.keys[self._index],
            attention.pool.values[self._index],
            attention.slots,
            positions=attention.positions,
            **self._norms,
        )
        attention.copy_shared(self._index)
        return rotated

    def attend(self, query: Tensor, attention: PagedStepAttention, last_only: bool) -> Tensor:
        attended = attention.attend_written(
            self._index, query, scale=self._scale, window=self._window, last_only=last_only
        )
        output: Tensor = self._output(attended.flatten(1))
        return output

    def mlp(self, normed: Tensor) -> Tensor:
        if self._gate_up is not None:
            output: Tensor = self._mlp.down_proj(self._kernels.silu_and_mul(self._gate_up(normed)))
            return output
        mixed = self._mlp(normed.unsqueeze(0))
        first: Tensor = mixed[0] if isinstance(mixed, tuple) else mixed
        return first.view(normed.shape)


def _weight(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, float(norm.variance_epsilon)


@torch.inference_mode()
def _rotary_tables(model: Any, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D / 2], rounded as transformers' models round them."""
    weight = model.model.embed_tokens.weight
    where = torch.arange(positions, device=weight.device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(weight.new_empty(1, 1, 1), position_ids=where)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _matches(model: Any) -> bool:
    if type(model).__name__ not in _MODELS or type(model.model.embed_tokens) is not nn.Embedding:
        return False
    if getattr(model.model.rotary_emb, "rope_type", None) not in _FIXED_ROTARY:
        return False
    linears = [model.lm_head]
    for layer in model.model.layers:
        attention = layer.self_attn
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if _is_gated(layer.mlp):
            linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    return all(type(linear) is nn.Linear for linear in linears)


def _is_gated(mlp: Any) -> bool:
    """silu(gate) x up, then down: what the fused kernel computes."""
    named = all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return named and type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _window(attention: Any) -> int | None:
    """The layer's sliding window; Mistral keeps it in the configuration only."""
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    return window
