"""The next token of many sequences, from their logits, without sorting the vocabulary.

Gumbel-max over the distribution that transformers' processors give: temperature, top-k, top-p, min-p. Each token has
noise that depends on the row's key, the index of the token to choose and its id alone; of the tokens kept, the one with
the largest logit / temperature + noise is chosen. In order of falling logits, equal ones by token, whatever a limit
keeps is a beginning. So top-k and top-p are the same search: the first token at which a running sum passes a target.

The search bisects over gaps to the largest logit instead of sorting (selection by threshold, as in the sorting-free
samplers of FlashInfer and RTop-K), adding up what has a smaller gap than each. First it narrows the row to the few
candidates that can matter, and then bisects among these; if they are too many, it bisects over the whole row.

Weights are exp(-gap / temperature) as integers, in units of 2^-40 of the largest. Integer sums are exact in any order,
so what a row keeps depends on its logits and parameters alone, on any device whose exp gives the same floats. The CPU
sampler adds float64 and makes the same noise; it chooses the same token except where a sum comes within about a
millionth of its target, or two scores within as much of each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels
from batchllm_kernels.random_numbers import draw_words
from batchllm_kernels.threshold_search import best_score, bisect, largest_logit, nearer_than, pick_nearer

_BLOCK = 2048  # logits that a program reads at once
_CANDIDATES = 2048  # rows are narrowed to this many tokens


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    indices: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """logits [n, V] (V < 2^20, contiguous rows, none all -inf, no NaN) → int64 [n] token ids.

    temperature float32 [n], 0: the largest logit, the first of equals, and nothing else of the row matters.
    top_k int32 [n], 0: no limit. top_p float64 [n], 1: no limit. min_p float64 [n], 0: no limit.
    keys int64 [n, 2], the bits of the requests' 128-bit keys; indices int64 [n], the index of the token to choose.
    Tokens more than 28 x temperature below the largest logit have weight 0: no draw and no limit ever reaches them.
    """
    rows, vocabulary = logits.shape
    assert vocabulary < 2**20 and logits.stride(1) == 1 and keys.shape == (rows, 2)
    assert all(part.is_contiguous() for part in (temperature, top_k, top_p, min_p, keys, indices))
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    block, candidates = block_and_candidates(vocabulary)
    if rows:
        sample_tokens_kernel[(rows,)](
            *(logits, temperature, top_k, top_p, min_p, keys, indices),
            torch.empty((rows, candidates), dtype=logits.dtype, device=logits.device),
            torch.empty((rows, candidates), dtype=torch.int32, device=logits.device),
            out,
            logits.stride(0),
            vocabulary,
            CANDIDATES=candidates,
            BLOCK=block,
            num_warps=8,
        )
    return out


def block_and_candidates(vocabulary: int) -> tuple[int, int]:
    """Logits read at once, and candidates that rows are narrowed to, for this size of vocabulary."""
    smallest = triton.next_power_of_2(vocabulary)
    return min(_BLOCK, smallest), min(_CANDIDATES, smallest)


def sample_tokens_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    noise: Tensor,
) -> Tensor:
    """What `sample_tokens` chooses with this Gumbel noise [n, V], by sorting, in float64, one row after another."""
    tokens = logits.argmax(dim=-1)
    for row in (temperature > 0).nonzero().flatten().tolist():
        scaled = (logits[row].float() - logits[row].float().max()) / temperature[row].clamp_min(1e-30)
        order = scaled.sort(descending=True, stable=True).indices
        weights = torch.exp(scaled[order].double())
        if top_k[row] > 0:
            weights[top_k[row] :] = 0
        before = weights.cumsum(0) - weights
        if top_p[row] < 1:
            weights[1:][before[1:] >= top_p[row] * weights.sum()] = 0
        weights[weights < min_p[row] * weights[0]] = 0
        kept = order[weights > 0].sort().values
        tokens[row] = kept[(scaled + noise[row])[kept].argmax()]
    return tokens


@triton.jit
def sample_tokens_kernel(
    Logits,  # [n, vocabulary]
    Temperature,
    TopK,
    TopP,
    MinP,
    Keys,
    Indices,
    CandidateLogits,  # [n, CANDIDATES] scratch
    CandidateTokens,  # [n, CANDIDATES] scratch
    Output,
    stride_logits,
    vocabulary,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    logits = Logits + row * stride_logits
    largest, token = largest_logit(logits, vocabulary, BLOCK)
    temperature = tl.load(Temperature + row)
    if temperature > 0.0:
        temperature = tl.maximum(temperature, 1e-30)
        slope = tl.div_rn(-1.4426950408889634, temperature)
        limit = tl.minimum(28.0 * temperature, 3e38).to(tl.int32, bitcast=True)  # exp(-28) is less than 2^-40
        top_k, top_p, min_p = tl.load(TopK + row), tl.load(TopP + row), tl.load(MinP + row)
        candidates = CandidateTokens + row * CANDIDATES
        source, count, narrowed = logits, vocabulary, False
        reach = tl.full((), 0x7F800000, tl.int32)  # infinity
        low, high, rank = reach, reach, tl.full((), 0, tl.int64)
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            source, count, reach, low, high, rank, narrowed = _find_kept(
                logits,
                vocabulary,
                largest,
                temperature,
                slope,
                limit,
                top_k,
                top_p,
                min_p,
                CandidateLogits + row * CANDIDATES,
                candidates,
                CANDIDATES,
                BLOCK,
            )
        first, second = draw_words(
            tl.load(Keys + 2 * row), tl.load(Keys + 2 * row + 1), tl.load(Indices + row)
        )
        token = best_score(
            source,
            candidates,
            narrowed,
            count,
            largest,
            temperature,
            first,
            second,
            reach,
            low,
            high,
            rank,
            BLOCK,
        )
    tl.store(Output + row, token.to(tl.int64))


@triton.jit
def _find_kept(
    Logits,
    vocabulary,
    largest,
    temperature,
    slope,
    limit,
    top_k,
    top_p,
    min_p,
    CandidateLogits,
    CandidateTokens,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the limits keep. Returns (source, count, reach, low, high, rank, narrowed): of the `count` logits at
    `source`, the candidates if `narrowed`, those with gap bits below `reach`, and below `low` or, up to this rank
    among them, in [low, high)."""
    tokens, weight = nearer_than(Logits, vocabulary, largest, slope, limit, BLOCK)
    total, has_top_k = weight, (top_k > 0) & (top_k < tokens)
    reach = limit  # min_p as a limit of gaps
    if min_p > 0.0:
        gap = tl.abs(tl.log(min_p)).to(tl.float32) * temperature
        reach = tl.minimum(reach, gap.to(tl.int32, bitcast=True) + 1)

    # Bisect for a limit that leaves few candidates, yet all that any kept token or normalisation needs.
    low, high = tl.full((), 0.0, tl.float32), limit.to(tl.float32, bitcast=True)
    hopeless = tl.where(has_top_k, top_k > CANDIDATES, (top_p >= 1.0) & (min_p <= 0.0))
    tries = tl.where(hopeless, 0, 20)
    while (tokens > CANDIDATES) & (tries > 0):
        middle = 0.5 * low + 0.5 * high
        bits = middle.to(tl.int32, bitcast=True)
        fewer_tokens, fewer_weight = nearer_than(Logits, vocabulary, largest, slope, bits, BLOCK)
        enough = (fewer_weight.to(tl.float64) >= top_p * total.to(tl.float64)) | (bits >= reach)
        if has_top_k:
            enough = fewer_tokens >= top_k
        if enough:
            high, limit, tokens, weight = middle, bits, fewer_tokens, fewer_weight
        else:
            low = middle
        tries -= 1
    narrowed = tokens <= CANDIDATES
    source, count = Logits, vocabulary
    if narrowed:
        pick_nearer(Logits, vocabulary, largest, limit, CandidateLogits, CandidateTokens, BLOCK)
        source, count = CandidateLogits, tokens

    # Each limit keeps a beginning of the order; top-p's is no longer than top-k's, of which it takes its part.
    kept = total
    low_bits, high_bits, rank = limit, limit, tl.full((), 0, tl.int64)
    for search in tl.range(0, 2):
        target = top_k.to(tl.int64) - 1
        wanted = has_top_k
        if search == 1:
            # The token with which the weight reaches top_p is the last one kept.
            target = tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64) - 1
            target = tl.minimum(tl.maximum(target, 0), weight - 1)
            wanted = top_p < 1.0
        if wanted:
            low_bits, high_bits, rank, kept = bisect(
                source, count, largest, slope, target, search > 0, limit, tokens, weight, BLOCK
            )
    return source, count, reach, low_bits, high_bits, rank, narrowed
