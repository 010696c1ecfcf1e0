"""Searches over a row of logits without sorting it: parts of the sampler's kernel.

A token's gap is the largest logit minus its own, a float of at least 0. Gaps are compared by their bits: as integers
these have the order of the floats. Nearer tokens have smaller gaps, so larger probabilities. A token's weight is
exp(-gap / temperature) as an integer, in units of 2^-40; `slope` is -log2(e) / temperature.

`Logits` points to `count` contiguous logits: the row itself or candidates picked from it. Loops do not hoist what is
the same in every round: it would be kept in registers, and there are none to spare.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels
from batchllm_kernels.random_numbers import gumbel_noise

_UNIT = tl.constexpr(1099511627776.0)  # 2^40: the weights of 2^20 tokens cannot overflow int64


@triton.jit
def largest_logit(Logits, count, BLOCK: tl.constexpr):
    """(largest logit as float32, the first position that has it)"""
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    position = lane
    for start in tl.range(0, count, BLOCK, disable_licm=True):
        column = start + lane
        logits = tl.load(Logits + column, mask=column < count, other=float("-inf")).to(tl.float32)
        larger = logits > largest
        largest = tl.where(larger, logits, largest)
        position = tl.where(larger, column, position)
    of_row = tl.max(largest, axis=0)
    return of_row, tl.min(tl.where(largest == of_row, position, count), axis=0)


@triton.jit
def _gaps(Logits, column, count, largest):
    """Bits of the gaps at these positions; beyond the row, infinity's."""
    logits = tl.load(Logits + column, mask=column < count, other=float("-inf")).to(tl.float32)
    return (largest - logits).to(tl.int32, bitcast=True)


@triton.jit
def _weights(gaps, slope):
    return (tl.exp2(gaps.to(tl.float32, bitcast=True) * slope) * _UNIT).to(tl.int64)


@triton.jit
def nearer_than(Logits, count, largest, slope, limit, BLOCK: tl.constexpr):
    """(how many tokens have gap bits below `limit`, the sum of their weights)"""
    tokens, weights = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, count, BLOCK, disable_licm=True):
        gaps = _gaps(Logits, start + tl.arange(0, BLOCK), count, largest)
        nearer = gaps < limit
        tokens += nearer.to(tl.int32)
        weights += tl.where(nearer, _weights(gaps, slope), 0)
    return tl.sum(tokens, axis=0), tl.sum(weights, axis=0)


@triton.jit
def bisect(
    Logits, count, largest, slope, target, by_weight, limit, limit_tokens, limit_weight, BLOCK: tl.constexpr
):
    """Where a running sum in order of gaps first exceeds `target` (int64): of weights if `by_weight`, else of tokens.

    The sum over gap bits below `limit`, known to the caller in both forms, must exceed it. Returns (low, high, rank,
    through): the token has gap bits in [low, high), as has none with another gap; its rank among those, by position;
    and the weight of all tokens in the order up to it, inclusive.
    """
    low, low_tokens, low_weight = tl.full((), 0, tl.int32), 0, tl.full((), 0, tl.int64)
    steps = 0
    while (limit - low > 1) & (limit_tokens - low_tokens > 1):
        # Halving the gap soon leaves one token. Halving the bits ends soon where several are equal.
        middle = low + (limit - low) // 2
        if steps < 16:
            gap = 0.5 * low.to(tl.float32, bitcast=True) + 0.5 * limit.to(tl.float32, bitcast=True)
            middle = tl.minimum(tl.maximum(gap.to(tl.int32, bitcast=True), low + 1), limit - 1)
        tokens, weight = nearer_than(Logits, count, largest, slope, middle, BLOCK)
        if tl.where(by_weight, weight, tokens.to(tl.int64)) <= target:
            low, low_tokens, low_weight = middle, tokens, weight
        else:
            limit, limit_tokens, limit_weight = middle, tokens, weight
        steps += 1
    each = (limit_weight - low_weight) // (limit_tokens - low_tokens)
    rank = target - low_tokens
    if by_weight:
        rank = (target - low_weight) // each
    return low, limit, rank, low_weight + (rank + 1) * each


@triton.jit
def best_score(
    Logits,
    Tokens,
    has_tokens,
    count,
    largest,
    temperature,
    first,
    second,
    reach,
    low,
    high,
    rank,
    BLOCK: tl.constexpr,
):
    """The token with the largest score, of equal ones the first: Gumbel noise of the words - gap / temperature.

    Of tokens with gap bits below `reach`, and below `low` or, the first `rank` + 1 of them, in [low, high), of which
    all have one gap if any are left out. `Tokens` are the ids of the positions, if these are not the positions.
    """
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    passed = tl.full((), 0, tl.int32)
    for start in tl.range(0, count, BLOCK, disable_licm=True):
        column = start + lane
        gaps = _gaps(Logits, column, count, largest)
        kept = gaps < low
        if low < high:
            edge = ((gaps >= low) & (gaps < high)).to(tl.int32)
            kept |= (edge > 0) & (passed + tl.cumsum(edge, axis=0) - 1 <= rank)
            passed += tl.sum(edge, axis=0)
        ids = column
        if has_tokens:
            ids = tl.load(Tokens + column, mask=column < count, other=0)
        scores = gumbel_noise(first, second, ids) - tl.div_rn(gaps.to(tl.float32, bitcast=True), temperature)
        better = kept & (gaps < reach) & (scores > best)
        best = tl.where(better, scores, best)
        token = tl.where(better, ids, token)
    of_row = tl.max(best, axis=0)
    return tl.min(tl.where(best == of_row, token, 0x7FFFFFFF), axis=0)


@triton.jit
def pick_nearer(Logits, count, largest, limit, PickedLogits, PickedTokens, BLOCK: tl.constexpr):
    """Copies logits and positions of tokens with gap bits below `limit`, in order of position."""
    picked = 0
    for start in tl.range(0, count, BLOCK, disable_licm=True):
        column = start + tl.arange(0, BLOCK)
        nearer = _gaps(Logits, column, count, largest) < limit
        place = picked + tl.cumsum(nearer.to(tl.int32), axis=0) - 1
        logits = tl.load(Logits + column, mask=nearer, other=0.0)
        tl.store(PickedLogits + place, logits, mask=nearer)
        tl.store(PickedTokens + place, column, mask=nearer)
        picked += tl.sum(nearer.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads of the program read what these wrote
