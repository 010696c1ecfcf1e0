"""Tile plans of a step on the device, one for each kind of attention that the model's layers have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from batchllm_kernels.device_plan import DevicePlan, PlanCapacity
from batchllm_kernels.tile_config import TileConfig
from batchllm_kernels.tile_plan import Ints, KvReads, TilePlan, plan_tiles

from batchllm.executor.paged_pool import PagedExtent
from batchllm.executor.step import Chunk, SharedRead, StepBatch

_ROOM = 1.25  # of a plan whose arrays others will be loaded into
_SOME = 256
_ENTRIES = 2  # entries grow with every page that is filled, and cost nothing but memory


@dataclass(frozen=True)
class PlanKind:
    """Layers of one kind read by the same plan."""

    config: TileConfig
    heads: int
    kv_heads: int
    window: int | None
    last_only: bool = False  # for the tokens with logits alone

    def plan(self, reads: KvReads, resident_programs: int, horizon: int = 0) -> TilePlan:
        return plan_tiles(
            reads,
            self.config.tile_shape(self.heads, self.kv_heads),
            window=self.window,
            horizon=horizon,
            resident_programs=resident_programs,
        )


Work = tuple[list[Chunk], list[SharedRead]]


class Plans(Protocol):
    def of(self, kind: PlanKind) -> DevicePlan: ...


class StepPlans:
    """Of one step; each is made when a layer first asks for it."""

    def __init__(self, batch: StepBatch, last: Work | None, device: torch.device, resident_programs: int):
        """`last`: `batch.logit_tokens()`."""
        self._batch = batch
        self._last = last
        self._device = device
        self._resident_programs = resident_programs
        self._plans: dict[PlanKind, DevicePlan] = {}

    def of(self, kind: PlanKind) -> DevicePlan:
        if kind not in self._plans:
            plan = kind.plan(self._reads(kind.last_only), self._resident_programs)
            self._plans[kind] = DevicePlan.of(plan, self._device)
        return self._plans[kind]

    def _reads(self, last_only: bool) -> KvReads:
        batch = self._batch
        if not last_only:
            return kv_reads(batch.chunks, batch.shared_reads, batch.positions)
        assert self._last is not None, "logits are read of every token"
        return kv_reads(*self._last, batch.positions[batch.logit_rows])


class ReloadedPlans:
    """Of steps that only decode: other plans are loaded into the same arrays, which a captured graph reads."""

    def __init__(self, device: torch.device, resident_programs: int, planned: Callable[[], object]):
        """`planned` is called for each plan that is made, for statistics."""
        self._device = device
        self._resident_programs = resident_programs
        self._planned = planned
        self._plans: dict[PlanKind, DevicePlan] = {}
        self._reads: KvReads | None = None
        self._horizon = 0

    def load(self, reads: KvReads, horizon: int) -> bool:
        """Plans for positions that grow by up to `horizon`. False when arrays had to be replaced by larger ones."""
        self._reads, self._horizon = reads, horizon
        fits = True
        for kind, held in self._plans.items():
            plan = self._plan(kind)
            if held.capacity.holds(plan):
                held.load(plan)
            else:
                self._plans[kind] = self._loaded(plan)
                fits = False
        return fits

    def of(self, kind: PlanKind) -> DevicePlan:
        if kind not in self._plans:
            self._plans[kind] = self._loaded(self._plan(kind))
        return self._plans[kind]

    def _plan(self, kind: PlanKind) -> TilePlan:
        assert self._reads is not None and not kind.last_only
        self._planned()
        return kind.plan(self._reads, self._resident_programs, self._horizon)

    def _loaded(self, plan: TilePlan) -> DevicePlan:
        capacity = PlanCapacity.of(plan, _ROOM)
        capacity = replace(capacity, entries=_ENTRIES * capacity.entries + _SOME)
        made = DevicePlan(capacity, self._device, always_merges=True)
        made.load(plan)
        return made


def kv_reads(
    chunks: Sequence[Chunk], shared_reads: Sequence[SharedRead], positions: Ints, ahead: int = 0
) -> KvReads:
    """What the rows of a step read, on pages: every chunk its own node as far as it is computed, and every shared
    node its readers. `ahead`: so many more tokens of each chunk will be written while the plan is used."""
    start = [chunk.node_start for chunk in chunks] + [read.start for read in shared_reads]
    length = [chunk.held_before + chunk.count + ahead for chunk in chunks]
    length += [read.length for read in shared_reads]
    extents = [chunk.extent for chunk in chunks] + [read.extent for read in shared_reads]
    pages = [_pages(extent) for extent in extents]
    readers = [(chunk,) for chunk in chunks] + [tuple(read.chunks) for read in shared_reads]
    first = np.array([chunk.first for group in readers for chunk in group])
    count = np.array([chunk.count for group in readers for chunk in group])
    chunk_ptr = np.cumsum([0, *count])
    return KvReads(
        positions=positions,
        start=np.array(start),
        length=np.array(length),
        page_ptr=np.cumsum([0, *map(len, pages)]),
        pages=np.concatenate(pages),
        row_ptr=chunk_ptr[np.cumsum([0, *map(len, readers)])],
        rows=np.arange(chunk_ptr[-1]) + np.repeat(first - chunk_ptr[:-1], count),
    )


def _pages(extent: object) -> Ints:
    assert isinstance(extent, PagedExtent), "a step over extents of another pool"
    return extent.pages
