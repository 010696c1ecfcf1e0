"""A job's `chunks` section at work: the store opened, and for every plan what its nodes take from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from batchllm.chunkcache.codecs import CODEC_NAMES
from batchllm.chunkcache.host_tier import HostTier
from batchllm.chunkcache.identity import model_identity
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.loader import ChunkLoader, KvShapes, LoadEvent
from batchllm.chunkcache.lookup import ChunkLookup
from batchllm.chunkcache.node_chunks import NodeChunks
from batchllm.chunkcache.rules import (
    CacheCraftRule,
    FirstTokensRule,
    LargestDeviationRule,
    MostSensitiveRule,
    RepairRule,
    strength_for,
)
from batchllm.chunkcache.store import ChunkStore
from batchllm.chunkcache.stored_chunks import StoredChunks, placed_part
from batchllm.core import ChunkTable, Plan, PromptTable
from batchllm.errors import JobError
from batchllm.executor.device import Placement
from batchllm.executor.model import ModelRunner
from batchllm.job import ChunksSpec, JobSpec

DEFAULT_SHARE = 0.15
_AHEAD = 0.25  # of the host memory: decoded and on its way; the rest keeps what is used again
_MOST_AUTO_BYTES = 4 << 30
_SAMPLED_NODES = 500  # from which Cache-Craft's strength is found


def identity_of(job: JobSpec, model: ModelRunner) -> bytes:
    """What chunks of this job's model are stored under: another model, format or quantisation never matches."""
    return model_identity(job.model.path, f"{model.dtype}/{job.model.quantize or ''}")


def refuse_gpu(job: JobSpec, placement: Placement) -> None:
    """Raises JobError where a job's chunks would be on a GPU."""
    if placement.gpu is not None:
        raise JobError(
            f"{job.source}: chunks: stored chunks are reused on the CPU only; set engine.device to cpu"
        )


def host_bytes(spec: ChunksSpec) -> int:
    """The limit of `chunks.host_memory`."""
    if isinstance(spec.host_memory, int):
        return spec.host_memory
    return min(_MOST_AUTO_BYTES, psutil.virtual_memory().available // 8)


@dataclass
class ChunkReuse:
    """For one run. Figures add up over its plans."""

    spec: ChunksSpec
    store: ChunkStore
    model: ModelRunner
    prompts: PromptTable
    lookup: ChunkLookup
    rotation: KeyRotation
    share: float  # of the reused tokens that is computed again
    figures: dict[str, float] = field(default_factory=dict)
    trace: list[LoadEvent] | None = None

    @classmethod
    def open(
        cls, job: JobSpec, model: ModelRunner, prompts: PromptTable, chunks: ChunkTable
    ) -> ChunkReuse | None:
        """None where the job reuses nothing. Raises UserError: no store, or a model whose keys cannot be moved."""
        spec = job.chunks
        if spec is None or spec.reuse == "off":
            return None
        store = ChunkStore(spec.store, identity_of(job, model))
        exact = spec.reuse == "exact"
        lookup = ChunkLookup(store, prompts, chunks, exact_only=exact, codecs=_codecs(exact, model.dtype))
        share = (
            (DEFAULT_SHARE if spec.recompute is None else spec.recompute) if spec.reuse == "repair" else 0.0
        )
        return cls(spec, store, model, prompts, lookup, find_rotation(model), share)

    def notes(self) -> list[str]:
        """What a user should know before anything runs."""
        own = sum(chunk.model == self.store.model for chunk in self.store)
        if own or not len(self.store):
            return [] if own else [f"{self.store.path}: the chunk store is empty; run `batchllm precompute`"]
        return [
            f"{self.store.path}: holds {len(self.store):,} chunks of other models or number formats and none of this "
            "one's: everything is computed; run `batchllm precompute`"
        ]

    @contextmanager
    def stored_chunks(self, plan: Plan) -> Iterator[StoredChunks]:
        """For an engine that runs this plan."""
        nodes = NodeChunks(plan, self.lookup, self.share if self.spec.reuse == "repair" else 0.0)
        sequence, first_access = nodes.accesses()
        limit = host_bytes(self.spec)
        ahead = int(limit * _AHEAD)
        tier = HostTier(sequence, limit - ahead)
        longest = int(np.diff(self.prompts.offsets).max(initial=1))
        loader = ChunkLoader(
            nodes,
            tier,
            first_access,
            self.rotation.at(torch.arange(longest)),
            KvShapes(self.model.layers, self.model.dtype),
            ahead,
            self.trace,
        )
        found = StoredChunks(nodes, loader, self.prompts, self._rule(nodes), self.model)
        try:
            yield found
        finally:
            loader.close()
            self._add(
                placed_tokens=found.stats.placed_tokens,
                exact_tokens=found.stats.exact_tokens,
                repaired_tokens=found.stats.repaired_tokens,
                looked_at_tokens=found.stats.looked_at_tokens,
                parts=loader.stats.parts,
                read_bytes=loader.stats.read_bytes,
                load_seconds=loader.stats.load_seconds,
                wait_seconds=loader.stats.wait_seconds,
                host_hits=tier.hits,
                host_misses=tier.misses,
            )
            self._most(host_peak_bytes=tier.peak, ahead_peak_bytes=loader.stats.peak_bytes)

    def _rule(self, nodes: NodeChunks) -> RepairRule | None:
        if self.spec.reuse != "repair" or self.share <= 0:
            return None
        if self.spec.rule == "first_tokens":
            return FirstTokensRule(self.share)
        if self.spec.rule == "largest_deviation":
            return LargestDeviationRule(self.share, min(1, len(self.model.layers) - 1))
        if self.spec.rule == "most_sensitive":
            return MostSensitiveRule(self.share)
        placed = []
        for number, (_, parts) in enumerate(nodes.nodes()):
            if number == _SAMPLED_NODES:
                break
            placed += [placed_part(part) for part in parts if not part.chunk.exact]
        return CacheCraftRule(strength_for(placed, self.share)) if placed else None

    def _add(self, **more: float) -> None:
        for name, value in more.items():
            self.figures[name] = self.figures.get(name, 0) + value

    def _most(self, **seen: float) -> None:
        for name, value in seen.items():
            self.figures[name] = max(self.figures.get(name, 0), value)


def _codecs(exact: bool, dtype: torch.dtype) -> frozenset[str]:
    """Those that a variant may have been written with; for exact reuse, those that lose nothing."""
    if not exact:
        return frozenset(CODEC_NAMES)
    return frozenset({"raw", "bf16"} if dtype == torch.bfloat16 else {"raw"})


def chunk_notes(chunks: ChunkTable, prompts: PromptTable) -> list[str]:
    """Rows without chunks and rows that hold a chunk twice."""
    counts = np.diff(chunks.ptr)
    without = int(((counts == 0) & (np.diff(prompts.offsets) > 0)).sum())
    twice = sum(_has_duplicates(prompts, chunks, row) for row in np.flatnonzero(counts > 1).tolist())
    notes = [f"{without:,} rows have no chunks: they are computed in full"] if without else []
    return notes + (
        [f"{twice:,} rows hold a chunk more than once: each is placed by itself"] if twice else []
    )


def _has_duplicates(prompts: PromptTable, chunks: ChunkTable, row: int) -> bool:
    first = int(prompts.offsets[row])
    if first == prompts.offsets[row + 1]:
        return False
    seen: Sequence[Any] = [
        prompts.tokens[first + begin : first + end].tobytes() for begin, end in chunks.of(row)
    ]
    return len(set(seen)) < len(seen)
