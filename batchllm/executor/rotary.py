"""Rotary positions (Su et al. 2021), half of each head rotated against the other, for all heads of a step at once."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTables:
    """Applies rotary positions. Tables as wide as all heads are made once a step and shared by its layers: rows of
    them are then long enough for a CPU's vector loops, and query and key take one pass together."""

    def __init__(self) -> None:
        self._made_of: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def apply(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """states [T, heads, D] → the same shape, contiguous. cos and sin [1, T, D] as transformers' models make them:
        both halves equal."""
        tokens, heads, dim = states.shape
        if self._made_of is not cos or self._cos.shape[1] != heads * dim:
            self._make(cos[0], sin[0], heads)
            self._made_of = cos
        half = dim // 2
        swapped = torch.cat((states[..., half:], states[..., :half]), dim=-1).view(tokens, heads * dim)
        wide = states.reshape(tokens, heads * dim)
        rotated: Tensor = (wide * self._cos).addcmul_(swapped, self._sin)
        return rotated.view(tokens, heads, dim)

    def _make(self, cos: Tensor, sin: Tensor, heads: int) -> None:
        half = cos.shape[-1] // 2
        self._cos = cos.repeat(1, heads)
        self._sin = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1).repeat(1, heads)
