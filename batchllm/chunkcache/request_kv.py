"""KV of one request in one buffer per layer, where slot `p` is position `p`: parts of it computed, parts of it placed.

The plain form of what the executor does for many requests at once: attention is dense, in float32, with an exact
position mask. It is the reference for reuse, and measures quality; it is not fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchllm.executor.forward_context import attention_of
from batchllm.executor.model import ModelRunner

# Layer, number of the first query, weights [Hq, queries, keys]: some of the queries, no keys after the last of them.
Observer = Callable[[int, int, Tensor], None]
_QUERIES = 256  # at a time: of all queries, half of the scores are of keys that are hidden


class RequestKv:
    """`keys[l]` (positions applied) and `values[l]` are [capacity, heads, dim]."""

    def __init__(self, model: ModelRunner, capacity: int):
        self.model = model
        options: dict[str, Any] = {
            "dtype": model.dtype,
            "device": next(model.model.parameters()).device,
        }
        self.keys = [torch.zeros(capacity, kv.heads, kv.key_dim, **options) for kv in model.layers]
        self.values = [torch.zeros(capacity, kv.heads, kv.value_dim, **options) for kv in model.layers]

    def place(self, layer: int, start: int, key: Tensor, value: Tensor) -> None:
        """Puts K (positions applied) and V of tokens that are not computed, from position `start` on."""
        self.keys[layer][start : start + len(key)] = key
        self.values[layer][start : start + len(value)] = value

    @torch.inference_mode()
    def compute(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        observe: Observer | None = None,
        last_layer: int | None = None,
    ) -> Tensor:
        """Runs the tokens at these positions, ascending, in any number of stretches; returns the last one's logits.

        Each sees all positions up to its own, which must have been placed or computed, or be computed now. With
        `last_layer` the layers after it are not run, and there are no logits.
        """
        step = _ScatteredAttention(self, positions, observe, last_layer)
        try:
            with attention_of(step):
                output = self.model.model(
                    input_ids=tokens.unsqueeze(0),
                    position_ids=positions.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=1,
                )
        except _Stopped:
            return torch.empty(0)
        logits: Tensor = output.logits[0, -1].float()
        return logits


class _Stopped(Exception):
    """Layers after the last wanted one are not run."""


class _ScatteredAttention:
    """`StepAttention` of some positions of one request."""

    logit_rows: Tensor | None = None

    def __init__(self, kv: RequestKv, positions: Tensor, observe: Observer | None, last_layer: int | None):
        self._kv, self._positions = kv, positions
        self._observe, self._last_layer = observe, last_layer
        self._end = int(positions[-1]) + 1

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
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        keys[self._positions] = key.transpose(0, 1)
        values[self._positions] = value.transpose(0, 1)
        if layer == self._last_layer and self._observe is None:
            raise _Stopped
        known, worth = keys[: self._end].float(), values[: self._end].float()
        output = query.new_empty(query.shape[1], query.shape[0], values.shape[-1])
        for first in range(0, query.shape[1], _QUERIES):
            rows = slice(first, first + _QUERIES)
            positions = self._positions[rows]
            end = int(positions[-1]) + 1
            scores = _scores(query[:, rows], known[:end], scale, softcap)
            scores.masked_fill_(_hidden(positions, end, window), float("-inf"))
            weights = _softmax(scores, sinks)
            if self._observe is not None:
                self._observe(layer, first, weights)
            output[rows] = _weighted(weights, worth[:end]).to(query.dtype)
        if layer == self._last_layer:
            raise _Stopped
        return output


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights [Hq, n, L], values [L, Hkv, D] → [n, Hq, D]."""
    heads, count, length = weights.shape
    kv_heads = values.shape[1]
    grouped = weights.view(kv_heads, heads // kv_heads * count, length)
    return torch.matmul(grouped, values.transpose(0, 1)).view(heads, count, -1).transpose(0, 1)


def _scores(query: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """query [Hq, n, D], keys [L, Hkv, D] → [Hq, n, L], float32."""
    heads, count, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().reshape(kv_heads, heads // kv_heads * count, dim)
    scores = torch.matmul(grouped, keys.float().permute(1, 2, 0)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.view(heads, count, -1)


def _hidden(positions: Tensor, end: int, window: int | None) -> Tensor:
    """[queries, keys] true where a query must not look."""
    key, query = torch.arange(end, device=positions.device), positions.unsqueeze(1)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    # A sink is one more key with no value: it only takes its share of the softmax.
    sink = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
