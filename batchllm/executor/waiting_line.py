"""Which sequence starts next: the plan's order, and before it those that have stepped back."""

from __future__ import annotations

from collections import deque

from batchllm.core import Plan, PromptTable
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running


class WaitingLine:
    """Its length counts the sequences that have not started, or stepped back and have not come back."""

    def __init__(self, plan: Plan, prompts: PromptTable, nodes: NodeStore, max_length: int | None):
        self._plan, self._prompts, self._nodes = plan, prompts, nodes
        self._max_length = max_length
        self._front: deque[Running] = deque()  # those that stepped back, and the next one that never ran
        self._next = 0  # of the plan, behind all of `_front`

    def __len__(self) -> int:
        return self._plan.num_sequences - self._next + len(self._front)

    def first(self) -> Running | None:
        """The sequence whose turn it is; it stays in the line until it is taken."""
        if not self._front and self._next < self._plan.num_sequences:
            self._front.append(self._new(self._next))
            self._next += 1
        return self._front[0] if self._front else None

    def take(self) -> None:
        """The first one leaves the line."""
        self._front.popleft()

    def put_back(self, run: Running) -> None:
        """A sequence has stepped back: it is the first one now, and keeps its tokens."""
        self._front.appendleft(run)

    def _new(self, sequence: int) -> Running:
        leaf = int(self._plan.sequence_node[sequence])
        params = self._prompts.params[self._plan.sequence_params[sequence]]
        prompt_length = int(self._plan.node_end[leaf])
        room = params.max_tokens if self._max_length is None else self._max_length - prompt_length
        return Running(
            sequence=sequence,
            leaf=leaf,
            path=self._nodes.path(leaf),
            leaf_start=int(self._plan.node_start[leaf]),
            prompt_length=prompt_length,
            params=params,
            limit=max(1, min(params.max_tokens, room)),  # a scored prompt may fill the model's whole length
        )
