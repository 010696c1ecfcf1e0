"""Random trees of sequences in a KV pool, and a step over them whose attention is known by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.kv_pool import Extent, KvPool
from batchllm.executor.step import StepBatch
from batchllm.executor.step_builder import StepBuilder


@dataclass
class TreeNode:
    """A stretch of one sequence. Slot i of `extent` holds absolute position `start + i`."""

    number: int
    start: int
    length: int
    extent: Extent
    ancestors: list[TreeNode] = field(default_factory=list)
    computed: int = 0  # own tokens computed before the step

    @property
    def path(self) -> list[TreeNode]:
        return [*self.ancestors, self]


@dataclass
class World:
    """A step: which tokens of which nodes it computes. `key_of(node, i)` is the dense key of a node's token."""

    pool: KvPool
    nodes: list[TreeNode]
    batch: StepBatch
    readers: list[tuple[TreeNode, int]]  # by flat token: its node and its index in the node

    def visible(self, token: int, window: int | None) -> list[int]:
        """Slots that a flat token has to read, one for every position it sees."""
        node, index = self.readers[token]
        position = node.start + index
        first = 0 if window is None else max(0, position - window + 1)
        slots = []
        for above in node.path:
            for own in range(above.length):
                if first <= above.start + own <= position:
                    slots.append(above.extent.offset + own)
        return slots


def make_world(
    random: np.random.Generator, layer: LayerKv, dtype: torch.dtype, longest: int = 14, num_nodes: int = 14
) -> World:
    """Shared nodes up to three deep, leaves of many sizes; some are computed whole, some go on, some decode."""
    sizes = random.integers(1, longest, num_nodes)
    spare = random.integers(0, 4, num_nodes)
    pool = KvPool(KvBuffers.empty((layer,), int((sizes + spare).sum()) + 8, dtype))
    nodes: list[TreeNode] = []
    for number in range(num_nodes):
        choices = [node for node in nodes if len(node.ancestors) < 3]
        parent = choices[random.integers(len(choices))] if choices and random.random() < 0.8 else None
        # Neighbours of equal size are read in one call: make such runs likely.
        slack = 0 if random.random() < 0.6 else int(spare[number])
        extent = pool.allocate(int(sizes[number]) + slack)
        assert extent is not None
        ancestors = parent.path if parent else []
        start = parent.start + parent.length if parent else 0
        nodes.append(TreeNode(number, start, int(sizes[number]), extent, ancestors))
    inner = {id(above) for node in nodes for above in node.ancestors}
    for node in nodes:
        kind = random.random()
        if id(node) in inner:
            node.computed = node.length if kind < 0.7 else int(random.integers(0, node.length))
        elif kind < 0.5:
            node.computed = node.length - 1  # a decode token
        else:
            node.computed = int(random.integers(0, node.length))
    for node in nodes:
        if any(above.computed < above.length for above in node.ancestors):
            # An ancestor that is still being computed is finished in this very step, before its children.
            node.computed = min(node.computed, 0)
    return step_over(pool, nodes)


def step_over(pool: KvPool, nodes: list[TreeNode]) -> World:
    """The step that computes what is left of these nodes."""
    builder, readers = StepBuilder(), []
    for node in nodes:
        count = node.length - node.computed
        if not count:
            continue
        ancestors = [(above.number, above.extent, above.start, above.length) for above in node.ancestors]
        position = node.start + node.computed
        builder.add_chunk(
            np.zeros(count, dtype=np.int64), position, node.start, node.extent, ancestors, count
        )
        readers += [(node, index) for index in range(node.computed, node.length)]
    return World(pool, nodes, builder.build(), readers)


def dense_attention(
    world: World,
    query: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    value_dim: int,
) -> Tensor:
    """Each token over all slots it sees, in float64, [T, Hq, Dv]. The pool already holds this step's keys."""
    heads, tokens, dim = query.shape
    output = torch.empty(tokens, heads, value_dim, dtype=torch.float64)
    for node in {reader.number: reader for reader, _ in world.readers}.values():
        rows = [row for row, (reader, _) in enumerate(world.readers) if reader is node]
        last_seen = torch.tensor([node.start + world.readers[row][1] for row in rows]).unsqueeze(1)
        slots = torch.cat([above.extent.offset + torch.arange(above.length) for above in node.path])
        position = torch.cat([above.start + torch.arange(above.length) for above in node.path])
        hidden = position > last_seen
        if window is not None:
            hidden |= position <= last_seen - window
        keys, values = world.pool.keys[0][slots].double(), world.pool.values[0][slots].double()
        for head in range(heads):
            kv_head = head // (heads // keys.shape[1])
            scores = query[head, rows].double() @ keys[:, kv_head, :dim].T * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.masked_fill_(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double().expand(len(rows), 1)], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : len(slots)]
            output[rows, head] = weights @ values[:, kv_head, :value_dim]
    return output
