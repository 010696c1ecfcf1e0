"""Prompt tokens whose log-probabilities are asked for (`prompt_logprobs`), by the node of the plan that holds them.

A node is asked for whole or not at all: whoever wants a prompt's tokens wants all of them, and so all on its path. So
however many rows share a node, its tokens are listed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan, PromptTable
from batchllm.planner.sequences import take_ranges


@dataclass(frozen=True)
class WantedTokens:
    """A node's entries are of its own prompt tokens in order, without a prompt's very first one."""

    node_ptr: IntArray  # [nodes + 1] CSR into the others
    home: IntArray  # the node that holds the token before: the node itself, or its parent
    position: IntArray  # of the token before, from whose logits the log-probability is read
    target: IntArray  # the token
    top: NDArray[np.int32]  # the most probable tokens that are wanted beside it


def wanted_tokens(plan: Plan, prompts: PromptTable) -> WantedTokens:
    """Of the planned sequences whose parameters ask for it."""
    top = _node_top(plan, prompts)
    first = np.maximum(plan.node_start, 1).astype(np.int64)
    count = np.where(top >= 0, np.maximum(plan.node_end - first, 0), 0)
    node = np.repeat(np.arange(plan.num_nodes), count)
    token = take_ranges(first, count)
    return WantedTokens(
        node_ptr=np.concatenate(([0], np.cumsum(count))),
        home=np.where(token > plan.node_start[node], node, plan.node_parent[node]).astype(np.int64),
        position=token - 1,
        target=prompts.tokens[prompts.offsets[plan.node_row[node]] + token].astype(np.int64),
        top=top[node],
    )


def _node_top(plan: Plan, prompts: PromptTable) -> NDArray[np.int32]:
    """[nodes] most tokens that any sequence at or below a node wants beside each; -1: none wants any."""
    asked = [-1 if params.prompt_logprobs is None else params.prompt_logprobs for params in prompts.params]
    top = np.array(asked, dtype=np.int32)[plan.sequence_params]
    found = np.full(plan.num_nodes, -1, dtype=np.int32)
    node = plan.sequence_node.astype(np.int64)
    node, top = node[top >= 0], top[top >= 0]
    while len(node):
        np.maximum.at(found, node, top)
        node = plan.node_parent[node].astype(np.int64)
        node, top = node[node >= 0], top[node >= 0]
    return found
