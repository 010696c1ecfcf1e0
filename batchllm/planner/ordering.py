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

from batchllm.core import IntArray
from batchllm.planner.prefix_tree import PrefixTree

OrderName = Literal["auto", "decode_ratio", "tree", "input"]


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
    of the shorter one. The children of a node are ordered by `policy`, ties by their first request.
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
    # BatchLLM, section 1.3: what decodes much for the prompt tokens it costs comes first, so that its
    # decode tokens are there to fill the steps in which later prompts are computed.
    decoded = np.zeros(tree.num_nodes, dtype=np.int64)
    np.add.at(decoded, terminal, decode)
    ratio = tree.subtree_sum(decoded) / tree.subtree_sum(tree.end - tree.start)
    return np.lexsort((first, -ratio, tree.parent))


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
