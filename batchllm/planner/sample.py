"""A part of a plan that can be simulated in its place."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan

_BLOCKS = 32


def spread_blocks(sequences: int, wanted: int) -> NDArray[np.bool_]:
    """About `wanted` of the sequences, in a few long runs of neighbours, evenly spread: neighbours share."""
    position = np.arange(sequences)
    block = position * _BLOCKS // max(1, sequences)
    within = position - np.searchsorted(block, block)
    return within < -(-wanted // _BLOCKS)


def part_of(plan: Plan, keep: NDArray[np.bool_]) -> Plan:
    """The plan of the sequences with `keep` set, in their order. Its requests are those of these sequences only.

    A node that copied from one that has gone computes all of its tokens.
    """
    kept_before = np.append(0, np.cumsum(keep))
    first = np.searchsorted(plan.sequence_node, np.arange(plan.num_nodes))
    leaves = kept_before[first + plan.node_leaves] - kept_before[first]
    node = np.flatnonzero(leaves > 0)
    index = np.full(plan.num_nodes + 1, -1, dtype=np.int64)  # the last entry answers for "none"
    index[node] = np.arange(len(node))
    donor = index[plan.node_donor[node]]
    is_leaf = plan.node_sequence[node] >= 0
    count = np.diff(plan.request_ptr)[keep]
    return dataclasses.replace(
        plan,
        node_parent=index[plan.node_parent[node]].astype(np.int32),
        node_start=plan.node_start[node],
        node_end=plan.node_end[node],
        node_row=plan.node_row[node],
        node_donor=donor.astype(np.int32),
        node_copied=np.where(donor >= 0, plan.node_copied[node], 0).astype(np.int32),
        node_leaves=leaves[node].astype(np.int32),
        node_sequence=np.where(is_leaf, np.cumsum(is_leaf) - 1, -1).astype(np.int32),
        sequence_node=np.flatnonzero(is_leaf).astype(np.int32),
        sequence_params=plan.sequence_params[keep],
        sequence_group=plan.sequence_group[keep],
        request_ptr=np.append(0, np.cumsum(count)),
        request=_take(plan.request, plan.request_ptr[:-1][keep], count),
    )


def _take(values: IntArray, start: IntArray, count: IntArray) -> IntArray:
    taken: IntArray = values[np.arange(int(count.sum())) + np.repeat(start - np.cumsum(count) + count, count)]
    return taken
