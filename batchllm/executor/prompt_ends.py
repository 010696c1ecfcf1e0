"""What a sequence samples from when all its known tokens have been computed: logits at the end of its leaf or, where
the leaf has no tokens of its own, at the end of the node above it. Those are kept for sequences that start later."""

from __future__ import annotations

import numpy as np

from batchllm.core import Plan
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running
from batchllm.executor.step import KEPT, UNREAD, Sample, StepBatch
from batchllm.executor.step_builder import StepBuilder


class PromptEnds:
    """`scored` [sequences]: those whose tokens are scored; no token is chosen for them."""

    def __init__(self, plan: Plan, nodes: NodeStore, scored: np.ndarray):
        self._plan, self._nodes, self._scored = plan, nodes, scored
        self._owed = _count_empty_leaves(plan, ~scored)  # by node: samples at its end that are still to come
        self._awaiting: dict[int, list[Running]] = {}  # empty leaves whose parent is being computed

    def is_scored(self, sequence: int) -> bool:
        """Whether the sequence's tokens are scored and none is chosen."""
        return bool(self._scored[sequence])

    def keeps_logits(self, node: int) -> bool:
        """Whether logits at the end of `node` will be needed by sequences that start later."""
        return self._owed.get(node, 0) > 0

    def start(self, builder: StepBuilder, run: Running) -> None:
        """A sequence starts. If its leaf is empty, it samples at the end of its parent, now or when that is there."""
        if run.leaf_tokens:
            return
        parent = run.path[-1]
        row = builder.logits_of(parent)
        if row is not None:
            self._sample_above(builder, run, row, parent)
        elif self._nodes.computed[parent] == self._nodes.prompt_length(parent):
            self._sample_above(builder, run, KEPT, parent)
        else:
            self._awaiting.setdefault(parent, []).append(run)

    def reached(self, builder: StepBuilder, node: int, owner: Running | None) -> None:
        """The newest token of the step is the last known one of `node`, a leaf if it has an owner."""
        if owner is not None:
            owner.prefilling = False
            row = UNREAD if self._scored[owner.sequence] else builder.read_last_logits(node)
            builder.samples.append(Sample(owner.sequence, row, node))
            return
        row = UNREAD
        if self._owed.get(node):
            row = builder.read_last_logits(node)
            builder.keep_logits.append((node, row))
        for run in self._awaiting.pop(node, []):
            self._sample_above(builder, run, row, node)

    def forget(self, run: Running) -> None:
        """A sequence that has stepped back or failed awaits nothing."""
        for waiting in self._awaiting.values():
            if run in waiting:
                waiting.remove(run)

    def undo(self, batch: StepBatch) -> None:
        """The step has not been run, and nobody awaits anything."""
        for sample in batch.samples:
            if sample.logit_row != UNREAD and sample.node != self._plan.sequence_node[sample.sequence]:
                self._owed[sample.node] += 1
        self._awaiting.clear()

    def _sample_above(self, builder: StepBuilder, run: Running, row: int, node: int) -> None:
        if self._scored[run.sequence]:
            builder.samples.append(Sample(run.sequence, UNREAD, node))
            return
        builder.samples.append(Sample(run.sequence, row, node))
        self._owed[node] -= 1


def _count_empty_leaves(plan: Plan, sampled: np.ndarray) -> dict[int, int]:
    """For each node, how many of the `sampled` sequences below end exactly where it ends."""
    leaves = plan.sequence_node[sampled]
    empty = leaves[plan.node_start[leaves] == plan.node_end[leaves]]
    parents, counts = np.unique(plan.node_parent[empty], return_counts=True)
    return dict(zip(parents.tolist(), counts.tolist()))
