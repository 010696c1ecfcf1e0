"""Which log-probabilities to read at which node, when rows of a plan are scored or ask for those of their prompts.

A token's log-probability comes from the logits of the token before it. That token may be anywhere on its row's path:
in the leaf, in a node shared with other rows, or among tokens whose KV the node copies from a donor. Each position is
computed once, so each distinct (position in the tree, scored token) is one score, however many rows ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan, PromptTable, RequestTable, ScoreTable
from batchllm.planner.prompt_reads import wanted_tokens
from batchllm.planner.sequences import take_ranges


class NodeReads(NamedTuple):
    """Log-probabilities to read; one entry each."""

    position: IntArray  # of the token whose logits are read
    target: IntArray  # the token whose log-probability is read
    score: IntArray  # its number among all scores


@dataclass(frozen=True)
class ScoreReads:
    """The reads of every node, by position, and the scores of every row."""

    node_ptr: IntArray  # [nodes + 1] CSR into `reads`
    reads: NodeReads  # positions ascend within a node
    scored: NDArray[np.bool_]  # [sequences] no token of these is chosen
    row_ptr: IntArray  # [rows + 1] CSR into `row_score`
    row_score: IntArray  # the score of each scored token of a row, in order; no entries for rows not planned
    num_scores: int
    top: NDArray[np.int32]  # [scores] most probable tokens to read beside each
    prompt_ptr: IntArray  # [nodes + 1] CSR into `prompt_score`
    prompt_score: (
        IntArray  # the score of each token of a node, without a prompt's first, where it is asked for
    )
    parent: NDArray[np.int32]  # [nodes] Plan.node_parent

    def within(self, node: int, begin: int, end: int) -> NodeReads:
        """The reads of a node at positions begin .. end - 1."""
        first, last = int(self.node_ptr[node]), int(self.node_ptr[node + 1])
        low, high = first + np.searchsorted(self.reads.position[first:last], (begin, end))
        return NodeReads(*(values[low:high] for values in self.reads))

    def of_row(self, row: int) -> IntArray:
        """The scores of a row's scored tokens."""
        return self.row_score[self.row_ptr[row] : self.row_ptr[row + 1]]

    def of_prompt(self, leaf: int) -> IntArray:
        """The scores of the tokens of the prompt that ends in a leaf, without its first, in order."""
        parts: list[IntArray] = []
        node = leaf
        while node >= 0:
            parts.append(self.prompt_score[self.prompt_ptr[node] : self.prompt_ptr[node + 1]])
            node = int(self.parent[node])
        return np.concatenate(parts[::-1])


class _Spans(NamedTuple):
    """Tokens scored of the rows of a ScoreTable, row after row; node, position and target of each."""

    home: IntArray
    position: IntArray
    target: IntArray
    row_ptr: IntArray  # [rows + 1]


def plan_score_reads(
    plan: Plan, prompts: PromptTable, requests: RequestTable, table: ScoreTable | None = None
) -> ScoreReads:
    """Reads for the rows of `table` that the plan answers, and for the prompts of rows with `prompt_logprobs`.

    A position that a node copies is read where it is computed first, at the end of the donors, for all who copy it. It
    is read in the node itself, too: when memory is short the node may compute it again. So there are at most two
    reads of a token that is asked for.
    """
    scored = np.zeros(plan.num_sequences, dtype=bool)
    none = np.zeros(0, dtype=np.int64)
    spans = _Spans(none, none, none, np.zeros(prompts.num_rows + 1, dtype=np.int64))
    if table is not None:
        spans = _scored_spans(plan, prompts, requests, table, scored)
    wanted = wanted_tokens(plan, prompts)
    home = np.concatenate((spans.home, wanted.home))
    position = np.concatenate((spans.position, wanted.position))
    target = np.concatenate((spans.target, wanted.target))

    origin = _origin(plan, home, position)
    score, owner, owner_position, owner_target = _distinct(origin, position, target)
    again = origin != home
    number, node, read_position, read_target = _distinct(
        np.concatenate((owner, home[again])),
        np.concatenate((owner_position, position[again])),
        np.concatenate((owner_target, target[again])),
    )
    read_score = np.empty(len(node), dtype=np.int64)
    read_score[number] = np.concatenate((np.arange(len(owner)), score[again]))
    top = np.zeros(len(owner), dtype=np.int32)
    np.maximum.at(top, score[len(spans.home) :], wanted.top)
    return ScoreReads(
        node_ptr=np.searchsorted(node, np.arange(plan.num_nodes + 1)),
        reads=NodeReads(read_position, read_target, read_score),
        scored=scored,
        row_ptr=spans.row_ptr,
        row_score=score[: len(spans.home)],
        num_scores=len(owner),
        top=top,
        prompt_ptr=wanted.node_ptr,
        prompt_score=score[len(spans.home) :],
        parent=plan.node_parent,
    )


