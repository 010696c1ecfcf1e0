"""Chooses the next token of many sequences at once.

Drawn tokens are the maxima of logit / temperature + Gumbel noise over what each row's limits leave, which is a draw
from the softmax (Gumbel-max; Maddison et al., "A* Sampling", NeurIPS 2014). A token's noise depends on the row's key,
the index of the token to choose and the token's id alone. So rows do not depend on each other, and a last bit of a
logit, which may differ from batch to batch, changes a token only where two scores are within such a bit of each other;
inverting a cumulative sum would shift every boundary between tokens by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchllm_kernels.cpu.largest import take_largest
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.certain_draws import certain_tokens, is_drawn_freely
from batchllm.executor.native import native_kernels
from batchllm.executor.random_numbers import draw_words, gumbel_noise
from batchllm.executor.running import Running

_CANDIDATES = 256  # limits are first sought among so many of the largest logits
_TRIES = 8  # scores looked at one by one before a row is sorted
_CHUNK = 2**18  # scores made at once, so that they stay in the cache


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    keys: NDArray[np.uint64],
    indices: NDArray[np.int64],
    rows: Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """logits [n, V] float32; one SamplingParams, request key [n, 2] and output token index a row → [n] token ids.

    With `rows` only theirs, in this order. Greedy rows take the largest logit, the first of equals. The others draw
    from the distribution that transformers' processors give, in its order: temperature, top-k, top-p, min-p.
    """
    rows = range(len(params)) if rows is None else rows
    greedy = [row for row in rows if params[row].greedy]
    if len(greedy) == len(params):
        return largest_tokens(logits)[rows]
    tokens = torch.full((len(params),), -1)
    if greedy:
        tokens[greedy] = torch.from_numpy(largest_tokens(logits[greedy]))
    words = torch.from_numpy(draw_words(keys, indices))
    freely = [row for row in rows if not params[row].greedy and is_drawn_freely(params[row])]
    if freely:
        chosen = [params[row] for row in freely]
        tokens[freely] = certain_tokens(
            logits, torch.tensor(freely), chosen, _temperatures(chosen), words[freely]
        )
    left = [row for row, token in zip(rows, tokens[rows].tolist()) if token < 0]
    free = [row for row in left if not is_limited(params[row])]
    limited = [row for row in left if is_limited(params[row])]
    if free:
        temperature = _temperatures([params[row] for row in free])
        tokens[free] = _draw_free(logits, torch.tensor(free), temperature, words[free])
    if limited:
        some = logits if limited == list(range(len(logits))) else logits[limited]
        tokens[limited] = _draw_limited(some, [params[row] for row in limited], words[limited])
    return tokens.numpy()[rows]


def largest_tokens(logits: Tensor) -> NDArray[np.int64]:
    """The first largest of each row [n, V]; NumPy is several times as fast at it as torch."""
    found: NDArray[np.int64] = logits.numpy().argmax(axis=-1)
    return found


def token_logprobs(logits: Tensor, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Natural-log probability of each row's token under the unmodified logits: [n, V], [n] → [n]."""
    chosen = logits.gather(1, torch.from_numpy(tokens).unsqueeze(1)).squeeze(1)
    values: NDArray[np.float32] = (chosen - torch.logsumexp(logits, dim=-1)).numpy()
    return values


def note_top_logprobs(logits: Tensor, running: Sequence[Running]) -> None:
    """Adds to the sequences that ask for it the most probable tokens under the unmodified logits [n, V]."""
    rows = [row for row, run in enumerate(running) if run.params.top_logprobs]
    if not rows:
        return
    wanted = torch.tensor(rows)
    most = min(logits.shape[1], max(running[row].params.top_logprobs for row in rows))
    values, tokens = largest_logits(logits[wanted], most)
    values = values - torch.logsumexp(logits[wanted], dim=-1, keepdim=True)
    for row, ids, logprobs in zip(rows, tokens.tolist(), values.tolist()):
        count = running[row].params.top_logprobs
        running[row].top_logprobs.append(tuple(zip(ids[:count], logprobs[:count])))


