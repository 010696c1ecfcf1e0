"""Which parts of stored chunks lie in each node of a plan: what the executor will ask for, in the order it will."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchllm.chunkcache.decision import StoredContext
from batchllm.chunkcache.lookup import ChunkLookup, RowChunk, StoredVariant
from batchllm.core import Plan
from batchllm.planner.accesses import AccessSequence, accesses_by_bytes


@dataclass(frozen=True)
class Part:
    """The part of a row's chunk that lies in a node: positions [begin, end) of the prompt."""

    begin: int
    end: int
    chunk: RowChunk
    variant: StoredVariant

    @property
    def first(self) -> int:
        """The chunk's token that stands at `begin`."""
        return self.begin - self.chunk.begin

    def stored(self) -> StoredContext:
        """What is known of the variant, tokens cut to this part."""
        whole, tokens = self.variant.stored, slice(self.first, self.end - self.chunk.begin)
        return StoredContext(
            whole.chunks,
            whole.weights,
            whole.outside[tokens],
            whole.sensitivity[tokens],
            whole.outside_mean,
            whole.inside_mean,
        )


class NodeChunks:
    """The parts of every node.

    Lossless first: a node that many sequences share is computed exactly where that costs each of them no more than
    repairing it would, `share` being the share of reused tokens that is computed again.
    """

    def __init__(self, plan: Plan, lookup: ChunkLookup, share: float):
        self.plan, self.lookup = plan, lookup
        self._exact_from = np.inf if share <= 0 else 1 / share

    def parts(self, node: int) -> list[Part]:
        """Ascending. A node's last token is always computed, so a part that is that token alone is left out."""
        start, end = int(self.plan.node_start[node]), int(self.plan.node_end[node])
        exact_only = self.plan.node_leaves[node] >= max(2.0, self._exact_from)
        return [
            Part(max(start, chunk.begin), min(end, chunk.end), chunk, chunk.variant)
            for chunk in self.lookup.row(int(self.plan.node_row[node]))
            if chunk.begin < end - 1
            and chunk.end > start
            and chunk.variant is not None
            and (chunk.exact or not exact_only)
        ]

    def nodes(self) -> Iterator[tuple[int, list[Part]]]:
        """Nodes that use stored chunks, in the order in which the executor gives them memory."""
        for node in range(self.plan.num_nodes):
            parts = self.parts(node)
            if parts:
                yield node, parts

    def accesses(self) -> tuple[AccessSequence, dict[int, int]]:
        """The variants that are read, one access for each part, and node → number of its first access."""
        items: list[int] = []
        first: dict[int, int] = {}
        for node, parts in self.nodes():
            first[node] = len(items)
            items += [part.variant.number for part in parts]
        sizes = np.array([max(1, variant.num_bytes) for variant in self.lookup.variants], dtype=np.int64)
        return accesses_by_bytes(np.array(items, dtype=np.int64), sizes), first
