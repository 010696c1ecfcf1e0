"""Memory for nodes when a sequence starts, for its leaf when it grows, and what is given up for that.

Given up is, the cheapest first: KV that is held only for copying, shared nodes that no running sequence uses, and the
order in which extents lie. What else there is to give up is the running sequences', and the scheduler's to decide.
"""

from __future__ import annotations

from batchllm.executor.kv_memory import KvExtent, KvMemory
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running
from batchllm.executor.step_builder import StepBuilder
from batchllm.executor.stored_kv import StoredKv
from batchllm.planner.leaf_slots import ROUND, first_slots, grown_slots


class NodeMemory:
    """Without state of its own: extents are the pool's, and the nodes' that hold them."""

    def __init__(self, nodes: NodeStore, stored: StoredKv | None):
        self._nodes, self._stored = nodes, stored

    @property
    def _pool(self) -> KvMemory:
        return self._nodes.pool

    # ---- a sequence starts

    def place(self, builder: StepBuilder, run: Running, lead: int, alone: bool) -> bool:
        """Gives memory to a sequence's leaf and to nodes above it that have none. All or nothing.

        The leaf gets room for what is known and for `lead` output tokens; it grows later if need be. A sequence that
        will run `alone` may have idle nodes dropped for it.
        """
        missing = [node for node in run.path if self._nodes.extent[node] is None]
        leaf = first_slots(run.leaf_tokens, run.limit - run.decoded, lead)
        sizes = [self._nodes.prompt_length(node) for node in missing] + [leaf]
        extents = self._allocate(sizes, run.path, alone)
        if extents is None:
            return False
        for node, extent in zip([*missing, run.leaf], extents):
            copied = self._nodes.place(node, extent)
            if copied is not None:
                builder.add_copy(copied[0], extent, copied[1])
            if self._stored is not None:
                self._stored.place(node, int(self._nodes.computed[node]), extent)
        return True

    def _allocate(self, sizes: list[int], path: tuple[int, ...], alone: bool) -> list[KvExtent] | None:
        """Extents of the given sizes, or None with nothing changed but memory tidied."""
        for attempt in range(4):
            if attempt == 1 and not self._nodes.drop_held():
                continue
            if attempt == 2 and not (alone and self._nodes.drop_idle(keep=path)):
                continue
            if attempt == 3:
                if self._pool.capacity - self._pool.used < sum(sizes):
                    return None
                self._pool.compact()
            extents = self._try_allocate(sizes)
            if extents is not None:
                return extents
        return None

    def _try_allocate(self, sizes: list[int]) -> list[KvExtent] | None:
        extents: list[KvExtent] = []
        for index, size in enumerate(sizes):
            extent = self._pool.allocate(size, high=index < len(sizes) - 1)  # the leaf is last
            if extent is None:
                for done in extents:
                    self._pool.free(done)
                return None
            extents.append(extent)
        return extents

    # ---- its leaf grows

    def grow(self, run: Running) -> bool:
        """Whether the leaf has a slot for the next token, after growing it, here or elsewhere, if there is room."""
        extent = self._nodes.kv(run.leaf)
        if run.leaf_tokens <= extent.capacity:
            return True
        capacity = grown_slots(run.leaf_tokens, run.limit - run.decoded, extent.capacity)
        if self._pool.grow(extent, capacity):
            return True
        moved = self._pool.allocate(capacity)
        if moved is None:
            return False
        self._pool.copy(extent, moved, extent.capacity)
        self._pool.free(extent)
        self._nodes.extent[run.leaf] = moved
        return True

    def grow_ahead(self, run: Running, tokens: int) -> int:
        """For how many of the next `tokens` the leaf has slots, after growing it where it is if there is room."""
        extent = self._nodes.kv(run.leaf)
        needed = run.leaf_tokens + tokens - 1
        if needed <= extent.capacity or self._pool.grow(extent, needed):
            return tokens
        return extent.capacity - run.leaf_tokens + 1

    def give_up_some(self, run: Running) -> bool:
        """Takes the cheapest measure there is to make room for a running sequence. False: none that helps."""
        if self._nodes.drop_held() or self._nodes.drop_idle():
            return True
        if self._pool.used >= self._pool.capacity:
            return False
        extent = self._nodes.kv(run.leaf)
        self._pool.compact(last=extent)
        room = self._pool.capacity - self._pool.used
        return self._pool.grow(extent, extent.capacity + min(ROUND, room))
