"""Cache-Craft's formulas by hand and by property."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.chunkcache.decision import (
    StoredContext,
    best_variant,
    context_index,
    first_tokens,
    fix_share,
    highest,
    most_outside,
    order_penalty,
    overlap,
)

A, B, C, D = (name * 16 for name in (b"a", b"b", b"c", b"d"))


def stored(chunks: list[bytes], weights: list[float], outside_mean: float = 1.0) -> StoredContext:
    return StoredContext(
        tuple(chunks),
        np.array(weights),
        np.array([0.1, 0.7, 0.3, 0.7, 0.0]),
        np.zeros(5),
        outside_mean,
        1.0,
    )


def test_by_hand():
    one = stored([A, B, C], [1.0, 2.0, 5.0])
    assert overlap(one, [B, D, C]) == pytest.approx(7 / 8)
    assert order_penalty([A, B, C], [C, B, A]) == 1.0
    assert order_penalty([A, B, C], [A, C, D, B]) == pytest.approx(1 / 3)
    assert context_index(1.0, 1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert context_index(0.0, 1.0) == 0.5
    assert fix_share(one, [C, B]) == pytest.approx(context_index(1, 1) * (1 - 7 / 8 * 0))
    assert fix_share(one, [B, C]) == pytest.approx(context_index(1, 1) * (1 - 7 / 8))
    assert fix_share(one, [A, B, C]) == 0.0
    assert fix_share(one, [], strength=10) == 1.0


def test_chunks_without_a_context():
    alone = stored([], [], outside_mean=0.0)
    assert overlap(alone, []) == 1.0 and fix_share(alone, []) == 0.0
    assert overlap(alone, [A]) == 0.0 and fix_share(alone, [A]) == 0.5
    assert fix_share(stored([A], [2.0]), []) == pytest.approx(context_index(1, 1))


def test_the_variant_that_needs_least_repair():
    variants = [stored([D], [1.0]), stored([A, B], [1.0, 1.0]), stored([B, A], [1.0, 1.0])]
    assert best_variant(variants, [A, B]) == 1
    assert best_variant(variants, [B, A]) == 2
    assert best_variant(variants, [D, A]) == 0


def test_tokens():
    one = stored([A], [1.0])
    assert most_outside(one, 0.2).tolist() == [1]
    assert most_outside(one, 0.5).tolist() == [1, 2, 3]
    assert most_outside(one, 0.0).tolist() == []
    assert first_tokens(5, 0.21).tolist() == [0, 1]
    assert first_tokens(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert highest(np.array([1.0, 1.0, 1.0]), 0.5).tolist() == [0, 1]


names = st.lists(st.sampled_from([A, B, C, D]), unique=True)


@given(names, names, st.floats(0, 5), st.floats(0, 3))
def test_shares_are_shares(chunks: list[bytes], before: list[bytes], strength: float, outside: float):
    one = stored(chunks, [1.0 + number for number in range(len(chunks))], outside)
    assert 0 <= overlap(one, before) <= 1 and 0 <= order_penalty(chunks, before) <= 1
    assert 0 <= fix_share(one, before, strength) <= 1
    assert fix_share(one, chunks, strength) == 0
    assert order_penalty(chunks, before) == brute_force_penalty(chunks, before)
    assert fix_share(one, before, strength) <= fix_share(one, before, strength + 1)


def brute_force_penalty(chunks: list[bytes], before: list[bytes]) -> float:
    common = [chunk for chunk in chunks if chunk in before]
    pairs = [(a, b) for i, a in enumerate(common) for b in common[i + 1 :]]
    return sum(before.index(a) > before.index(b) for a, b in pairs) / len(pairs) if pairs else 0.0
