"""Steps that only decode, repeated on the device: tokens, positions and KV slots go from step to step without the host.

A batch of rows has fixed tensors. One step reads and changes only these, so it can be recorded as a graph and replayed:
each row's slot is worked out from its position and its leaf's pages, the chosen token becomes the next step's input,
counters are increased. While the same sequences go on, nothing is sent to the device but, now and then, new tile plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchllm.executor.attention_paged import StepTensors
from batchllm.executor.cuda_graph import Graph, Recorder
from batchllm.executor.model import ModelRunner
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.paged_pool import PagedExtent, PagedPool
from batchllm.executor.sample_rows import DeviceRows, SampleRows
from batchllm.executor.step import StepBatch
from batchllm.executor.step_plans import ReloadedPlans, kv_reads
from batchllm.executor.upload import upload, upload_as

MOST_REPEATS = 32
_HORIZON = 16  # steps that a tile plan is made for, if pages allow it
_WATCHED = 2  # steps of a size, at most: the first may wait for the device only to set something up


@dataclass
class DecodeStats:
    """What was done, for tests and benchmarks."""

    launches: int = 0
    loads: int = 0  # launches that sent rows to the device
    plans: int = 0  # tile plans made
    recorded: int = 0  # graphs
    replayed: int = 0  # steps that ran as a graph
    launched: int = 0  # steps that ran kernel by kernel
    not_recorded: str = ""  # why the last step that could not be recorded could not

    def count_plan(self) -> None:
        self.plans += 1


@dataclass(frozen=True)
class Sent:
    """What the device works on: the same sequences on the same pages go on where they are."""

    sequences: tuple[int, ...]
    pages: tuple[int, ...]  # of each leaf


class DecodeLoop:
    """All steps of one pool that only decode."""

    def __init__(self, model: ModelRunner, backend: PagedBackend, pool: PagedPool, recorder: Recorder):
        self.stats = DecodeStats()
        self._model, self._backend, self._pool, self._recorder = model, backend, pool, recorder
        self._batches: dict[tuple[int, int, bool, bool], _RepeatedStep] = {}
        self._last: _RepeatedStep | None = None

    def forget(self) -> None:
        """Drops graphs and tensors."""
        self._batches.clear()
        self._last = None

    def interrupt(self) -> None:
        """Other steps ran: the next launch sends its rows again."""
        self._last = None

    @torch.inference_mode()
    def launch(
        self,
        batch: StepBatch,
        repeats: int,
        rows: SampleRows,
        fill: Callable[[Tensor], None],
    ) -> tuple[Tensor, Tensor | None]:
        """Queues `repeats` steps. Returns tokens [repeats, n] and, if wanted, log-probabilities [repeats, n].

        `fill` puts tokens into [n] that only the device knows. Results are overwritten by the launch after the next
        step of the same size: copy them behind this launch.
        """
        self.stats.launches += 1
        extents = [chunk.extent for chunk in batch.chunks]
        pages = tuple(len(extent.pages) for extent in extents)
        sent = Sent(tuple(sample.sequence for sample in batch.samples), pages)
        kind = (_bucket(len(extents)), _bucket(max(pages)), rows.greedy, rows.wants_logprobs)
        step = self._batches.get(kind)
        if step is None:
            step = _RepeatedStep(self._model, self._backend, self._pool, self._recorder, self.stats, *kind)
            self._batches[kind] = step
        if step is not self._last or step.sent != sent:
            step.load(batch, rows, sent)
            fill(step.tokens)
        step.plan(batch, repeats)
        step.run(repeats)
        self._last = step
        return step.results(repeats, len(extents))


class _RepeatedStep:
    """A step of up to `rows` rows with up to `pages` pages of their own, in fixed tensors."""

    def __init__(
        self,
        model: ModelRunner,
        backend: PagedBackend,
        pool: PagedPool,
        recorder: Recorder,
        stats: DecodeStats,
        rows: int,
        pages: int,
        greedy: bool,
        logprobs: bool,
    ):
        self._model, self._backend, self._pool, self._recorder = model, backend, pool, recorder
        self._stats, self._greedy = stats, greedy
        device = backend.device

        def integers(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.tokens = integers(rows)
        self._positions = integers(rows)
        self._leaf_start = integers(rows)
        self._is_live = integers(rows)  # 1, or 0 for rows that only fill up
        self._pages = integers(rows, pages)
        self._count = integers(1)  # of steps since the launch began
        self._chosen = integers(MOST_REPEATS, rows)
        self._logprobs = torch.zeros(MOST_REPEATS, rows, device=device) if logprobs else None
        self._rows = DeviceRows(rows, device)
        self._plans = ReloadedPlans(device, backend.resident_programs, stats.count_plan)
        self._planned_until: int | None = None  # first row's position that the plans no longer hold for
        self._first_position = 0  # the first row's, on the device, once what is queued has run
        self._graph: Graph | None = None
        self._to_watch = _WATCHED  # steps, until one is found that can be recorded
        self._can_record = False
        self.sent: Sent | None = None

    def load(self, batch: StepBatch, rows: SampleRows, sent: Sent) -> None:
        """Sends everything about the rows but the tile plans."""
        self._stats.loads += 1
        self.sent = sent
        used, device = len(batch.chunks), self._backend.device
        extents = [_paged(chunk.extent) for chunk in batch.chunks]
        pages = np.full(self._pages.shape, self._pool.spare_page)
        for row, extent in enumerate(extents):
            pages[row, : len(extent.pages)] = extent.pages
        starts = np.array([chunk.node_start for chunk in batch.chunks], dtype=np.int64)
        tokens, positions, leaf_start = upload([batch.tokens, batch.positions, starts], device)
        self.tokens[:used], self._positions[:used], self._leaf_start[:used] = tokens, positions, leaf_start
        self.tokens[used:], self._positions[used:], self._leaf_start[used:] = 0, 0, 0
        self._pages.copy_(upload_as(pages, torch.int64, device))
        self._is_live[:used], self._is_live[used:] = 1, 0
        self._rows.load(rows)
        self._first_position = int(batch.positions[0])
        self._planned_until = None

    def plan(self, batch: StepBatch, repeats: int) -> None:
        """Tile plans that hold for the next `repeats` steps: those there are, or new ones for some steps ahead."""
        if self._planned_until is not None and self._first_position + repeats <= self._planned_until:
            return
        room = min(
            _paged(chunk.extent).capacity - chunk.held_before for chunk in batch.chunks
        )  # steps until a leaf is full
        steps = max(repeats, min(_HORIZON, room))
        reads = kv_reads(batch.chunks, batch.shared_reads, batch.positions, ahead=steps - 1)
        if not self._plans.load(reads, steps - 1):
            self._graph = None  # it reads arrays that are no longer used
        self._planned_until = self._first_position + steps

    def run(self, repeats: int) -> None:
        self._count.zero_()
        for _ in range(repeats):
            if self._graph is None and self._can_record:
                self._record()
            if self._graph is None:
                self._launch()
            else:
                self._graph.replay()
                self._stats.replayed += 1
        self._first_position += repeats

    def _record(self) -> None:
        self._graph = self._recorder.record(self._step, self._state())
        self._can_record = self._graph is not None
        self._stats.recorded += self._can_record
        if not self._can_record:
            self._stats.not_recorded = self._recorder.failure

    def _launch(self) -> None:
        """The step, kernel by kernel; the first times watched."""
        self._stats.launched += 1
        if not self._to_watch:
            self._step()
            return
        obstacle = self._recorder.watch(self._step)
        self._can_record = obstacle is None
        self._to_watch = 0 if self._can_record else self._to_watch - 1
        if obstacle is not None and not self._to_watch:
            self._stats.not_recorded = obstacle

    def results(self, repeats: int, rows: int) -> tuple[Tensor, Tensor | None]:
        logprobs = None if self._logprobs is None else self._logprobs[:repeats, :rows]
        return self._chosen[:repeats, :rows], logprobs

    def _step(self) -> None:
        """One token of every row. No value of the host's takes part that changes from step to step."""
        size = self._pool.page_size
        own = self._positions - self._leaf_start
        page = self._pages.gather(1, (own // size).unsqueeze(1)).squeeze(1)
        step = StepTensors(self.tokens, self._positions, page * size + own % size)
        attention = self._backend.attention_over(self._pool, step, self._plans)
        logits = self._model.logits(self.tokens, self._positions, attention, None)
        chosen = self._rows.choose(logits, self._greedy, self._backend.kernels)
        self._chosen.index_copy_(0, self._count, chosen.unsqueeze(0))
        if self._logprobs is not None:
            chances = self._backend.kernels.token_logprobs(logits, chosen)
            self._logprobs.index_copy_(0, self._count, chances.unsqueeze(0))
        self.tokens.copy_(chosen)
        for counter in (self._positions, self._rows.indices):
            counter.add_(self._is_live)
        self._count.add_(1)

    def _state(self) -> list[Tensor]:
        changed = [self.tokens, self._positions, self._count, self._chosen, self._rows.indices]
        return changed if self._logprobs is None else [*changed, self._logprobs]


def _bucket(count: int) -> int:
    """Sizes that steps are made for: powers of two up to 64, then multiples of 64."""
    return 1 << (count - 1).bit_length() if count <= 64 else -(-count // 64) * 64


def _paged(extent: object) -> PagedExtent:
    assert isinstance(extent, PagedExtent)
    return extent
