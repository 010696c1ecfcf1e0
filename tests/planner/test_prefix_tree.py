"""The trie from sorted neighbours, against a trie made of sets of prefixes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_oracle import common_prefix, random_rows, trie_edges

from batchllm.planner.prefix_tree import build_prefix_tree


def brute_nodes(rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Prefix of each compact node (prompts part there, or one ends there) → range of rows below."""
    nodes = {}
    for prefix in {row[:i] for row in rows for i in range(1, len(row) + 1)}:
        below = [i for i, row in enumerate(rows) if row[: len(prefix)] == prefix]
        if prefix in rows or len({rows[i][len(prefix)] for i in below}) > 1:
            nodes[prefix] = (below[0], below[-1] + 1)
    return nodes


def test_random_tries():
    rng = np.random.default_rng(11)
    for _ in range(600):
        made = random_rows(rng, int(rng.integers(0, 12)), int(rng.integers(1, 4)), int(rng.integers(1, 10)))
        rows = sorted({tuple(row) for row in made if row})
        lcp = [0, *(common_prefix(a, b) for a, b in pairwise(rows))][: len(rows)]
        tree = build_prefix_tree(
            np.array(lcp, dtype=np.int64), np.array([len(row) for row in rows], np.int64)
        )
        check_tree(tree, rows)


@settings(max_examples=2000, deadline=None)
@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), max_size=12))
def test_every_trie_equals_the_one_of_sets(prompts):
    rows = sorted(prompts)
    lcp = [0, *(common_prefix(a, b) for a, b in pairwise(rows))][: len(rows)]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    check_tree(build_prefix_tree(np.array(lcp, dtype=np.int64), lengths), rows)


def check_tree(tree, rows):
    prefixes = [rows[p][:end] for p, end in zip(tree.first_prompt.tolist(), tree.end.tolist())]
    ranges = list(zip(tree.first_prompt.tolist(), tree.end_prompt.tolist()))
    expected = brute_nodes(rows)
    assert dict(zip(prefixes, ranges)) == expected
    assert prefixes == sorted(expected)  # lexicographic pre-order
    assert tree.distinct_tokens == trie_edges(rows)
    assert [prefixes[node] for node in tree.terminal.tolist()] == rows
    for node, prefix in enumerate(prefixes):
        above = [other for other in prefixes if len(other) < len(prefix) and prefix[: len(other)] == other]
        parent = max(above, key=len, default=())
        assert (prefixes[tree.parent[node]] if tree.parent[node] >= 0 else ()) == parent
        assert tree.start[node] == len(parent)
        assert tree.level[node] == len(above)
        subtree = [other for other in prefixes if other[: len(prefix)] == prefix]
        assert prefixes[node : tree.below[node]] == subtree
    if prefixes:
        assert sorted(np.concatenate(tree.levels).tolist()) == list(range(len(prefixes)))
        for level, nodes in enumerate(tree.levels):
            assert (tree.level[nodes] == level).all()


def test_a_hundred_thousand_levels():
    """Nested prompts of 1, 2, 3 ... tokens, known by their arrays alone: no recursion, no quadratic work."""
    n = 100_000
    length = np.arange(1, n + 1)
    tree = build_prefix_tree(length - 1, length)
    assert tree.distinct_tokens == n
    np.testing.assert_array_equal(tree.parent, np.arange(-1, n - 1))
    np.testing.assert_array_equal(tree.terminal, np.arange(n))
    # The same with a last prompt that leaves at the top: every level is closed at one place.
    tree = build_prefix_tree(np.append(length - 1, 0), np.append(length, 3))
    assert tree.distinct_tokens == n + 3
    assert tree.end_prompt[0] == n