def _scored_spans(
    plan: Plan,
    prompts: PromptTable,
    requests: RequestTable,
    table: ScoreTable,
    scored: NDArray[np.bool_],
) -> _Spans:
    """Sets `scored` [sequences] where a sequence's row is scored."""
    sequence = np.repeat(np.arange(plan.num_sequences), np.diff(plan.request_ptr))
    sequence_row = requests.row[plan.request]
    is_scored = table.first[sequence_row] >= 0
    row, first_of = np.unique(sequence_row[is_scored], return_index=True)
    leaf = plan.sequence_node[sequence[is_scored][first_of]].astype(np.int64)
    scored[sequence[is_scored]] = True

    length = prompts.offsets[row + 1] - prompts.offsets[row]
    begin = table.first[row] - 1
    count = length - begin
    item = np.repeat(np.arange(len(row)), count)
    position = take_ranges(begin, count)
    is_last = position == length[item] - 1
    target = np.empty(len(item), dtype=np.int64)
    target[~is_last] = prompts.tokens[(prompts.offsets[row][item] + position + 1)[~is_last]]
    target[is_last] = table.last[row[item[is_last]]]
    row_ptr = np.zeros(prompts.num_rows + 1, dtype=np.int64)
    row_ptr[row + 1] = count
    return _Spans(_home(plan, leaf[item], position), position, target, np.cumsum(row_ptr))


def _home(plan: Plan, leaf: IntArray, position: IntArray) -> IntArray:
    """The node on the path to each leaf that holds each position."""
    node = leaf.copy()
    left = np.flatnonzero(position < plan.node_start[node])
    while len(left):
        node[left] = plan.node_parent[node[left]]
        left = left[position[left] < plan.node_start[node[left]]]
    return node


def _origin(plan: Plan, node: IntArray, position: IntArray) -> IntArray:
    """The node from which each position's KV comes in the end, by way of donors.

    However many donors there are in between, a position is looked at once for each number of copied tokens, at most.
    """
    fewer = _copies_fewer(plan)
    copied_end = plan.node_start + plan.node_copied
    node = node.copy()
    left = np.flatnonzero(position < copied_end[node])
    while len(left):
        node[left] = fewer[node[left]]
        left = left[position[left] < copied_end[node[left]]]
    return node


def _copies_fewer(plan: Plan) -> IntArray:
    """[nodes] for those that copy: the nearest node back along the donors that copies fewer tokens.

    By pointer jumping: whatever lies between a node and its pointer copies at least as many tokens as the node.
    """
    copied = plan.node_copied
    pointer = plan.node_donor.astype(np.int64)
    seeking = np.flatnonzero(copied > 0)
    while len(seeking):
        seeking = seeking[copied[pointer[seeking]] >= copied[seeking]]
        pointer[seeking] = pointer[pointer[seeking]]
    return pointer


def _distinct(
    node: IntArray, position: IntArray, target: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """For each triple the number of its equals, and the distinct triples in the order of those numbers."""
    order = _sorted_by(node, position, target)
    node, position, target = node[order], position[order], target[order]
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (np.diff(node) != 0) | (np.diff(position) != 0) | (np.diff(target) != 0)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(opens) - 1
    return number, node[opens], position[opens], target[opens]


def _sorted_by(node: IntArray, position: IntArray, target: IntArray) -> IntArray:
    """By node, then position, then target; as one number where it has room, which is several times as fast."""
    most = [int(values.max(initial=0)) + 1 for values in (node, position, target)]
    order: IntArray
    if most[0] * most[1] * most[2] < 2**63:
        order = np.argsort((node * most[1] + position) * most[2] + target, kind="stable")
    else:
        order = np.lexsort((target, position, node))
    return order
