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

    A position that a node copies is read at its donor, too, and at the donor's donor: whichever of them computes it,
    when memory is short more than one, the score is read.
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

    score, owner, owner_position, owner_target = _distinct(_origin(plan, home, position), position, target)
    node, read_position, read_target = _with_donors(plan, home, position, target)
    origin = _origin(plan, node, read_position)
    found = _lookup(owner, owner_position, owner_target, origin, read_position, read_target)
    by_node = np.lexsort((read_position, node))
    node = node[by_node]
    top = np.zeros(len(owner), dtype=np.int32)
    np.maximum.at(top, score[len(spans.home) :], wanted.top)
    return ScoreReads(
        node_ptr=np.searchsorted(node, np.arange(plan.num_nodes + 1)),
        reads=NodeReads(read_position[by_node], read_target[by_node], found[by_node]),
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
    while len(above := np.flatnonzero(position < plan.node_start[node])):
        node[above] = plan.node_parent[node[above]]
    return node


def _origin(plan: Plan, node: IntArray, position: IntArray) -> IntArray:
    """The node from which each position's KV comes in the end, by way of donors."""
    node = node.copy()
    copied_end = plan.node_start + plan.node_copied
    while len(copied := np.flatnonzero(position < copied_end[node])):
        node[copied] = plan.node_donor[node[copied]]
    return node


def _with_donors(
    plan: Plan, node: IntArray, position: IntArray, target: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """All distinct (node, position, target), and the same at every donor that holds the position."""
    copied_end = plan.node_start + plan.node_copied
    _, node, position, target = _distinct(node, position, target)
    known = [(node, position, target)]
    while len(node):
        donated = position < copied_end[node]
        donor = plan.node_donor[node[donated]].astype(np.int64)
        _, node, position, target = _distinct(donor, position[donated], target[donated])
        new = _lookup(*_concatenated(known), node, position, target) < 0
        node, position, target = node[new], position[new], target[new]
        known.append((node, position, target))
    return _concatenated(known)


def _concatenated(parts: list[tuple[IntArray, IntArray, IntArray]]) -> tuple[IntArray, IntArray, IntArray]:
    nodes, positions, targets = zip(*parts)
    return np.concatenate(nodes), np.concatenate(positions), np.concatenate(targets)


def _distinct(
    node: IntArray, position: IntArray, target: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """For each triple the number of its equals, and the distinct triples in the order of those numbers."""
    order = np.lexsort((target, position, node))
    node, position, target = node[order], position[order], target[order]
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = (np.diff(node) != 0) | (np.diff(position) != 0) | (np.diff(target) != 0)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(opens) - 1
    return number, node[opens], position[opens], target[opens]


def _lookup(
    node: IntArray,
    position: IntArray,
    target: IntArray,
    wanted_node: IntArray,
    wanted_position: IntArray,
    wanted_target: IntArray,
) -> IntArray:
    """For each wanted triple its index among the given distinct ones, or -1."""
    number, *_ = _distinct(
        np.concatenate((node, wanted_node)),
        np.concatenate((position, wanted_position)),
        np.concatenate((target, wanted_target)),
    )
    given = np.full(int(number.max(initial=-1)) + 1, -1, dtype=np.int64)
    given[number[: len(node)]] = np.arange(len(node))
    return given[number[len(node) :]]