def is_limited(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _temperatures(params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1], with a floor: however cold, nothing overflows once the largest logit is 0."""
    return torch.tensor([row.temperature for row in params]).clamp_min(1e-30).unsqueeze(1)


def _draw_free(logits: Tensor, rows: Tensor, temperature: Tensor, words: Tensor) -> Tensor:
    """Tokens of these rows, from the whole vocabulary."""
    tokens = torch.empty(len(rows), dtype=torch.int64)
    vocabulary = torch.arange(logits.shape[1], dtype=torch.int32)
    for part in torch.split(torch.arange(len(rows)), max(1, _CHUNK // logits.shape[1])):
        scores = _scaled(logits[rows[part]], temperature[part])
        scores += gumbel_noise(words[part], vocabulary)
        tokens[part] = scores.argmax(dim=-1)
    return tokens


def _draw_limited(logits: Tensor, params: Sequence[SamplingParams], words: Tensor) -> Tensor:
    """Tokens of rows with limits: from the largest few logits where these hold all that the limits keep."""
    temperature, size = _temperatures(params), logits.shape[1]
    count = min(_CANDIDATES, size)
    if count < size:
        largest, order = largest_logits(logits, count + 1)
        # Which of several logits that equal the first one left out belong to the few is not known.
        complete = torch.isneginf(largest[:, count])
        certain = (largest[:, :count] > largest[:, count:]) | complete.unsqueeze(1)
        left_out = torch.exp((largest[:, count] - largest[:, 0]).double() / temperature.squeeze(1))
        largest, order = largest[:, :count], order[:, :count]
    else:
        largest, order = logits.sort(dim=-1, descending=True, stable=True)
        decided = torch.ones(len(params), dtype=torch.bool)
    scaled = _scaled(largest, temperature)
    weights = torch.softmax(scaled, dim=-1, dtype=torch.float64)
    if count < size:
        reaches = torch.tensor([_needs_total(row, count) for row in params])
        if reaches.any():
            total = _total_weight(logits[reaches], largest[reaches, :1], temperature[reaches])
            weights[reaches] = torch.exp(scaled[reaches].double()) / total
        decided = _is_within(weights, certain, left_out, params) | complete
    kept = _limited(weights, params)
    scores = scaled + gumbel_noise(words, order.to(torch.int32))
    scores = scores.masked_fill(kept == 0.0, float("-inf"))
    tokens = order.gather(1, _first_largest(scores, order)).squeeze(1)
    for row in (~decided).nonzero().flatten().tolist():
        tokens[row] = _draw_checked(logits[row], params[row], words[row : row + 1])
    return tokens


def _draw_checked(logits: Tensor, params: SamplingParams, words: Tensor) -> int:
    """The token of one row [V] with limits: by falling score the first one that they keep, mostly the very first."""
    if params.top_k > 0 and params.top_p < 1.0:  # top-p is of what top-k leaves
        return _draw_sorted(logits.unsqueeze(0), params, words)
    scaled = _scaled(logits.unsqueeze(0), _temperatures([params]))[0]
    weights = torch.exp(scaled)
    allowed = params.top_p * float(weights.sum(dtype=torch.float64))
    scores = scaled + gumbel_noise(words, torch.arange(len(logits), dtype=torch.int32))[0]
    for token in scores.topk(min(_TRIES, len(logits))).indices.tolist():
        before = scaled > scaled[token]
        before[:token] |= scaled[:token] == scaled[token]
        too_far = params.top_p < 1.0 and float(weights[before].sum(dtype=torch.float64)) >= allowed
        too_low = 0 < params.top_k <= int(before.sum())
        is_first = not before.any()
        if is_first or not (too_far or too_low or weights[token] < params.min_p):
            return int(token)
    return _draw_sorted(logits.unsqueeze(0), params, words)


def _draw_sorted(logits: Tensor, params: SamplingParams, words: Tensor) -> int:
    """The token of one row with limits, by sorting all of it."""
    falling, order = logits.sort(dim=-1, descending=True, stable=True)
    scaled = _scaled(falling, _temperatures([params]))
    kept = _limited(torch.softmax(scaled, dim=-1, dtype=torch.float64), [params])
    scores = scaled + gumbel_noise(words, order.to(torch.int32))
    scores = scores.masked_fill(kept == 0.0, float("-inf"))
    return int(order[0, _first_largest(scores, order)[0, 0]])


def largest_logits(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits [n, count] in falling order, and their tokens, of equal ones the smaller ids first.

    Which of the logits that equal the last one are left out is known only of the kernel in C: those with larger ids.
    """
    kernels = native_kernels(torch.bfloat16) if logits.device.type == "cpu" else None
    if kernels is not None and logits.dtype == torch.float32:
        values, tokens = take_largest(kernels, logits, count)
    else:
        tokens = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
        values = logits.gather(1, tokens)
    values, place = values.sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, place)


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """The largest logit 0."""
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)


