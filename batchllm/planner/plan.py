"""`build_plan`: from tokenised prompts to what is computed once, in which order, and what that saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan, PlanStats, PromptTable, RequestTable
from batchllm.planner.folding import Kept, fold_short_prefixes
from batchllm.planner.length_groups import NO_GROUP, length_groups
from batchllm.planner.ordering import Execution, OrderName, execution_order
from batchllm.planner.output_limits import output_limits
from batchllm.planner.prefix_tree import PrefixTree, build_prefix_tree
from batchllm.planner.sequences import (
    Sequences,
    collapse_requests,
    distinct_prompts,
    planned_requests,
    take_ranges,
)

ParamsArray = NDArray[np.int32]
DecodeEstimate = Callable[[ParamsArray, IntArray, NDArray[np.int32]], IntArray]


@dataclass(frozen=True)
class PlanOptions:
    """`decode_estimate`: expected output tokens, per request of the RequestTable, or a function of the
    arrays (params index, most output tokens, group), one entry per sequence. Default: the most there may be.

    `row_group`: the group of each row of the PromptTable, where it is known. Default: found in the tree of the plan.

    `max_length`: of the model, in tokens; outputs end there. None: it does not say.
    """

    min_shared_tokens: int = 32  # a shorter shared prefix is no node of its own: it is copied instead
    order: OrderName = "auto"
    decode_estimate: NDArray[np.generic] | DecodeEstimate | None = None
    row_group: NDArray[np.int32] | None = None
    max_length: int | None = None  # most tokens of a sequence, prompt and output together


@dataclass(frozen=True)
class PlanDraft:
    """Everything about a plan but the order: what is shared by whom. Sequences are in lexicographic order here."""

    prompts: PromptTable
    requests: RequestTable
    tree: PrefixTree
    kept: Kept
    sequences: Sequences
    terminal: IntArray  # [sequences] the trie node where each one's prompt ends
    below: IntArray  # [trie nodes] sequences at or below
    group: NDArray[np.int32]  # [sequences] see planner.length_groups
    limit: IntArray  # [sequences] most tokens each may decode
    decode: IntArray  # [sequences] tokens each is expected to decode

    @property
    def row_group(self) -> NDArray[np.int32]:
        """[rows of the PromptTable] the group of each planned row, NO_GROUP for others."""
        count = np.diff(self.sequences.request_ptr)
        found = np.full(self.prompts.num_rows, NO_GROUP, dtype=np.int32)
        found[self.requests.row[self.sequences.request]] = np.repeat(self.group, count)
        return found

    def expecting(self, estimate: DecodeEstimate) -> PlanDraft:
        """The same with other expectations of what is decoded."""
        return replace(self, decode=_estimated(estimate, self.sequences, self.limit, self.group))

    def expected_decode(self, plan: Plan) -> IntArray:
        """`decode` of the sequences of a plan made from this draft."""
        of_request = np.zeros(len(self.requests), dtype=np.int64)
        of_request[self.sequences.first_request] = self.decode
        return of_request[plan.request[plan.request_ptr[:-1]]]


@dataclass(frozen=True)
class _Nodes:
    """Nodes of the plan as they are first listed: shared nodes, then a leaf for each sequence as executed."""

    trie: IntArray  # [nodes] the trie node whose `end` is the node's end
    above: IntArray  # [nodes] the trie node of the parent, -1: none
    first: IntArray  # [nodes] execution position of the first sequence at or below
    leaves: IntArray  # [nodes]
    is_leaf: NDArray[np.bool_]  # [nodes]


@dataclass(frozen=True)
class _Answers:
    """The requests of each sequence, sequences in execution order."""

    ptr: IntArray  # [sequences + 1] CSR into `request`
    request: IntArray
    first_row: IntArray  # [sequences] row of the first request
    shared: IntArray  # [requests of the RequestTable]
    prompt_tokens: int  # of all planned requests


def build_plan(
    prompts: PromptTable, requests: RequestTable, todo: NDArray[np.bool_], options: PlanOptions
) -> Plan:
    """Plan the requests with `todo` set whose row has no fault. See `core.Plan` for what the arrays mean.

    Sequences are numbered in execution order. Every edge of the trie of planned prompts is computed exactly
    once:

        sum(node_end - node_start - node_copied) == distinct_tokens == sum(prompt length - request_shared)

    the last over the planned requests. For the first request of a sequence `request_shared` is what its
    prompt has in common with the sequence started before it; for the others of that sequence it is the
    whole prompt.

    The donor is the previous sibling, the one most likely to be in memory still. Where the donor itself has
    copied at least as many tokens, its own donor holds them too: so whoever executes the plan may follow the
    donors back to one whose tokens are computed already, instead of waiting for the sibling just before.
    """
    return arrange(draft_plan(prompts, requests, todo, options), options.order)


def draft_plan(
    prompts: PromptTable, requests: RequestTable, todo: NDArray[np.bool_], options: PlanOptions
) -> PlanDraft:
    """The part of `build_plan` that is the same for every order, and takes most of the time."""
    planned = planned_requests(prompts, requests, todo)
    distinct = distinct_prompts(prompts, requests.row[planned])
    tree = build_prefix_tree(distinct.lcp, distinct.length)
    sequences = collapse_requests(prompts, distinct.of_row, requests, planned)
    terminal = tree.terminal[sequences.prompt]
    ending = np.bincount(terminal, minlength=tree.num_nodes)
    below = tree.subtree_sum(ending)
    kept = fold_short_prefixes(tree, below, ending, options.min_shared_tokens)
    if options.row_group is None:
        group = length_groups(tree, kept, below, terminal)
    else:
        group = options.row_group[requests.row[sequences.first_request]]
    limit = output_limits(prompts, sequences.params, tree.end[terminal], options.max_length)
    decode = _expected_decode(sequences, limit, group, options)
    return PlanDraft(prompts, requests, tree, kept, sequences, terminal, below, group, limit, decode)


def arrange(draft: PlanDraft, order: OrderName) -> Plan:
    """The plan in this order."""
    tree, sequences = draft.tree, draft.sequences
    execution = execution_order(tree, draft.terminal, sequences.first_request, draft.decode, order)
    nodes = _list_nodes(tree, draft.kept, execution, draft.terminal, draft.below)
    answers = _list_answers(draft.prompts, draft.requests, sequences, execution)
    return _assemble(draft, nodes, execution, answers)


def _expected_decode(
    sequences: Sequences, limit: IntArray, group: NDArray[np.int32], options: PlanOptions
) -> IntArray:
    estimate = options.decode_estimate
    if estimate is None:
        return limit
    if callable(estimate):
        return _estimated(estimate, sequences, limit, group)
    return np.asarray(estimate)[sequences.first_request].astype(np.int64)


def _estimated(
    estimate: DecodeEstimate, sequences: Sequences, limit: IntArray, group: NDArray[np.int32]
) -> IntArray:
    return np.asarray(estimate(sequences.params, limit, group)).astype(np.int64)


def _list_nodes(
    tree: PrefixTree, kept: Kept, execution: Execution, terminal: IntArray, below: IntArray
) -> _Nodes:
    """In pre-order of the execution order."""
    shared = np.flatnonzero(kept.kept)
    leaf = terminal[execution.sequence]
    parent = tree.parent[shared]
    trie = np.concatenate((shared, leaf))
    above = np.concatenate((np.where(parent >= 0, kept.anchor[parent], -1), kept.anchor[leaf]))
    first = np.concatenate((execution.node_first[shared], np.arange(len(leaf))))
    leaves = np.concatenate((below[shared], np.ones(len(leaf), dtype=np.int64)))
    is_leaf = np.arange(len(trie)) >= len(shared)
    # Stable: of the nodes that begin at the same sequence, first the shared ones as listed, outer before inner.
    preorder = np.argsort(first, kind="stable")
    return _Nodes(trie[preorder], above[preorder], first[preorder], leaves[preorder], is_leaf[preorder])


def _list_answers(
    prompts: PromptTable, requests: RequestTable, sequences: Sequences, execution: Execution
) -> _Answers:
    count = np.diff(sequences.request_ptr)[execution.sequence]
    request = sequences.request[take_ranges(sequences.request_ptr[execution.sequence], count)]
    ptr = np.append(0, np.cumsum(count))
    prompt_tokens = np.diff(prompts.offsets)[requests.row[request]]
    shared = np.zeros(len(requests), dtype=np.int64)
    shared[request] = prompt_tokens
    shared[request[ptr[:-1]]] = execution.shared
    return _Answers(ptr, request, requests.row[request[ptr[:-1]]], shared, int(prompt_tokens.sum()))


def _assemble(draft: PlanDraft, nodes: _Nodes, execution: Execution, answers: _Answers) -> Plan:
    tree, params = draft.tree, draft.sequences.params
    index_of_trie = np.full(tree.num_nodes + 1, -1, dtype=np.int64)  # the last entry answers for "none"
    shared = np.flatnonzero(~nodes.is_leaf)
    index_of_trie[nodes.trie[shared]] = shared
    parent = index_of_trie[nodes.above]
    start = np.where(nodes.above >= 0, tree.end[nodes.above], 0)
    end = tree.end[nodes.trie]
    # A node that does not follow a sibling follows a sequence outside its parent: nothing in common past
    # `start`. No node takes over all of its own tokens: prompts that end in it are executed before longer ones.
    copied = np.maximum(execution.shared[nodes.first] - start, 0)
    donor = np.where(copied > 0, _previous_sibling(parent), -1)
    stats = PlanStats(
        requests=len(answers.request),
        sequences=len(params),
        shared_nodes=len(shared),
        depth=draft.kept.depth,
        prompt_tokens=answers.prompt_tokens,
        distinct_tokens=tree.distinct_tokens,
        planned_tokens=int((end - start - copied).sum()),
    )
    return Plan(
        node_parent=parent.astype(np.int32),
        node_start=start.astype(np.int32),
        node_end=end.astype(np.int32),
        node_row=answers.first_row[nodes.first],
        node_donor=donor.astype(np.int32),
        node_copied=copied.astype(np.int32),
        node_leaves=nodes.leaves.astype(np.int32),
        node_sequence=np.where(nodes.is_leaf, nodes.first, -1).astype(np.int32),
        sequence_node=np.flatnonzero(nodes.is_leaf).astype(np.int32),
        sequence_params=params[execution.sequence].astype(np.int32),
        sequence_group=draft.group[execution.sequence],
        request_ptr=answers.ptr,
        request=answers.request,
        request_shared=answers.shared,
        stats=stats,
    )


def _previous_sibling(parent: IntArray) -> IntArray:
    """For nodes in pre-order: the nearest node before it with the same parent, -1 for a first child."""
    by_parent = np.argsort(parent, kind="stable")
    same = parent[by_parent[1:]] == parent[by_parent[:-1]]
    sibling = np.full(len(parent), -1, dtype=np.int64)
    sibling[by_parent[1:][same]] = by_parent[:-1][same]
    return sibling
