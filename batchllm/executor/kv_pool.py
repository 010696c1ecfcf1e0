"""KV memory under a byte budget: one token-major buffer per layer, handed out as contiguous extents.

Lengths are known ahead, so a node's KV is one contiguous stretch ("extent"), never pages: on a CPU, gathering
pages costs more than the attention itself. Extents may be moved by `compact`, so an offset is read from the
extent each time and never kept.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.step import StepBatch


@dataclass(slots=True, eq=False)
class Extent:
    """`capacity` consecutive token slots, from `offset` on."""

    offset: int
    capacity: int

    @property
    def end(self) -> int:
        return self.offset + self.capacity

    def slots(self, first: int, count: int) -> NDArray[np.int64]:
        """Pool slots of `count` of the extent's slots, from the `first` one on."""
        return np.arange(self.offset + first, self.offset + first + count)


def bytes_per_token(layers: Sequence[LayerKv], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    return sum(2 * layer.heads * layer.row_dim for layer in layers) * dtype.itemsize


class KvPool:
    """`keys[l]` and `values[l]` are `[capacity, heads, row_dim]`; slot `s` holds one token in every layer.

    Fresh slots are zero. Freed ones keep what they held until they are written again, be it NaN.
    """

    def __init__(self, buffers: KvBuffers):
        self._buffers = buffers
        self.layers, self.capacity, self.dtype = buffers.layers, buffers.capacity, buffers.dtype
        self.keys, self.values = buffers.keys, buffers.values
        self.used = 0
        self.peak = 0
        self._extents: list[Extent] = []  # by offset

    def usable(self, extents: int) -> int:
        """Every slot: extents are as large as asked for."""
        return self.capacity

    def allocate(self, tokens: int, high: bool = False) -> Extent | None:
        """The first free stretch of `tokens` slots, from the low or the high end; None when there is none.

        Leaves from one end and shared nodes from the other: leaves then lie side by side, and attention reads many
        of them at once.
        """
        offset = self._last_fit(tokens) if high else self._first_fit(tokens)
        if offset is None:
            return None
        new = Extent(offset, tokens)
        insort(self._extents, new, key=lambda extent: extent.offset)
        self._count(tokens)
        return new

    def _first_fit(self, tokens: int) -> int | None:
        previous_end = 0
        for extent in self._extents:
            if extent.offset - previous_end >= tokens:
                return previous_end
            previous_end = extent.end
        return previous_end if previous_end + tokens <= self.capacity else None

    def _last_fit(self, tokens: int) -> int | None:
        next_offset = self.capacity
        for extent in reversed(self._extents):
            if next_offset - extent.end >= tokens:
                return next_offset - tokens
            next_offset = extent.offset
        return next_offset - tokens if next_offset >= tokens else None

    def free(self, extent: Extent) -> None:
        self._extents.remove(extent)
        self.used -= extent.capacity

    def grow(self, extent: Extent, capacity: int) -> bool:
        """Enlarges an extent in place if the slots after it are free."""
        index = self._extents.index(extent)
        limit = self._extents[index + 1].offset if index + 1 < len(self._extents) else self.capacity
        if extent.offset + capacity > limit:
            return False
        self._count(capacity - extent.capacity)
        extent.capacity = capacity
        return True

    def copy(self, source: Extent, target: Extent, tokens: int) -> None:
        """Copies the first `tokens` slots of one extent to another, in every layer."""
        for buffer in (*self.keys, *self.values):
            buffer[target.offset : target.offset + tokens] = buffer[source.offset : source.offset + tokens]

    def write(self, layer: int, slots: NDArray[np.int64], key: Tensor, value: Tensor) -> None:
        """Puts K (positions applied) and V of tokens [n, heads, dim] into slots of one layer."""
        where = torch.from_numpy(slots)
        for buffer, states in ((self.keys[layer], key), (self.values[layer], value)):
            missing = self.layers[layer].row_dim - states.shape[-1]
            buffer.index_copy_(0, where, torch.nn.functional.pad(states, (0, missing)) if missing else states)

    def compact(self, last: Extent | None = None) -> None:
        """Moves every extent down so that all free slots are one stretch at the end, right after `last`."""
        saved: list[Tensor] = []
        if last is not None:
            saved = [buffer[last.offset : last.end].clone() for buffer in (*self.keys, *self.values)]
            self._extents.remove(last)
        previous_end = 0
        for extent in self._extents:
            if extent.offset > previous_end:
                self._move(extent, previous_end)
            previous_end = extent.end
        if last is not None:
            last.offset = previous_end
            self._extents.append(last)
            for buffer, kept in zip((*self.keys, *self.values), saved):
                buffer[last.offset : last.end] = kept

    def _move(self, extent: Extent, offset: int) -> None:
        for buffer in (*self.keys, *self.values):
            moved = buffer[extent.offset : extent.end].clone()  # the two ranges may overlap
            buffer[offset : offset + extent.capacity] = moved
        extent.offset = offset

    def _count(self, tokens: int) -> None:
        self.used += tokens
        self.peak = max(self.peak, self.used)

    def check_integrity(self) -> None:
        """Extents lie inside the pool, in order, without overlap, and add up to `used`. For tests."""
        previous_end = 0
        for extent in self._extents:
            assert extent.offset >= previous_end, "extents overlap"
            previous_end = extent.end
        assert previous_end <= self.capacity, "extent beyond the pool"
        assert self.used == sum(extent.capacity for extent in self._extents), "used slots miscounted"


class KvWriter:
    """Puts what one step computes into the pool, and then makes the step's copies."""

    def __init__(self, pool: KvPool, batch: StepBatch):
        self._pool = pool
        self.slots = torch.from_numpy(batch.slots)
        self._copy_from = torch.from_numpy(batch.copy_from)
        self._copy_to = torch.from_numpy(batch.copy_to)

    @property
    def copies(self) -> bool:
        """Whether the step copies slots too."""
        return len(self._copy_to) > 0

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [heads, T, dim], any strides."""
        buffers = self._pool.keys[layer], self._pool.values[layer]
        self._store(*buffers, key.transpose(0, 1), value.transpose(0, 1))
        if self.copies:
            for buffer in buffers:
                buffer.index_copy_(0, self._copy_to, buffer.index_select(0, self._copy_from))

    def _store(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [T, heads, dim] to the slots of one layer."""
        for buffer, new in ((keys, key), (values, value)):
            if new.shape[-1] < buffer.shape[-1]:
                new = torch.nn.functional.pad(new, (0, buffer.shape[-1] - new.shape[-1]))
            buffer.index_copy_(0, self.slots, new)
