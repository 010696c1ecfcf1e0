"""Chooses the next token of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.random_numbers import uniform


def choose_tokens(
    logits: Tensor, params: Sequence[SamplingParams], keys: NDArray[np.uint64], indices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """logits [n, V] float32; one SamplingParams, request key [n, 2] and output token index a row → [n] token ids.

    Greedy rows take the largest logit, the first of equals. The others draw from the distribution that
    transformers' processors give, in its order: temperature, top-k, top-p, min-p.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, chosen in enumerate(params) if not chosen.greedy]
    if drawn:
        numbers = torch.from_numpy(uniform(keys[drawn], indices[drawn]))
        tokens[drawn] = _draw(logits[drawn], [params[row] for row in drawn], numbers)
    chosen: NDArray[np.int64] = tokens.numpy()
    return chosen


def token_logprobs(logits: Tensor, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Natural-log probability of each row's token under the unmodified logits: [n, V], [n] → [n]."""
    chosen = logits.gather(1, torch.from_numpy(tokens).unsqueeze(1)).squeeze(1)
    values: NDArray[np.float32] = (chosen - torch.logsumexp(logits, dim=-1)).numpy()
    return values


def _draw(logits: Tensor, params: Sequence[SamplingParams], numbers: Tensor) -> Tensor:
    """Inverse transform sampling over the tokens each row's limits leave.

    Rows without limits go through the vocabulary in its order, rows with limits in order of falling probability,
    as the sampling kernel does: which order is the row's own affair, never its neighbours'.
    """
    # Largest logit 0 and a floor under the temperature: however cold, nothing overflows.
    temperature = torch.tensor([row.temperature for row in params]).clamp_min(1e-30).unsqueeze(1)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    tokens = torch.empty(len(params), dtype=torch.int64)
    limited = torch.tensor([row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0 for row in params])
    if not limited.all():
        free = ~limited
        weights = torch.softmax(scaled[free], dim=-1, dtype=torch.float64)
        tokens[free] = _invert(weights, numbers[free]).squeeze(1)
    if limited.any():
        falling, order = scaled[limited].sort(dim=-1, descending=True, stable=True)
        limits = [row for row, is_limited in zip(params, limited.tolist()) if is_limited]
        weights = _limited(torch.softmax(falling, dim=-1, dtype=torch.float64), limits)
        tokens[limited] = order.gather(1, _invert(weights, numbers[limited])).squeeze(1)
    return tokens


def _limited(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zeroes what top-k, top-p and min-p exclude; probabilities [n, V] are sorted, largest first."""
    size = probabilities.shape[1]
    rank = torch.arange(size)
    top_k = torch.tensor([min(row.top_k, size) if row.top_k else size for row in params]).unsqueeze(1)
    kept = probabilities.masked_fill(rank >= top_k, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64).unsqueeze(1)
    before = kept.cumsum(dim=-1) - kept  # a token stays while the more probable ones have not reached top_p
    kept = kept.masked_fill((before >= top_p) & (rank > 0), 0.0)
    min_p = torch.tensor([row.min_p for row in params], dtype=torch.float64).unsqueeze(1)
    return kept.masked_fill(kept < min_p * kept[:, :1], 0.0)


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """[n, 1] index of the first token whose cumulative weight exceeds number x total."""
    cumulative = weights.cumsum(dim=-1)
    target = numbers.unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = (weights > 0).to(torch.int8).flip(-1).argmax(dim=-1, keepdim=True)
    return torch.minimum(index, weights.shape[1] - 1 - last)
