"""Stored chunks in the executor's batch steps: what a node takes from the store, and what is computed again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchllm.chunkcache.decision import FloatArray
from batchllm.chunkcache.identity import ChunkContext
from batchllm.chunkcache.loader import ChunkLoader, LoadingNode
from batchllm.chunkcache.node_chunks import NodeChunks, Part
from batchllm.chunkcache.request_kv import RequestKv
from batchllm.chunkcache.rules import PlacedChunk, RepairRule
from batchllm.core import IntArray, PromptTable
from batchllm.errors import JobError
from batchllm.executor.kv_pool import Extent, KvPool
from batchllm.executor.model import ModelRunner


@dataclass
class ReuseStats:
    """Prompt tokens of the nodes that were given memory."""

    placed_tokens: int = 0  # taken from the store, those computed again included
    exact_tokens: int = 0  # of them, computed in exactly this context
    repaired_tokens: int = 0  # computed again although they are stored
    looked_at_tokens: float = 0.0  # computed in part to choose what to repair, in tokens through all layers


@dataclass
class _Placed:
    loading: LoadingNode
    extent: Extent
    slots: IntArray  # of the extent
    early: list[tuple[Tensor, Tensor]]  # KV of the first layers, where these were computed to choose


class StoredChunks:
    """`executor.StoredKv` from a chunk store. `rule` None: nothing is computed again."""

    def __init__(
        self,
        nodes: NodeChunks,
        loader: ChunkLoader,
        prompts: PromptTable,
        rule: RepairRule | None,
        model: ModelRunner,
    ):
        self.stats = ReuseStats()
        self.loader = loader
        self._pool: KvPool | None = None
        self._nodes, self._prompts, self._rule, self._model = nodes, prompts, rule, model
        self._runs: dict[int, tuple[IntArray, IntArray]] = {}  # begins and ends, in tokens of the node
        self._placed: list[_Placed] = []
        self._computing_since = 0.0  # the layer before, for the trace

    def write_to(self, pool: Any) -> None:
        """See StoredKv.write_to."""
        if not isinstance(pool, KvPool):
            raise JobError("chunks: stored chunks are reused on the CPU only; set engine.device to cpu")
        self._pool = pool

    def place(self, node: int, first: int, extent: Extent) -> None:
        """See StoredKv.place."""
        self._runs.pop(node, None)
        if not self._nodes.parts(node):
            return
        loading = self.loader.fetch(node)
        for part, problem in loading.bad:
            self._nodes.lookup.forget(part.variant, problem)
        if not loading.parts:
            self.loader.release(loading)
            return
        start = int(self._nodes.plan.node_start[node])
        length = int(self._nodes.plan.node_end[node]) - start
        chosen, early = self._chosen(node, loading)
        compute = np.ones(length, dtype=np.bool_)
        for part in loading.parts:
            compute[part.begin - start : part.end - start] = False
        self._count(loading, chosen, ~compute)
        compute[chosen - start] = True
        compute[:first], compute[-1] = False, True
        edges = np.flatnonzero(np.diff(np.concatenate(([0], compute.view(np.int8), [0]))))
        self._runs[node] = (edges[::2], edges[1::2])
        slots = np.concatenate([np.arange(part.begin - start, part.end - start) for part in loading.parts])
        self._placed.append(_Placed(loading, extent, slots, early))

    def next_run(self, node: int, done: int, total: int) -> tuple[int, int]:
        """See StoredKv.next_run."""
        runs = self._runs.get(node)
        if runs is None:
            return done, total
        begins, ends = runs
        index = int(np.searchsorted(ends, done, side="right"))
        if index == len(ends):
            return done, total  # output tokens of a sequence that comes back
        last = index == len(ends) - 1
        return max(done, int(begins[index])), total if last else int(ends[index])

    def write(self, layer: int) -> None:
        """See StoredKv.write."""
        assert self._pool is not None
        if layer:
            self.loader.note("compute", -1, layer - 1, self._computing_since)
        for placed in self._placed:
            key, value = (
                placed.early[layer] if layer < len(placed.early) else self.loader.layer(placed.loading, layer)
            )
            self._pool.write(layer, placed.extent.offset + placed.slots, key, value)
        self._computing_since = time.perf_counter()

    def end_step(self) -> None:
        """See StoredKv.end_step."""
        self.loader.note("compute", -1, len(self._model.layers) - 1, self._computing_since)
        for placed in self._placed:
            self.loader.release(placed.loading)
        self._placed.clear()

    # ---- what is computed again

    def _chosen(self, node: int, loading: LoadingNode) -> tuple[IntArray, list[tuple[Tensor, Tensor]]]:
        """Positions, and the KV of the layers that had to be computed to find them."""
        lossy = [part for part in loading.parts if not part.chunk.exact]
        if self._rule is None or not lossy:
            return np.zeros(0, dtype=np.int64), []
        placed = [placed_part(part) for part in lossy]
        if self._rule.check_layer is None:
            return self._rule.choose(placed, None), []
        early, deviation = self._look(node, loading, self._rule.check_layer)
        return self._rule.choose(placed, deviation), early

    def _look(
        self, node: int, loading: LoadingNode, last_layer: int
    ) -> tuple[list[tuple[Tensor, Tensor]], FloatArray]:
        """Computes the prompt up to the end of the node, up to this layer: its KV at the parts, and how V differs."""
        plan, end = self._nodes.plan, int(self._nodes.plan.node_end[node])
        begin = int(self._prompts.offsets[plan.node_row[node]])
        tokens = torch.from_numpy(np.array(self._prompts.tokens[begin : begin + end], dtype=np.int64))
        kv = RequestKv(self._model, end)
        kv.compute(tokens, torch.arange(end), last_layer=last_layer)
        self.stats.looked_at_tokens += end * (last_layer + 1) / len(self._model.layers)
        positions = loading.positions()
        early = [(kv.keys[layer][positions], kv.values[layer][positions]) for layer in range(last_layer + 1)]
        stored = self.loader.layer(loading, last_layer)[1]
        difference = (early[last_layer][1].float() - stored.float()).square().sum(dim=(1, 2)).numpy()
        lengths = [part.end - part.begin for part in loading.parts]
        bounds = np.append(0, np.cumsum(lengths))
        lossy = [index for index, part in enumerate(loading.parts) if not part.chunk.exact]
        kept = [difference[bounds[index] : bounds[index + 1]] for index in lossy]
        return early, np.concatenate(kept)

    def _count(self, loading: LoadingNode, chosen: IntArray, placed: np.ndarray) -> None:
        self.stats.placed_tokens += int(placed.sum())
        self.stats.exact_tokens += sum(part.end - part.begin for part in loading.parts if part.chunk.exact)
        self.stats.repaired_tokens += len(chosen)


def placed_part(part: Part) -> PlacedChunk:
    """As a rule sees it: without its KV."""
    context = ChunkContext(part.variant.context_digest, 0, part.variant.stored.chunks)
    return PlacedChunk(part.begin, (), (), context, part.stored(), part.chunk.before)
