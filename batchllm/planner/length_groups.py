"""Which sequences are likely to be answered at like length: those whose prompts begin with the same long stretch.

What a template says first (the instructions, the examples of a task, a document) decides more about the length of the
answer than what comes last. So a group is a shared prefix, as far down the tree as enough sequences still share it to
learn from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray
from batchllm.planner.folding import Kept
from batchllm.planner.prefix_tree import PrefixTree

NO_GROUP = -1
MIN_SEQUENCES = 16  # of fewer, most have started before one has ended
MOST_GROUPS = 1024  # what is learned of a group takes some KiB


def length_groups(
    tree: PrefixTree,
    kept: Kept,
    below: IntArray,
    terminal: IntArray,
    min_sequences: int = MIN_SEQUENCES,
    most_groups: int = MOST_GROUPS,
) -> NDArray[np.int32]:
    """[sequences] a number from 0 for each group. `below` counts the sequences below each trie node, `terminal` is the
    node where each sequence's prompt ends.

    The group of a sequence is the nearest kept node above its end that at least `min_sequences` have in common, or
    more of a large job, so that there are `most_groups` at most; all others together are one more group. One group for
    all says nothing: then everything is NO_GROUP.
    """
    enough = max(min_sequences, -(-len(terminal) // max(1, most_groups)))
    index = np.arange(tree.num_nodes)
    nearest = np.where(kept.kept & (below >= enough), index, tree.parent)
    nearest = np.append(nearest, NO_GROUP)  # the last entry answers for "none", which is index -1
    while not np.array_equal(further := nearest[nearest], nearest):
        nearest = further
    group = nearest[terminal]
    named = np.zeros(tree.num_nodes + 1, dtype=np.bool_)
    named[group] = True  # the last entry is that of "none"
    if named.sum() < 2:
        return np.full(len(terminal), NO_GROUP, dtype=np.int32)
    number: NDArray[np.int32] = (np.cumsum(named, dtype=np.int32) - 1)[group]
    return number
