"""Known tokens that still have to be computed: shared nodes and leaves, in the order in which steps take them."""

from __future__ import annotations

from collections import deque

import numpy as np

from batchllm.core import Plan, PromptTable
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running
from batchllm.executor.step_builder import StepBuilder
from batchllm.executor.stored_kv import StoredKv
from batchllm.planner.score_reads import NodeReads, ScoreReads


class PromptQueue:
    """Every node in it has memory. True while anything is left to compute."""

    def __init__(
        self,
        plan: Plan,
        prompts: PromptTable,
        nodes: NodeStore,
        scores: ScoreReads | None,
        stored: StoredKv | None,
    ):
        self._plan, self._prompts, self._nodes = plan, prompts, nodes
        self._scores, self._stored = scores, stored
        self._queue: deque[tuple[int, Running | None]] = deque()  # nodes; the owner of one that is a leaf
        self._passed_on: dict[int, NodeReads] = {}  # by node: reads beside its own

    def __bool__(self) -> bool:
        return bool(self._queue)

    def put(self, run: Running) -> None:
        """What is missing of a sequence that starts, from the top down: nodes above it, and its leaf's tokens."""
        queued = {node for node, _ in self._queue}
        for node in run.path:
            if self._nodes.computed[node] < self._nodes.prompt_length(node) and node not in queued:
                self._queue.append((node, None))
        if run.leaf_tokens:
            run.prefilling = True
            self._queue.append((run.leaf, run))

    def forget(self, run: Running) -> None:
        """Takes out a sequence's unfinished work, with nodes that nobody else needs yet."""
        run.prefilling = False
        mine = {node for node in run.path if self._nodes.users[node] == 1}
        self._queue = deque(
            (node, owner) for node, owner in self._queue if owner is not run and (owner or node not in mine)
        )

    def clear(self) -> None:
        self._queue.clear()

    def pass_on(self, node: int, heir: int) -> None:
        """`node` will never be computed: what was to be read there for all who copy from it is read in `heir`, which
        copies first and now has to compute."""
        if self._scores is not None:
            start = int(self._plan.node_start[heir])
            end = start + int(self._plan.node_copied[heir])
            self._passed_on[heir] = self._reads(self._scores, node, start, end)

    def add_next(self, builder: StepBuilder, room: int) -> tuple[int, Running | None] | None:
        """Puts the next tokens into the step, of one node and at most `room`. Returns the node, with the owner of a
        leaf, if these were the last of its known tokens."""
        node, owner = self._queue[0]
        total = owner.leaf_tokens if owner else self._nodes.prompt_length(node)
        done = int(self._nodes.computed[node])
        end = total
        if self._stored is not None:
            done, end = self._stored.next_run(node, done, total)
        count = min(room, end - done)
        start = int(self._plan.node_start[node])
        path = owner.path if owner else self._nodes.path(node)
        builder.add_chunk(
            self._tokens(node, owner, done, count),
            start + done,
            start,
            self._nodes.kv(node),
            self._nodes.kv_above(path),
            prompt_tokens=min(count, max(0, self._nodes.prompt_length(node) - done)),
        )
        if self._scores is not None:
            builder.read_scores(self._reads(self._scores, node, start + done, start + done + count))
        self._nodes.computed[node] = done + count
        return self._queue.popleft() if done + count == total else None

    def _reads(self, scores: ScoreReads, node: int, begin: int, end: int) -> NodeReads:
        """At positions begin .. end - 1 of a node, positions ascending."""
        own, more = scores.within(node, begin, end), self._passed_on.get(node)
        if more is None:
            return own
        inside = (begin <= more.position) & (more.position < end)
        joined = [np.concatenate((mine, values[inside])) for mine, values in zip(own, more)]
        ascending = np.argsort(joined[0], kind="stable")
        return NodeReads(*(values[ascending] for values in joined))

    def _tokens(self, node: int, owner: Running | None, done: int, count: int) -> np.ndarray:
        """[count] of a node's own tokens from `done` on; in a leaf, output follows the prompt."""
        begin = int(self._prompts.offsets[self._plan.node_row[node]]) + int(self._plan.node_start[node])
        own = self._nodes.prompt_length(node)
        prompt = self._prompts.tokens[begin + done : begin + min(done + count, own)]
        if owner is None or done + count <= own:
            return np.asarray(prompt, dtype=np.int64)
        output = np.array(owner.output[max(0, done - own) : done + count - own], dtype=np.int64)
        return np.concatenate([np.asarray(prompt[: max(0, own - done)], dtype=np.int64), output])
