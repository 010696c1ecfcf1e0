"""The order of the prompts and their exact common prefixes, against Python's own sort of lists."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_oracle import common_prefix, random_rows

from batchllm.planner import sort
from batchllm.planner.sort import sort_prompts


def check_sorted(rows: list[list[int]]) -> None:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.array([t for row in rows for t in row], dtype=np.int32)
    order, lcp = sort_prompts(tokens, np.cumsum(lengths) - lengths, lengths)
    expected = sorted(range(len(rows)), key=lambda i: (rows[i], i))
    assert order.tolist() == expected
    between = [common_prefix(rows[a], rows[b]) for a, b in pairwise(expected)]
    assert lcp.tolist() == [0, *between][: len(rows)]


@pytest.fixture(params=[(1, 1), (2, 6), (8, 64), (64, 1 << 18)])
def block_and_slice(request, monkeypatch):
    """Tiny blocks and slices, so that small rows go through many of both."""
    monkeypatch.setattr(sort, "_MIN_BLOCK", request.param[0])
    monkeypatch.setattr(sort, "_SLICE_TOKENS", request.param[1])


def test_random_rows(block_and_slice):
    rng = np.random.default_rng(5)
    for _ in range(300):
        rows = random_rows(rng, int(rng.integers(0, 20)), int(rng.integers(1, 5)), int(rng.integers(1, 30)))
        check_sorted(rows)


@given(st.lists(st.lists(st.sampled_from([0, 1, 2**31 - 1]), max_size=12), max_size=12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_rows(rows):
    check_sorted(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[3]],
        [[]],
        [[5]] * 4,
        [[7] * n for n in range(40, 0, -1)],  # nested prefixes
        [[7] * 500 + [i] for i in range(5)] + [[7] * 500],
        [[1] * 64, [1] * 64 + [2], [1] * 63, [1] * 128, [1] * 64],  # rows that end where a block does
    ],
)
def test_awkward_rows(rows, block_and_slice):
    check_sorted(rows)


def test_keys_too_large_for_one_integer(monkeypatch):
    """Many groups times many tokens: the ranking falls back to two keys."""
    major = np.array([2**60, 5, 2**60, 5, 5])
    minor = np.array([9, 2**31, 9, -1, 7])
    key, ranking = sort._rank(major, minor)
    assert ranking.tolist() == [3, 4, 1, 0, 2]
    assert np.flatnonzero(np.diff(key)).tolist() == [0, 1, 2]


def test_rounds_do_not_grow_with_nesting(monkeypatch):
    """Each row extends the last: halved by every leader, not peeled off one by one."""
    rounds = 0
    compare = sort._compare

    def counted(*args):
        nonlocal rounds
        rounds += 1
        return compare(*args)

    monkeypatch.setattr(sort, "_compare", counted)
    check_sorted([[1] * n for n in range(1, 800)])
    assert rounds < 60
