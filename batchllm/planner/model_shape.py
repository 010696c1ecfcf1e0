"""How much work and memory one token is for a model: read off its configuration, without its weights.

Works from plain attributes under the names that transformers' configurations use, so anything with such attributes
will do. Biases, norms and rotary tables are left out: together they are well under a hundredth of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Two matrices in the MLP (up, down) instead of three (gate, up, down).
_UNGATED = frozenset(
    "gpt2 gpt_neo gpt_neox gpt_bigcode gptj phi opt falcon starcoder2 bloom mpt nemotron codegen".split()
)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder layer. Parameters are those of weight matrices."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None  # a token sees so many keys at most, its own included; None: all
    attention_parameters: int  # projections
    dense_parameters: int  # of the MLP: what every token goes through (dense MLP, shared experts, router)
    expert_parameters: int = 0  # of one routed expert
    experts: int = 0
    active_experts: int = 0

    @property
    def stored_parameters(self) -> int:
        return self.attention_parameters + self.dense_parameters + self.experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token is multiplied with."""
        return (
            self.attention_parameters + self.dense_parameters + self.active_experts * self.expert_parameters
        )

    @property
    def flops_per_pair(self) -> int:
        """Query x key products and the weighted sum of values, over all heads."""
        return 2 * self.heads * (self.key_dim + self.value_dim)

    @property
    def kv_values(self) -> int:
        """Numbers stored for a token. Keys and values are stored equally wide (see executor.kv_pool)."""
        return 2 * self.kv_heads * max(self.key_dim, self.value_dim)

    def read_parameters(self, tokens: FloatArray | float) -> FloatArray:
        """Parameters that a step of so many tokens reads: of the experts those that some token is sent to."""
        share = self.active_experts / self.experts if self.experts else 1.0
        untouched: FloatArray = (1 - share) ** np.asarray(tokens, dtype=np.float64)
        routed = self.experts * self.expert_parameters * (1 - untouched)
        return self.attention_parameters + self.dense_parameters + routed


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the cost model sees it."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocabulary: int
    embedding_parameters: int  # tables that are looked up, not multiplied with
    tied: bool  # the output projection is the embedding table
    max_length: int | None  # positions the model states

    @property
    def flops_per_token(self) -> int:
        """Of all layers, attention over keys not counted."""
        return 2 * sum(layer.active_parameters for layer in self.layers)

    @property
    def flops_per_logit_row(self) -> int:
        return 2 * self.hidden_size * self.vocabulary

    @property
    def flops_per_pair(self) -> int:
        """For one query token and one key token that every layer lets it see."""
        return sum(layer.flops_per_pair for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of weight matrices and tables, a tied one counted once."""
        head = 0 if self.tied else self.hidden_size * self.vocabulary
        return sum(layer.stored_parameters for layer in self.layers) + self.embedding_parameters + head

    def weight_bytes(self, bytes_per_value: float) -> int:
        return int(self.parameters * bytes_per_value)

    def kv_bytes_per_token(self, bytes_per_value: float) -> int:
        return int(sum(layer.kv_values for layer in self.layers) * bytes_per_value)


def model_shape(config: Any) -> ModelShape:
    """From the configuration of a decoder-only model, or of its text part."""
    hidden = int(config.hidden_size)
    vocabulary = int(config.vocab_size)
    learned_positions = int(config.n_positions) * hidden if config.model_type == "gpt2" else 0
    layers = tuple(_layer(config, index) for index in range(int(config.num_hidden_layers)))
    stated = getattr(config, "max_position_embeddings", None)
    return ModelShape(
        layers=layers,
        hidden_size=hidden,
        vocabulary=vocabulary,
        embedding_parameters=vocabulary * hidden + learned_positions,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        max_length=int(stated) if stated else None,
    )


def _layer(config: Any, index: int) -> LayerShape:
    heads, kv_heads, key_dim, value_dim, projections = _attention(config)
    dense, expert, experts, active = _mlp(config, index)
    return LayerShape(
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=_window(config, index),
        attention_parameters=projections,
        dense_parameters=dense,
        expert_parameters=expert,
        experts=experts,
        active_experts=active,
    )


def _attention(config: Any) -> tuple[int, int, int, int, int]:
    """Heads, KV heads, width of a key and of a value, parameters of the projections."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    if _number(config, "kv_lora_rank"):
        return _latent_attention(config)
    kv_heads = _number(config, "num_key_value_heads") or heads
    if config.model_type == "gpt_bigcode" and getattr(config, "multi_query", False):
        kv_heads = 1
    dim = _number(config, "head_dim") or hidden // heads
    return heads, kv_heads, dim, dim, hidden * dim * (2 * heads + 2 * kv_heads)


def _latent_attention(config: Any) -> tuple[int, int, int, int, int]:
    """DeepSeek's MLA as transformers runs it: keys and values are expanded for every head and stored so."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    latent, rope = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    key_dim, value_dim = int(config.qk_nope_head_dim) + rope, int(config.v_head_dim)
    rank = _number(config, "q_lora_rank")
    query = rank * (hidden + heads * key_dim) if rank else hidden * heads * key_dim
    down = hidden * (latent + rope)
    up = latent * heads * (key_dim - rope + value_dim)
    return heads, heads, key_dim, value_dim, query + down + up + heads * value_dim * hidden


def _mlp(config: Any, index: int) -> tuple[int, int, int, int]:
    """Parameters of what every token passes, of one routed expert, routed experts, experts for each token."""
    hidden = int(config.hidden_size)
    matrices = 2 if config.model_type in _UNGATED else 3
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    experts = _number(config, "n_routed_experts", "num_local_experts", "num_experts")
    if not experts or not _is_sparse(config, index):
        return matrices * hidden * inner, 0, 0, 0
    expert = matrices * hidden * (_number(config, "moe_intermediate_size") or inner)
    shared = _number(config, "n_shared_experts") * expert
    if shared_inner := _number(config, "shared_expert_intermediate_size"):
        shared = matrices * hidden * shared_inner + hidden  # with a gate of its own
    active = _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    return hidden * experts + shared, expert, experts, active


def _is_sparse(config: Any, index: int) -> bool:
    if index < _number(config, "first_k_dense_replace") or index in (
        getattr(config, "mlp_only_layers", None) or ()
    ):
        return False
    return (index + 1) % (_number(config, "decoder_sparse_step") or 1) == 0


def _window(config: Any, index: int) -> int | None:
    window = _number(config, "sliding_window")
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return window if window and kinds[index] == "sliding_attention" else None
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    return window


def _number(config: Any, *names: str) -> int:
    """The first of these attributes that holds a positive number, else 0."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0
