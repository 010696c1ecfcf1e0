"""Steps like those of a real job, for measuring: decoding under shared prefixes, short chunks, a long prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.executor.kv_pool import Extent
from batchllm.executor.step import StepBatch
from batchllm.executor.step_builder import Ancestor, StepBuilder


@dataclass(frozen=True)
class ProbeStep:
    """A step and what it has to do, counted as in planner.loads."""

    batch: StepBatch
    tokens: int
    chunks: int
    own_pairs: int
    shared_reads: int
    shared_pairs: int
    kv_read: int
    slots: int  # of the KV pool that it needs


@dataclass(frozen=True)
class _Shape:
    """`groups` shared nodes of `shared` tokens (0: none), below each `count` chunks of `tokens`, each after `held`
    tokens of its own."""

    groups: int
    count: int
    tokens: int
    held: int
    shared: int


# Small ones first: when time is short the large ones are left out.
_STEPS = (
    _Shape(groups=1, count=1, tokens=1, held=63, shared=0),
    _Shape(groups=1, count=8, tokens=1, held=63, shared=256),
    _Shape(groups=8, count=8, tokens=1, held=31, shared=128),
    _Shape(groups=1, count=64, tokens=1, held=31, shared=0),
    _Shape(groups=1, count=64, tokens=1, held=31, shared=1024),
    _Shape(groups=1, count=64, tokens=1, held=287, shared=0),
    _Shape(groups=4, count=4, tokens=16, held=0, shared=256),
    _Shape(groups=1, count=1, tokens=512, held=0, shared=0),
    _Shape(groups=1, count=1, tokens=1024, held=0, shared=0),
)


def probe_steps(max_length: int | None) -> list[ProbeStep]:
    """Steps whose sequences are no longer than the model takes."""
    fitting = [
        step for step in _STEPS if not max_length or step.shared + step.held + step.tokens <= max_length
    ]
    return [_build(step) for step in fitting or _STEPS[:1]]


def _build(shape: _Shape) -> ProbeStep:
    builder = StepBuilder()
    length = shape.held + shape.tokens
    group_slots = shape.shared + shape.count * length
    for group in range(shape.groups):
        node = Extent(group * group_slots, shape.shared)
        ancestors: list[Ancestor] = [(group, node, 0, shape.shared)] if shape.shared else []
        for index in range(shape.count):
            extent = Extent(node.end + index * length, length)
            tokens = np.full(shape.tokens, 5, dtype=np.int64)
            start = shape.shared + shape.held
            builder.add_chunk(tokens, start, shape.shared, extent, ancestors, shape.tokens)
    builder.read_last_logits(shape.groups)
    chunks = shape.groups * shape.count
    own = shape.tokens * shape.held + shape.tokens * (shape.tokens + 1) // 2
    return ProbeStep(
        batch=builder.build(),
        tokens=chunks * shape.tokens,
        chunks=chunks,
        own_pairs=chunks * own,
        shared_reads=shape.groups if shape.shared else 0,
        shared_pairs=chunks * shape.tokens * shape.shared,
        kv_read=shape.groups * group_slots,
        slots=shape.groups * group_slots,
    )
