"""Whether the stored KV of a chunk may be used after other chunks than those it was computed after, and what to repair.

Cache-Craft (Agarwal et al., SIGMOD 2025, arXiv 2502.15734) measures, when a chunk is computed, how much attention its
tokens give to the chunks before it. A chunk that looked little outside, or at chunks that are there again in the same
order, needs little repair:

    overlap        share of that attention that went to chunks which are there again      (eq. 6)
    order penalty  discordant pairs among those chunks, of all their pairs (Kendall)      (eq. 7)
    CCI            1 / (1 + exp(-outside / inside)), both means per pair of tokens        (eq. 9-11)
    fix share      strength * CCI * (1 - overlap * (1 - order penalty)), at most 1        (eq. 8, 12)

and the tokens to compute again are the `fix share` of the chunk that looked outside most (eq. 14).

Looking outside does not mean depending on it. Where a chunk has been computed in several contexts, it is known which of
its tokens came out differently, and how much others look at these (`sensitivity`); those are the ones to repair: of all
chunks of a prompt together, since most chunks depend on nothing and a few on much. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class StoredContext:
    """What is known of one stored variant of a chunk."""

    chunks: tuple[bytes, ...]  # keys of the chunks it was computed after, in order
    weights: FloatArray  # [chunks] attention that the chunk gave to each of them
    outside: FloatArray  # [tokens] attention that each token gave to all of them
    sensitivity: FloatArray  # [tokens] how much K depends on the context, times the attention from others
    outside_mean: float
    inside_mean: float


def context_index(outside_mean: float, inside_mean: float) -> float:
    """CCI, 0.5 to 1: how much the chunk's KV depends on what stood before it."""
    if inside_mean <= 0:
        return 1.0 if outside_mean > 0 else 0.5
    return 1 / (1 + math.exp(-min(outside_mean / inside_mean, 700.0)))


def overlap(stored: StoredContext, before: Sequence[bytes]) -> float:
    """Share of the attention to earlier chunks that went to chunks that are there again; 1 if there was none."""
    total = float(stored.weights.sum())
    if not stored.chunks or total <= 0:
        return 1.0 if not before else 0.0
    there = set(before)
    return float(sum(w for key, w in zip(stored.chunks, stored.weights) if key in there)) / total


def order_penalty(stored: Sequence[bytes], before: Sequence[bytes]) -> float:
    """Share of the pairs of common chunks that stand in the other order, 0 to 1."""
    place = {key: number for number, key in reversed(list(enumerate(before)))}
    places = [place[key] for key in dict.fromkeys(stored) if key in place]
    pairs = len(places) * (len(places) - 1) // 2
    discordant = sum(a > b for index, a in enumerate(places) for b in places[index + 1 :])
    return discordant / pairs if pairs else 0.0


def fix_share(stored: StoredContext, before: Sequence[bytes], strength: float = 1.0) -> float:
    """CFO: the share of the chunk's tokens to compute again after the chunks `before`, 0 to 1."""
    kept = overlap(stored, before) * (1 - order_penalty(stored.chunks, before))
    wanted = strength * context_index(stored.outside_mean, stored.inside_mean) * (1 - kept)
    return min(1.0, max(0.0, wanted))


def best_variant(variants: Sequence[StoredContext], before: Sequence[bytes]) -> int:
    """Which variant needs least repair; of equals the first."""
    return min(range(len(variants)), key=lambda index: fix_share(variants[index], before))


def most_outside(stored: StoredContext, share: float) -> IntArray:
    """Places of the tokens to compute again, ascending: a share of the tokens, those that looked outside most."""
    return highest(stored.outside, share)


def first_tokens(num_tokens: int, share: float) -> IntArray:
    """LegoLink (Hu et al., ICML 2025, arXiv 2410.15332): the beginning of the chunk, where attention sinks form."""
    return np.arange(_count(num_tokens, share))


def highest(score: FloatArray, share: float) -> IntArray:
    """Places of the highest scores, ascending; of equals the earlier ones."""
    count = _count(len(score), share)
    return np.sort(np.argsort(-score, kind="stable")[:count])


def _count(tokens: int, share: float) -> int:
    return min(tokens, math.ceil(share * tokens - 1e-9))
