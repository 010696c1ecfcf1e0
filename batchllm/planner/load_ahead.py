"""When to load which layer of which chunk, so that it is there when the model comes to it.

A job's steps use chunks, layer by layer. What is not in the cache is loaded, in the order of use, one load after
another, as early as there is room: a load takes its bytes of a buffer until the layer that needs it has been computed.
Loading in the order of use is best: any other order delays what is needed first. The schedule says for each load after
which layer of which step it may begin; seconds are what is predicted from bandwidth and compute time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray
from batchllm.planner.accesses import FloatArray


@dataclass(frozen=True)
class ChunkUses:
    """Which chunks each step reads and which of these reads have to be loaded.

    A step is whatever computes all layers once: a request, or a batch of them.
    """

    ptr: IntArray  # [steps + 1] CSR over the uses
    chunk: IntArray  # [uses]
    must_load: NDArray[np.bool_]  # [uses] as `simulate_cache` found
    bytes_per_second: FloatArray  # [uses] of the tier that the chunk comes from
    layer_bytes: IntArray  # [chunks, layers]

    @property
    def num_steps(self) -> int:
        return len(self.ptr) - 1

    @property
    def num_layers(self) -> int:
        return int(self.layer_bytes.shape[1])


@dataclass(frozen=True)
class LoadSchedule:
    """Loads in the order in which they are issued. A stage is one layer of one step: `step * layers + layer`."""

    stage: IntArray  # [loads] that needs the load
    chunk: IntArray  # [loads]
    bytes: IntArray  # [loads]
    after: IntArray  # [loads] the stage that must have been computed before the load begins; -1: at once
    begin: FloatArray  # [loads] predicted seconds
    end: FloatArray  # [loads]
    compute_begin: FloatArray  # [stages]
    compute_end: FloatArray  # [stages]
    layers: int

    @property
    def seconds(self) -> float:
        return float(self.compute_end[-1]) if len(self.compute_end) else 0.0

    @property
    def stall_seconds(self) -> float:
        """Time in which nothing is computed because something is still being loaded."""
        busy = float((self.compute_end - self.compute_begin).sum())
        return self.seconds - busy

    def step(self, load: int) -> int:
        return int(self.stage[load]) // self.layers

    def layer(self, load: int) -> int:
        return int(self.stage[load]) % self.layers


class BufferTooSmall(ValueError):
    """One layer of one step needs more than the buffer holds."""


def plan_loads(
    uses: ChunkUses, compute_seconds: FloatArray, buffer_bytes: int, latency: float = 0.0
) -> LoadSchedule:
    """`compute_seconds`: [steps, layers]; `latency`: seconds of each load beside its bytes.

    At no time are more than `buffer_bytes` loaded or being loaded for stages that have not been computed. Raises
    BufferTooSmall.
    """
    stage, chunk, size, rate = _loads(uses)
    after = _issued_after(stage, size, buffer_bytes, uses.num_layers)
    duration = latency + size / rate
    return _with_times(stage, chunk, size, after, duration, compute_seconds)


def preload_depth(num_layers: int, load_seconds: float, compute_seconds: float) -> int:
    """Layers that must be loaded before the first is computed, so that none is waited for afterwards.

    Times are of all layers together, every layer being alike. The depth is at least 1 (Cache-Craft's formula).
    """
    if num_layers == 0 or load_seconds <= 0:
        return 0
    depth = (num_layers - 1) * (1 - compute_seconds / load_seconds)
    return max(0, math.ceil(depth - 1e-9)) + 1


def _loads(uses: ChunkUses) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """(stage, chunk, bytes, bytes per second) of every load, by stage."""
    step = np.repeat(np.arange(uses.num_steps), np.diff(uses.ptr))
    use = np.flatnonzero(uses.must_load)
    layers = uses.num_layers
    stage = (step[use, None] * layers + np.arange(layers)).ravel()
    order = np.argsort(stage, kind="stable")
    chunk = np.repeat(uses.chunk[use], layers)[order]
    size = uses.layer_bytes[uses.chunk[use]].ravel()[order]
    rate = np.repeat(uses.bytes_per_second[use], layers)[order]
    return stage[order], chunk, size, rate


def _issued_after(stage: IntArray, size: IntArray, buffer_bytes: int, layers: int) -> IntArray:
    """For each load, the last stage whose loads have to be gone for it to fit."""
    if not len(stage):
        return stage.copy()
    total = np.append(0, np.cumsum(size))
    # Loads are released by stages: load k fits once all loads before `first[k]` are gone, rounded up to whole stages.
    first = np.searchsorted(total, total[1:] - buffer_bytes, side="left")
    after = np.where(first > 0, stage[np.maximum(first - 1, 0)], -1)
    stuck = np.flatnonzero(after >= stage)
    if len(stuck):
        at = int(stage[stuck[0]])
        needed = int(size[stage == at].sum())
        raise BufferTooSmall(
            f"layer {at % layers} of step {at // layers} loads {needed:,} bytes, and the buffer holds {buffer_bytes:,}"
        )
    return after


def _with_times(
    stage: IntArray,
    chunk: IntArray,
    size: IntArray,
    after: IntArray,
    duration: FloatArray,
    compute_seconds: FloatArray,
) -> LoadSchedule:
    """Loads one after another, stages one after another, each stage after its loads and each load after its room."""
    work = compute_seconds.ravel().tolist()
    begin, end = np.zeros(len(stage)), np.zeros(len(stage))
    compute_begin, compute_end = np.zeros(len(work)), np.zeros(len(work))
    needs, waits, takes = stage.tolist(), after.tolist(), duration.tolist()
    load, loader_free, now = 0, 0.0, 0.0
    for current, seconds in enumerate(work):
        # Room for these loads was made by earlier stages, whose ends are known.
        while load < len(needs) and needs[load] <= current:
            room = compute_end[waits[load]] if waits[load] >= 0 else 0.0
            begin[load] = max(loader_free, room)
            loader_free = end[load] = begin[load] + takes[load]
            load += 1
        ready = end[load - 1] if load and needs[load - 1] == current else 0.0
        compute_begin[current] = max(now, ready)
        now = compute_end[current] = compute_begin[current] + seconds
    layers = compute_seconds.shape[1]
    return LoadSchedule(stage, chunk, size, after, begin, end, compute_begin, compute_end, layers)
