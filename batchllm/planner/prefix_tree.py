"""The compact trie of all distinct prompts, as arrays, built from the sorted order and its common prefixes.

A trie node is a point where prompts part or where a prompt ends; its edge is the tokens between its parent
and itself. In the array of neighbours' common prefixes a parting point is a maximal run of values >= its
depth that attains that depth (an "LCP interval"), so the trie follows from nearest smaller values: no
recursion, no token is read, and nothing depends on how deep the trie is but the number of vectorised steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray


@dataclass(frozen=True)
class PrefixTree:
    """Trie nodes in lexicographic pre-order, the empty prefix left out: a tree for each first token.

    The prompts below a node are the range `first_prompt .. end_prompt` of the distinct prompts in
    lexicographic order. Every prompt ends exactly at one node.
    """

    parent: IntArray  # [nodes] -1: the empty prefix
    start: IntArray  # [nodes] depth in tokens where the node's edge begins (= end of the parent)
    end: IntArray  # [nodes] depth in tokens of the node itself, > start
    first_prompt: IntArray  # [nodes]
    end_prompt: IntArray  # [nodes] one past the last
    level: IntArray  # [nodes] number of trie nodes above
    below: IntArray  # [nodes] one past the last node of the subtree (pre-order: its nodes are contiguous)
    terminal: IntArray  # [prompts] the node at which each prompt ends

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def distinct_tokens(self) -> int:
        """Tokens on all edges: what has to be computed when every shared prefix is computed once."""
        return int((self.end - self.start).sum())

    @cached_property
    def levels(self) -> list[IntArray]:
        """Node indices of each level, the top first."""
        by_level = np.argsort(self.level, kind="stable")
        borders = np.cumsum(np.bincount(self.level)) if len(by_level) else np.empty(0, np.int64)
        return np.split(by_level, borders[:-1])

    def subtree_sum(self, value: IntArray) -> IntArray:
        """Sum over each node's subtree, itself included."""
        total = np.append(0, np.cumsum(value))
        result: IntArray = total[self.below] - total[: self.num_nodes]
        return result


def build_prefix_tree(lcp: IntArray, lengths: IntArray) -> PrefixTree:
    """Both arrays are of the distinct, non-empty prompts in lexicographic order; `lcp[0]` is 0."""
    prompts = len(lengths)
    if prompts == 0:
        none = np.empty(0, dtype=np.int64)
        return PrefixTree(none, none, none, none, none, none, none, none)
    # Border i lies between prompts i - 1 and i; the outermost two are lower than everything.
    depth = np.concatenate(([-1], lcp[1:], [-1])).astype(np.int64)
    left, right = _nearest_lower(depth)
    # A parting point is named by the first of its borders: the one with a lower value to its left.
    inner = np.flatnonzero((depth > 0) & (depth[left] < depth))
    own_end = np.flatnonzero(depth[1:] < lengths)  # prompts that are no prefix of the next one

    first = np.concatenate((left[inner], own_end))
    stop = np.concatenate((right[inner], own_end + 1))
    end = np.concatenate((depth[inner], lengths[own_end]))
    preorder = np.lexsort((end, first))
    first, stop, end = first[preorder], stop[preorder], end[preorder]
    start = np.maximum(np.maximum(depth[first], depth[stop]), 0)

    below = np.searchsorted(first, stop)
    level = _levels(below)
    terminal = np.searchsorted(first, np.arange(prompts), side="right") - 1
    return PrefixTree(_parents(level), start, end, first, stop, level, below, terminal)


def _nearest_lower(depth: IntArray) -> tuple[IntArray, IntArray]:
    """For each border: the nearest one on its left with a value <= its own, the nearest on its right with <
    .

    The outermost borders must be the lowest; they point at themselves.
    """
    last = len(depth) - 1
    left = _jump_left(depth, or_equal=True)
    right = last - _jump_left(depth[::-1], or_equal=False)[::-1]
    return left, right


def _jump_left(depth: IntArray, *, or_equal: bool) -> IntArray:
    """Pointer jumping: everything between a border and its pointer is no lower than it, at every step."""
    pointer = np.arange(-1, len(depth) - 1)
    pointer[0] = 0
    seeking = np.arange(1, len(depth) - 1)
    while len(seeking):
        found, wanted = depth[pointer[seeking]], depth[seeking]
        seeking = seeking[found > wanted] if or_equal else seeking[found >= wanted]
        pointer[seeking] = pointer[pointer[seeking]]
    return pointer


def _levels(below: IntArray) -> IntArray:
    """Number of subtrees open at each node of a pre-order, its own not counted."""
    nodes = len(below)
    closing = np.bincount(below, minlength=nodes + 1)[:nodes]
    level: NDArray[np.int64] = np.arange(nodes) - np.cumsum(closing)
    return level


def _parents(level: IntArray) -> IntArray:
    """In pre-order the parent of a node is the nearest node before it that is one level higher."""
    nodes = len(level)
    index = np.arange(nodes)
    address = np.sort(level * nodes + index)
    above = np.searchsorted(address, (level - 1) * nodes + index) - 1
    return np.where(level > 0, address[above] % nodes, -1)
