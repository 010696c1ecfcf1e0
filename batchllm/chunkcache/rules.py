"""Which tokens of stored chunks are computed again in a new place, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from batchllm.chunkcache.decision import (
    FloatArray,
    StoredContext,
    first_tokens,
    fix_share,
    highest,
    most_outside,
)
from batchllm.chunkcache.identity import ChunkContext
from batchllm.core import IntArray


@dataclass(frozen=True)
class PlacedChunk:
    """A stored chunk at its place in a prompt. K before RoPE and V by layer, [tokens, heads, dim]."""

    start: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    context: ChunkContext  # that it was computed in
    stored: StoredContext
    before: tuple[bytes, ...]  # keys of the chunks before it now

    @property
    def num_tokens(self) -> int:
        return len(self.stored.outside)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class RepairRule(Protocol):
    """Names the tokens to compute again. One knob: about which share of the placed tokens."""

    @property
    def check_layer(self) -> int | None:
        """If not None, all tokens are computed up to this layer first, and `choose` is told how V differs there."""
        ...

    def choose(self, placed: Sequence[PlacedChunk], deviation: FloatArray | None) -> IntArray:
        """Positions, ascending. `deviation` [tokens of all placed chunks]: squared difference of V."""
        ...


@dataclass(frozen=True)
class CacheCraftRule:
    """Cache-Craft: of each chunk its fix share (CFO), the tokens that looked outside most.

    `strength` is the knob; `strength_for` finds the one with which a job computes a given share again.
    """

    strength: float
    check_layer: int | None = None

    def choose(self, placed: Sequence[PlacedChunk], deviation: FloatArray | None) -> IntArray:
        return _positions(
            placed,
            [
                most_outside(chunk.stored, fix_share(chunk.stored, chunk.before, self.strength))
                for chunk in placed
            ],
        )


@dataclass(frozen=True)
class FirstTokensRule:
    """LegoLink: the first tokens of each chunk."""

    share: float
    check_layer: int | None = None

    def choose(self, placed: Sequence[PlacedChunk], deviation: FloatArray | None) -> IntArray:
        return _positions(placed, [first_tokens(chunk.num_tokens, self.share) for chunk in placed])


@dataclass(frozen=True)
class MostSensitiveRule:
    """The tokens of all placed chunks that came out most differently in other contexts."""

    share: float
    check_layer: int | None = None

    def choose(self, placed: Sequence[PlacedChunk], deviation: FloatArray | None) -> IntArray:
        own = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in placed])
        score = np.concatenate([chunk.stored.sensitivity for chunk in placed])
        if not score.any():  # known from one context only: where they looked outside, they may be sensitive
            score = np.concatenate([chunk.stored.outside for chunk in placed])
        return own[highest(score, self.share)]


@dataclass(frozen=True)
class LargestDeviationRule:
    """CacheBlend (Yao et al., EuroSys 2025, arXiv 2405.16444): the tokens whose V differs most at an early layer."""

    share: float
    check_layer: int | None = 1

    def choose(self, placed: Sequence[PlacedChunk], deviation: FloatArray | None) -> IntArray:
        assert deviation is not None
        own = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in placed])
        return own[highest(deviation, self.share)]


def strength_for(chunks: Sequence[PlacedChunk], share: float) -> float:
    """The strength at which Cache-Craft's rule computes this share of all tokens of these chunks again."""
    weight = np.array([chunk.num_tokens for chunk in chunks], dtype=np.float64)
    per_strength = np.array([_uncut_share(chunk) for chunk in chunks])
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        found = float((np.minimum(1.0, middle * per_strength) * weight).sum() / weight.sum())
        low, high = (middle, high) if found < share else (low, middle)
    return high


def _uncut_share(chunk: PlacedChunk) -> float:
    return fix_share(chunk.stored, chunk.before, 1.0)


def _positions(placed: Sequence[PlacedChunk], chosen: Sequence[IntArray]) -> IntArray:
    parts = [chunk.start + places for chunk, places in zip(placed, chosen)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
