"""The order in which sequences are started: a depth-first walk of the trie, so that a prefix lives without
a gap.

The walk goes over the whole trie, nodes that are too short to be kept included: in such an order a
sequence's longest common prefix with any earlier sequence is that with the one just before it, so copying
from there computes every edge of the trie exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray
from batchllm.planner.prefix_tree import PrefixTree

OrderName = Literal["auto", "decode_ratio", "dual_scan", "longest_first", "tree", "input"]


@dataclass(frozen=True)
class Execution:
    """A permutation of the sequences, and where each trie node comes in it."""

    sequence: IntArray  # [sequences] in execution order, as indices in lexicographic order
    shared: IntArray  # [sequences] leading prompt tokens in common with the sequence executed just before
    node_first: IntArray  # [trie nodes] execution position of the first sequence of the subtree


def execution_order(
    tree: PrefixTree, terminal: IntArray, first_request: IntArray, decode: IntArray, policy: OrderName
) -> Execution:
    """Sequences come in lexicographic order of prompts: `terminal` is the trie node where each one's prompt
    ends, `first_request` its smallest request, `decode` the tokens it is expected to decode.

    Sequences that end at a node come before the ones that go on from it: the longer prompt then copies all
    of the shorter one. The children of a node are ordered by `policy`, ties by their first request:

        tree           by their first token
        input          by their first request
        decode_ratio   (BatchLLM, also `auto`) most expected output for the prompt tokens to compute first: its
                       decode tokens are there to fill the steps in which later prompts are computed
        dual_scan      (BlendServe) from both ends of the children sorted by computation over memory, so that each
                       stretch of the order needs about as much of both as all of it
        longest_first  (LPT) longest expected output first, so that no long one is left over at the end
    """
    ending = np.bincount(terminal, minlength=tree.num_nodes)
    node_first = _node_positions(tree, ending, _rank_nodes(tree, terminal, first_request, decode, policy))

    among_ending = np.arange(len(terminal)) - (np.cumsum(ending) - ending)[terminal]
    sequence = np.empty(len(terminal), dtype=np.int64)
    sequence[node_first[terminal] + among_ending] = np.arange(len(terminal))

    shared = tree.end[terminal[sequence]]  # the whole prompt where the one before is the same ...
    np.minimum.at(shared, node_first, tree.start)  # ... else up to where this one's branch leaves it
    return Execution(sequence, shared, node_first)


def _rank_nodes(
    tree: PrefixTree, terminal: IntArray, first_request: IntArray, decode: IntArray, policy: OrderName
) -> IntArray:
    """Node indices such that siblings come in the order they are executed in, sorted by parent."""
    if policy == "tree":
        return np.argsort(tree.parent, kind="stable")
    first = _first_request_below(tree, terminal, first_request)
    if policy == "input":
        return np.lexsort((first, tree.parent))
    decoded = np.zeros(tree.num_nodes, dtype=np.int64)
    np.add.at(decoded, terminal, decode)
    computed = tree.subtree_sum(tree.end - tree.start)
    if policy == "longest_first":
        longest = _longest_below(tree, terminal, decode)
        work = computed + tree.subtree_sum(decoded)
        return np.lexsort((first, -work, -longest, tree.parent))
    if policy == "dual_scan":
        held = _held_below(tree, terminal, decode)
        return _from_both_ends(tree.parent, computed + tree.subtree_sum(decoded), held, first)
    return np.lexsort((first, -tree.subtree_sum(decoded) / computed, tree.parent))


def _longest_below(tree: PrefixTree, terminal: IntArray, decode: IntArray) -> IntArray:
    """The longest expected output below each node."""
    longest = np.zeros(tree.num_nodes, dtype=np.int64)
    np.maximum.at(longest, terminal, decode)
    for nodes in tree.levels[:0:-1]:
        np.maximum.at(longest, tree.parent[nodes], longest[nodes])
    return longest


def _held_below(tree: PrefixTree, terminal: IntArray, decode: IntArray) -> IntArray:
    """KV token-steps that the subtree of each node takes: every edge as long as the longest output below it, and
    the outputs as they grow."""
    grown = np.zeros(tree.num_nodes, dtype=np.int64)
    np.add.at(grown, terminal, decode * (decode + 1) // 2)
    edge = (tree.end - tree.start) * _longest_below(tree, terminal, decode)
    return tree.subtree_sum(edge + grown)


def _from_both_ends(parent: IntArray, work: IntArray, held: IntArray, first: IntArray) -> IntArray:
    """Siblings sorted by work over memory, then taken from whichever end brings what is short so far.

    What a sibling takes is counted in shares of all its siblings'. Those with more work than memory are on the left,
    with a surplus; the others have a deficit. To take from the left as long as the surplus taken is no larger than
    the deficit taken is to merge both sides by what was taken from a side before.
    """
    ranked = np.lexsort((first, -work / np.maximum(held, 1), parent))
    new = np.append(True, np.diff(parent[ranked]) != 0) if len(parent) else np.empty(0, np.bool_)
    begin = np.flatnonzero(new)
    group = np.cumsum(new) - 1

    def share(value: IntArray) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = (
            value[ranked] / np.maximum(np.add.reduceat(value[ranked], begin), 1)[group]
        )
        return shares

    surplus = share(work) - share(held) if len(parent) else np.empty(0)
    left = surplus > 0
    more, less = np.where(left, surplus, 0.0), np.where(left, 0.0, -surplus)
    before = np.cumsum(more) - more
    before -= before[begin][group]
    through = np.cumsum(less)
    last = np.append(begin[1:], len(parent))[: len(begin)] - 1
    after = through[last][group] - through
    return ranked[np.lexsort((left, np.where(left, before, after), group))]


def _first_request_below(tree: PrefixTree, terminal: IntArray, first_request: IntArray) -> IntArray:
    first = np.full(tree.num_nodes, np.iinfo(np.int64).max)
    np.minimum.at(first, terminal, first_request)
    for nodes in tree.levels[:0:-1]:
        np.minimum.at(first, tree.parent[nodes], first[nodes])
    return first


def _node_positions(tree: PrefixTree, ending: IntArray, ranked: IntArray) -> IntArray:
    """Execution position of the first sequence below each node, given all siblings in order, sorted by
    parent.
    """
    below = tree.subtree_sum(ending)
    parent = tree.parent[ranked]
    earlier = np.cumsum(below[ranked]) - below[ranked]
    new_parent = np.append(True, parent[1:] != parent[:-1]) if len(parent) else np.empty(0, np.bool_)
    earlier -= earlier[new_parent][np.cumsum(new_parent) - 1]
    offset = np.empty(tree.num_nodes, dtype=np.int64)  # from the parent's first sequence
    offset[ranked] = earlier + np.where(parent >= 0, ending[parent], 0)
    # A node's position is the sum of the offsets on its path: of the subtrees open at it in the pre-order.
    step = np.append(offset, 0)
    np.subtract.at(step, tree.below, offset)
    return np.cumsum(step[:-1])
