"""Which prefixes are worth a node of their own, and which are too short and left to their children."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray
from batchllm.planner.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Kept:
    """The trie nodes that become shared nodes of the plan."""

    kept: NDArray[np.bool_]  # [trie nodes]
    anchor: IntArray  # [trie nodes] nearest kept node at or above, -1: none
    depth: int  # kept nodes on the longest path


def fold_short_prefixes(
    tree: PrefixTree, sequences_below: IntArray, sequences_ending: IntArray, min_shared_tokens: int
) -> Kept:
    """Top-down: keep a node that two sequences share if it adds enough tokens to the nearest kept node
    above.

    A prompt that several sequences end in is kept however short, for they share all of it. A kept node
    never has just one node below it: where a trie node lies, prompts part or sequences end.
    """
    kept = np.zeros(tree.num_nodes, dtype=np.bool_)
    anchor = np.full(tree.num_nodes, -1, dtype=np.int64)
    kept_above = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels:
        parent = tree.parent[nodes]
        above = np.where(parent >= 0, anchor[parent], -1)
        own = tree.end[nodes] - np.where(above >= 0, tree.end[above], 0)
        keep = (sequences_below[nodes] >= 2) & (own >= min_shared_tokens) | (sequences_ending[nodes] >= 2)
        kept[nodes] = keep
        anchor[nodes] = np.where(keep, nodes, above)
        kept_above[nodes] = np.where(parent >= 0, kept_above[parent], 0) + keep
    return Kept(kept, anchor, int(kept_above.max(initial=0)))
