"""The main memory of a KV pool, kept for the pool of the next run on the same model.

A system gives out memory page by page as it is first written, and on a virtual machine that may take longer than to
compute what is written (0.3 GB/s where this was measured). Kept memory is written at full speed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from batchllm_kernels.cpu.large_pages import zeros_in_large_pages
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Shape of one layer's KV for one token."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def row_dim(self) -> int:
        """Head dim both are stored with. torch's CPU flash kernel wants K and V equally wide, so the
        narrower one (V, in DeepSeek's MLA) is padded with zeros."""
        return max(self.key_dim, self.value_dim)


@dataclass(frozen=True, eq=False)
class KvBuffers:
    """`keys[l]` and `values[l]` are `[capacity, heads, row_dim]`."""

    layers: tuple[LayerKv, ...]
    capacity: int
    dtype: torch.dtype
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, layers: Sequence[LayerKv], capacity: int, dtype: torch.dtype) -> KvBuffers:
        """Zeros that occupy no memory until written."""
        keys = [_zeros(capacity, layer, dtype) for layer in layers]
        values = [_zeros(capacity, layer, dtype) for layer in layers]
        return cls(tuple(layers), capacity, dtype, keys, values)

    def first(self, capacity: int) -> KvBuffers:
        """The first slots of the same memory."""
        keys, values = ([buffer[:capacity] for buffer in buffers] for buffers in (self.keys, self.values))
        return KvBuffers(self.layers, capacity, self.dtype, keys, values)


class KeptBuffers:
    """The buffers that were lent last, for the next borrower once the last one is gone."""

    def __init__(self) -> None:
        self._kept: KvBuffers | None = None
        self._lent: weakref.ref[KvBuffers] | None = None

    def lend(self, layers: Sequence[LayerKv], capacity: int, dtype: torch.dtype) -> KvBuffers:
        """Buffers of this shape; what they held before is still there."""
        if not self._can_lend(layers, capacity, dtype):
            self._kept = None  # goes before the new memory comes
            self._kept = KvBuffers.empty(layers, capacity, dtype)
        assert self._kept is not None
        lent = self._kept.first(capacity)
        self._lent = weakref.ref(lent)
        return lent

    def release(self) -> None:
        """Nothing is kept for the next borrower."""
        self._kept = None

    def _can_lend(self, layers: Sequence[LayerKv], capacity: int, dtype: torch.dtype) -> bool:
        kept = self._kept
        if kept is None or (self._lent is not None and self._lent() is not None):
            return False
        return (kept.layers, kept.dtype) == (tuple(layers), dtype) and capacity <= kept.capacity


def _zeros(capacity: int, layer: LayerKv, dtype: torch.dtype) -> Tensor:
    flat: Tensor = zeros_in_large_pages(capacity * layer.heads * layer.row_dim, dtype)
    return flat.view(capacity, layer.heads, layer.row_dim)
