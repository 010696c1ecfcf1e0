"""Collects the chunks of one step and turns them into flat arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchllm.executor.kv_memory import KvExtent
from batchllm.executor.step import Chunk, Sample, SharedRead, StepBatch, StepScores
from batchllm.planner.score_reads import NodeReads

Ancestor = tuple[int, KvExtent, int, int]  # node, extent, absolute start, length


class StepBuilder:
    """Extents may still move while a step is built, so slots are computed in `build`, at the very end."""

    def __init__(self) -> None:
        self.size = 0
        self.prompt_tokens = 0
        self.decode_tokens = 0
        self.samples: list[Sample] = []
        self.keep_logits: list[tuple[int, int]] = []
        self.pending: list[tuple[int, int]] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._chunks: list[Chunk] = []
        self._reads: dict[int, SharedRead] = {}
        self._logit_rows: list[int] = []
        self._logit_row_of_node: dict[int, int] = {}
        self._copies: list[tuple[KvExtent, KvExtent, int]] = []
        self._scores: list[NodeReads] = []  # of the chunks, `position` counted in the flat batch

    def add_chunk(
        self,
        tokens: NDArray[np.int64],
        position: int,
        node_start: int,
        extent: KvExtent,
        ancestors: list[Ancestor],
        prompt_tokens: int,
    ) -> None:
        chunk = Chunk(self.size, len(tokens), position, node_start, extent)
        self._tokens.append(tokens)
        self._chunks.append(chunk)
        for node, above, start, length in ancestors:
            self._reads.setdefault(node, SharedRead(above, start, length)).chunks.append(chunk)
        self.size += len(tokens)
        self.prompt_tokens += prompt_tokens

    def add_copy(self, source: KvExtent, target: KvExtent, tokens: int) -> None:
        self._copies.append((source, target, tokens))

    def read_last_logits(self, node: int) -> int:
        """Marks the newest token's logits as read; they belong to the end of `node`."""
        self._logit_rows.append(self.size - 1)
        self._logit_row_of_node[node] = len(self._logit_rows) - 1
        return len(self._logit_rows) - 1

    def read_all_logits(self) -> None:
        """Marks every token's logits as read."""
        self._logit_rows = list(range(self.size))

    def read_scores(self, reads: NodeReads) -> None:
        """Marks log-probabilities as read that the newest chunk gives; `reads.position` is absolute."""
        if len(reads.position):
            chunk = self._chunks[-1]
            self._scores.append(reads._replace(position=reads.position - chunk.position + chunk.first))

    def logits_of(self, node: int) -> int | None:
        """Row of the logits at the end of `node`, if this step computes them."""
        return self._logit_row_of_node.get(node)

    def build(self) -> StepBatch:
        positions = [np.arange(chunk.position, chunk.position + chunk.count) for chunk in self._chunks]
        slots = [chunk.extent.slots(chunk.held_before, chunk.count) for chunk in self._chunks]
        copy_from, copy_to = self._resolve_copies()
        logit_rows = np.array(self._logit_rows, dtype=np.int64)
        scores = None
        if self._scores:
            logit_rows, scores = self._join_scores(logit_rows)
        return StepBatch(
            tokens=_joined(self._tokens),
            positions=_joined(positions),
            slots=_joined(slots),
            copy_from=copy_from,
            copy_to=copy_to,
            chunks=self._chunks,
            shared_reads=list(self._reads.values()),
            logit_rows=logit_rows,
            samples=self.samples,
            keep_logits=self.keep_logits,
            prompt_tokens=self.prompt_tokens,
            decode_tokens=self.decode_tokens,
            pending=tuple(self.pending),
            scores=scores,
        )

    def _join_scores(self, sampled: NDArray[np.int64]) -> tuple[NDArray[np.int64], StepScores]:
        """All rows whose logits are read, and where among them are those of scores and those sampled from."""
        flat = _joined([reads.position for reads in self._scores])
        rows = np.union1d(sampled, flat)
        return rows, StepScores(
            row=np.searchsorted(rows, flat),
            target=_joined([reads.target for reads in self._scores]),
            score=_joined([reads.score for reads in self._scores]),
            sampled=np.searchsorted(rows, sampled),
        )

    def _resolve_copies(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slots to copy, all at once: a source that is itself a copy of this step is replaced by its origin."""
        origin: dict[int, NDArray[np.int64]] = {}  # by id of the extent copied to
        sources, targets = [], []
        for source, target, tokens in self._copies:
            slots = source.slots(0, tokens)
            known = origin.get(id(source), slots[:0])[:tokens]
            slots[: len(known)] = known
            origin[id(target)] = slots
            sources.append(slots)
            targets.append(target.slots(0, tokens))
        return _joined(sources), _joined(targets)


def _joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64)
