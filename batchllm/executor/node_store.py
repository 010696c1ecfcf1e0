"""Which nodes of the plan have KV in the pool, and when it may go.

A shared node lives from its first user to its last. A node whose KV a later sibling will copy (its `donor` role,
see core.Plan) is held a little longer, until that sibling starts; such holds, and shared nodes that no running
sequence uses, are given up when memory is short. What was given up is computed again when it is needed.
"""

from __future__ import annotations

import numpy as np

from batchllm.core import Plan
from batchllm.executor.kv_memory import KvExtent, KvMemory
from batchllm.executor.step_builder import Ancestor


class NodeStore:
    """KV state of every node. Positions are absolute; `computed` counts a node's own tokens from its start."""

    def __init__(self, plan: Plan, pool: KvMemory):
        self.plan = plan
        self.pool = pool
        self.extent: list[KvExtent | None] = [None] * plan.num_nodes
        self.computed = np.zeros(plan.num_nodes, dtype=np.int64)
        self.unfinished = plan.node_leaves.astype(np.int64)  # sequences at or below that have not finished
        self.users = np.zeros(plan.num_nodes, dtype=np.int64)  # running sequences at or below
        self.shared: set[int] = set()  # resident shared nodes
        self._heir = _heirs(plan)
        self._started = np.zeros(plan.num_nodes, dtype=bool)
        self._held: set[int] = set()
        self._release_after_step: list[int] = []

    def path(self, leaf: int) -> tuple[int, ...]:
        """The shared nodes above a leaf, from the root down."""
        nodes = []
        node = int(self.plan.node_parent[leaf])
        while node >= 0:
            nodes.append(node)
            node = int(self.plan.node_parent[node])
        return tuple(reversed(nodes))

    def prompt_length(self, node: int) -> int:
        """Own prompt tokens of a node."""
        return int(self.plan.node_end[node] - self.plan.node_start[node])

    def kv(self, node: int) -> KvExtent:
        """Where the node's KV lies; it has some."""
        extent = self.extent[node]
        assert extent is not None, "a node in use has no KV"
        return extent

    def kv_above(self, path: tuple[int, ...]) -> list[Ancestor]:
        """What a token below these nodes reads of them."""
        starts = self.plan.node_start
        return [(node, self.kv(node), int(starts[node]), self.prompt_length(node)) for node in path]

    def place(self, node: int, extent: KvExtent) -> tuple[KvExtent, int] | None:
        """Gives a node its memory. Returns (donor's extent, tokens) to copy into it first, if the donor is there."""
        self.extent[node] = extent
        self.computed[node] = 0
        if self.plan.node_sequence[node] < 0:
            self.shared.add(node)
        first_start = not self._started[node]
        self._started[node] = True
        donor, copied = int(self.plan.node_donor[node]), int(self.plan.node_copied[node])
        if donor < 0:
            return None
        source = self.extent[donor]
        usable = source is not None and copied > 0 and self.computed[donor] >= copied
        if first_start and donor in self._held:
            self._held.discard(donor)
            self._release_after_step.append(donor)
        if not usable:
            return None
        assert source is not None
        self.computed[node] = copied
        return source, copied

    def enter(self, path: tuple[int, ...], leaf: int) -> None:
        for node in (*path, leaf):
            self.users[node] += 1

    def leave(self, path: tuple[int, ...], leaf: int) -> None:
        """A running sequence stops using its nodes without having finished (it will come back)."""
        for node in (*path, leaf):
            self.users[node] -= 1
        self.drop(leaf)

    def finish(self, path: tuple[int, ...], leaf: int) -> None:
        """A running sequence is done: frees every node whose last user it was."""
        for node in (*path, leaf):
            self.users[node] -= 1
            self.unfinished[node] -= 1
            if self.unfinished[node] == 0:
                self._retire(node)

    def abandon(self, path: tuple[int, ...], leaf: int) -> list[tuple[int, int]]:
        """A sequence that is not running will never run.

        Returns the nodes that will never have KV for that, each with the node that would have copied some of it.
        """
        lost = []
        for node in (*path, leaf):
            self.unfinished[node] -= 1
            if self.unfinished[node] == 0:
                self._retire(node)
                if self._heir[node] >= 0 and not self._started[node]:
                    lost.append((node, int(self._heir[node])))
        return lost

    def drop(self, node: int) -> None:
        """Frees a node's KV, if it has any."""
        extent = self.extent[node]
        if extent is not None:
            self.pool.free(extent)
            self.extent[node] = None
            self.computed[node] = 0
            self.shared.discard(node)

    def drop_all(self) -> None:
        """Frees all KV. No sequence runs."""
        for node in range(self.plan.num_nodes):
            self.drop(node)
        self._held.clear()
        self._release_after_step.clear()

    def end_step(self) -> None:
        """After the forward pass: donors whose KV has been copied are no longer needed."""
        for node in self._release_after_step:
            self.drop(node)
        self._release_after_step.clear()

    def drop_held(self) -> bool:
        """Gives up KV kept only for copying. Returns whether there was any."""
        dropped = bool(self._held)
        for node in self._held:
            self.drop(node)
        self._held.clear()
        return dropped

    def drop_idle(self, keep: tuple[int, ...] = ()) -> bool:
        """Gives up shared nodes that no running sequence uses. Returns whether there were any."""
        idle = [node for node in self.shared if self.users[node] == 0 and node not in keep]
        idle = [node for node in idle if node not in self._release_after_step]
        for node in idle:
            self.drop(node)
        return bool(idle)

    def _retire(self, node: int) -> None:
        heir = int(self._heir[node])
        if self.extent[node] is not None and heir >= 0 and not self._started[heir]:
            self._held.add(node)
            self.shared.discard(node)
        else:
            self.drop(node)


def _heirs(plan: Plan) -> np.ndarray:
    """[nodes] the node that copies from each node, or -1."""
    heirs = np.full(plan.num_nodes, -1, dtype=np.int64)
    receivers = np.nonzero((plan.node_donor >= 0) & (plan.node_copied > 0))[0]
    heirs[plan.node_donor[receivers]] = receivers
    return heirs
