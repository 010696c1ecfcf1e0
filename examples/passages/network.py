"""The network that train.py trains: the Qwen3 architecture, written for short masked training rows.

Weights of one kind are fused (query/key/value, gate/up); export.py splits them into the names of the
published format. The arithmetic is that of transformers' Qwen3ForCausalLM with tied embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class NetworkConfig:
    vocabulary: int
    layers: int = 4
    width: int = 160
    heads: int = 5
    head_width: int = 32
    hidden: int = 384  # of the feed-forward part
    rope_theta: float = 1e4


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, NORM_EPSILON)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        attended = config.heads * config.head_width
        self.heads, self.head_width = config.heads, config.head_width
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.query_norm = nn.Parameter(torch.ones(config.head_width))
        self.key_norm = nn.Parameter(torch.ones(config.head_width))
        self.query_key_value = nn.Parameter(torch.randn(3 * attended, width) * 0.6 * width**-0.5)
        self.attention_out = nn.Parameter(torch.randn(width, attended) * 0.3 * attended**-0.5)
        self.hidden_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Parameter(torch.randn(2 * hidden, width) * 0.6 * width**-0.5)
        self.down = nn.Parameter(torch.randn(width, hidden) * 0.3 * hidden**-0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """``x`` is [batch, length, width]; ``mask`` is added to the scores, [batch, 1, length, length]."""
        batch, length, _ = x.shape
        fused = F.linear(normalize(x, self.attention_norm), self.query_key_value)
        query, key, value = fused.view(batch, length, 3, self.heads, self.head_width).unbind(2)
        query = _rotate(normalize(query, self.query_norm), cos, sin).to(value.dtype)
        key = _rotate(normalize(key, self.key_norm), cos, sin).to(value.dtype)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask.to(value.dtype)
        )
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.attention_out)
        gate, up = F.linear(normalize(x, self.hidden_norm), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Network(nn.Module):
    """A decoder that returns hidden states; project them with ``embedding`` to obtain logits."""

    inverse_frequencies: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.width) * 0.05)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.width))
        exponents = torch.arange(0, config.head_width, 2).float() / config.head_width
        self.register_buffer("inverse_frequencies", config.rope_theta**-exponents, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """The final hidden states, [batch, length, width].

        ``ids`` and ``positions`` are [batch, length]; ``visible`` is boolean [batch, 1, length, length].
        """
        mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
        angles = positions[..., None].float() * self.inverse_frequencies
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        x = F.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return normalize(x, self.final_norm)
