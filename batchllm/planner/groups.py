"""What is shared with whom, for people: the groups at the top of the plan and the sharing at each level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan


@dataclass(frozen=True)
class Groups:
    """The shared nodes without a parent, in execution order."""

    node: IntArray  # [groups]
    row: IntArray  # [groups] a row that begins with the prefix
    requests: IntArray  # [groups] requests below
    sequences: IntArray  # [groups] sequences below
    prefix_tokens: IntArray  # [groups] length of the shared prefix
    saved_tokens: IntArray  # [groups] prompt tokens of the group that are taken from another's work


@dataclass(frozen=True)
class SharingLevels:
    """Entry l sums over the shared nodes with l shared nodes above them."""

    nodes: IntArray  # [levels]
    sequences: IntArray  # [levels] below these nodes
    tokens: IntArray  # [levels] own tokens of the nodes: stored once
    saved_tokens: IntArray  # [levels] what the sequences below but one would have computed again


def top_groups(plan: Plan) -> Groups:
    node = np.flatnonzero((plan.node_parent < 0) & (plan.node_sequence < 0))
    # Leaves are numbered in pre-order, so the sequences below a node follow the leaves before it.
    first = np.searchsorted(plan.sequence_node, node)
    stop = first + plan.node_leaves[node]
    saved = np.append(0, np.cumsum(plan.request_shared[plan.request]))
    return Groups(
        node=node,
        row=plan.node_row[node],
        requests=plan.request_ptr[stop] - plan.request_ptr[first],
        sequences=stop - first,
        prefix_tokens=plan.node_end[node].astype(np.int64),
        saved_tokens=saved[plan.request_ptr[stop]] - saved[plan.request_ptr[first]],
    )


def sharing_levels(plan: Plan) -> SharingLevels:
    """Without copied stretches and requests that one sequence answers together: they belong to no node."""
    shared = np.flatnonzero(plan.node_sequence < 0)
    level = _shared_above(plan, shared)
    tokens = (plan.node_end - plan.node_start)[shared].astype(np.int64)
    leaves = plan.node_leaves[shared].astype(np.int64)

    def per_level(value: IntArray) -> IntArray:
        total = np.zeros(plan.stats.depth, dtype=np.int64)
        np.add.at(total, level, value)
        return total

    return SharingLevels(
        nodes=per_level(np.ones(len(shared), dtype=np.int64)),
        sequences=per_level(leaves),
        tokens=per_level(tokens),
        saved_tokens=per_level((leaves - 1) * tokens),
    )


def _shared_above(plan: Plan, shared: NDArray[np.int64]) -> IntArray:
    """Number of shared nodes open at each shared node of the pre-order, its own not counted."""
    first = np.searchsorted(plan.sequence_node, shared)
    stop = np.searchsorted(first, first + plan.node_leaves[shared])  # the first shared node past the subtree
    closing = np.bincount(stop, minlength=len(shared) + 1)[: len(shared)]
    level: IntArray = np.arange(len(shared)) - np.cumsum(closing)
    return level
