"""KV memory of a GPU: pages of a fixed number of tokens. A node has whole pages, neighbouring ones where possible.

The same operations as `KvPool`, so one scheduler serves both. Fragmentation costs nothing but locality, so nothing is
ever moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.executor.kv_buffers import LayerKv


@dataclass(slots=True, eq=False)
class PagedExtent:
    """Token slots on `pages`, in their order: slot i of the node is on page i // page_size."""

    pages: NDArray[np.int64]
    page_size: int

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.page_size

    def slots(self, first: int, count: int) -> NDArray[np.int64]:
        """Pool slots of `count` of the extent's slots, from `first` on: page * page_size + index in the page."""
        index = np.arange(first, first + count)
        return self.pages[index // self.page_size] * self.page_size + index % self.page_size


class PagedPool:
    """`keys[l]` is [pages, Hkv, page_size, Dk] and `values[l]` [pages, Hkv, page_size, Dv].

    A page of one head is one stretch of memory. Memory is not cleared: attention never reads what was not written.
    The last page is nobody's: rows that only fill up a captured step write there.
    """

    def __init__(
        self,
        layers: Sequence[LayerKv],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
    ):
        self.layers = tuple(layers)
        self.dtype = dtype
        self.page_size = page_size
        pages = max(1, -(-capacity // page_size))
        self.capacity = pages * page_size
        self.keys = [
            torch.empty(pages + 1, layer.heads, page_size, layer.key_dim, dtype=dtype, device=device)
            for layer in layers
        ]
        self.values = [
            torch.empty(pages + 1, layer.heads, page_size, layer.value_dim, dtype=dtype, device=device)
            for layer in layers
        ]
        self.peak = 0
        self._free = np.ones(pages, dtype=bool)
        self._num_free = pages
        self._extents: dict[int, PagedExtent] = {}  # by id

    @property
    def spare_page(self) -> int:
        """The page that is never handed out."""
        return len(self._free)

    def release(self) -> None:
        """Gives the memory back. The pool is not used afterwards."""
        self.keys.clear()
        self.values.clear()

    @property
    def used(self) -> int:
        """Slots that are handed out."""
        return (len(self._free) - self._num_free) * self.page_size

    def usable(self, extents: int) -> int:
        """Half of each extent's last page stays empty, on average."""
        return max(0, self.capacity - extents * self.page_size // 2)

    def allocate(self, tokens: int, high: bool = False) -> PagedExtent | None:
        """Whole pages for `tokens` slots, neighbours if there are enough; None when too few are free.

        Leaves come from the low end and shared nodes from the high end, so that what lives long stays together.
        """
        pages = self._take(-(-tokens // self.page_size), high)
        if pages is None:
            return None
        extent = PagedExtent(pages, self.page_size)
        self._extents[id(extent)] = extent
        return extent

    def free(self, extent: PagedExtent) -> None:
        self._free[extent.pages] = True
        self._num_free += len(extent.pages)
        del self._extents[id(extent)]

    def grow(self, extent: PagedExtent, capacity: int) -> bool:
        """Adds pages until the extent has room for `capacity` slots."""
        count = -(-capacity // self.page_size) - len(extent.pages)
        if count == 1 and len(extent.pages):
            more = self._take_next(int(extent.pages[-1]) + 1)
        else:
            more = self._take(count, high=False)
        if more is None:
            return False
        extent.pages = np.concatenate([extent.pages, more])
        return True

    def copy(self, source: PagedExtent, target: PagedExtent, tokens: int) -> None:
        """Copies the first `tokens` slots of one extent to another, in every layer."""
        self.copy_slots(torch.from_numpy(source.slots(0, tokens)), torch.from_numpy(target.slots(0, tokens)))

    def copy_slots(self, source: torch.Tensor, target: torch.Tensor, layer: int | None = None) -> None:
        """Copies pool slots [n] to others, all read before any is written; in one layer or in every one."""
        layers = range(len(self.layers)) if layer is None else (layer,)
        from_page, from_index = source // self.page_size, source % self.page_size
        to_page, to_index = target // self.page_size, target % self.page_size
        for buffer in (part[number] for part in (self.keys, self.values) for number in layers):
            buffer[to_page, :, to_index] = buffer[from_page, :, from_index]

    def compact(self, last: PagedExtent | None = None) -> None:
        """Nothing to do: any free page is as good as another."""

    def check_integrity(self) -> None:
        """No page has two owners, and free pages are those without one. For tests."""
        owned = np.concatenate([np.zeros(0, dtype=np.int64), *(e.pages for e in self._extents.values())])
        assert len(np.unique(owned)) == len(owned), "a page has two owners"
        assert not self._free[owned].any() and len(owned) + self._free.sum() == len(self._free)
        assert self._num_free == self._free.sum()

    def _take_next(self, wanted: int) -> NDArray[np.int64] | None:
        """One page, `wanted` if it is free. Most growth is this, of many leaves in one step."""
        if wanted >= len(self._free) or not self._free[wanted]:
            wanted = int(self._free.argmax())
            if not self._free[wanted]:
                return None
        self._free[wanted] = False
        self._num_free -= 1
        self.peak = max(self.peak, self.used)
        return np.array([wanted], dtype=np.int64)

    def _take(self, count: int, high: bool) -> NDArray[np.int64] | None:
        """Takes `count` free pages, ascending."""
        if count <= 0:
            return np.zeros(0, dtype=np.int64)
        if self._num_free < count:
            return None
        free = np.flatnonzero(self._free)
        # A run of neighbours: its last page is count - 1 pages after its first.
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        if len(starts):
            first = int(starts[-1] if high else starts[0])
        else:
            first = len(free) - count if high else 0
        pages = free[first : first + count]
        self._free[pages] = False
        self._num_free -= len(pages)
        self.peak = max(self.peak, self.used)
        return pages