def _total_weight(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    return ((logits - largest) / temperature).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)


def _needs_total(params: SamplingParams, count: int) -> bool:
    """Whether a limit is on probabilities that are of more tokens than these few."""
    return params.top_p < 1.0 and not 0 < params.top_k <= count


def _is_within(
    weights: Tensor, certain: Tensor, left_out: Tensor, params: Sequence[SamplingParams]
) -> Tensor:
    """[n] whether all that the limits keep is certain: among the sorted weights [n, count] of the largest logits, and
    larger than the first logit left out, of which the weight is `left_out` [n] times the largest."""
    top_k = torch.tensor([row.top_k for row in params])
    by_number = (top_k > 0) & (top_k <= certain.sum(dim=-1))
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64)
    min_p = torch.tensor([row.min_p for row in params], dtype=torch.float64)
    # Of more than top_k tokens probabilities would be smaller: then all of them must be here.
    by_weight = ((weights * certain).sum(dim=-1) >= top_p + 1e-9) & (top_p < 1.0)
    by_weight &= top_k == 0
    by_ratio = left_out < min_p * (1 - 1e-9)
    by_ratio &= torch.tensor([row.top_k == 0 or row.top_p == 1.0 for row in params])
    return by_number | by_weight | by_ratio


def _first_largest(scores: Tensor, tokens: Tensor) -> Tensor:
    """[n, 1] the place of the largest score, of equal ones that with the smallest token id."""
    largest = scores == scores.amax(dim=-1, keepdim=True)
    return tokens.masked_fill(~largest, torch.iinfo(tokens.dtype).max).argmin(dim=-1, keepdim=True)


def _limited(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zeroes what top-k, top-p and min-p exclude; probabilities [n, V] are sorted, largest first.

    Without top-k they may be those of the first V of more tokens.
    """
    size = probabilities.shape[1]
    rank = torch.arange(size)
    top_k = torch.tensor([row.top_k if 0 < row.top_k < size else size for row in params]).unsqueeze(1)
    kept = probabilities.masked_fill(rank >= top_k, 0.0)
    total = torch.where(top_k < size, kept.sum(dim=-1, keepdim=True), 1.0)
    kept = kept / total
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64).unsqueeze(1)
    before = kept.cumsum(dim=-1) - kept  # a token stays while the more probable ones have not reached top_p
    kept = kept.masked_fill((before >= top_p) & (top_p < 1.0) & (rank > 0), 0.0)
    min_p = torch.tensor([row.min_p for row in params], dtype=torch.float64).unsqueeze(1)
    return kept.masked_fill(kept < min_p * kept[:, :1], 0.0)
