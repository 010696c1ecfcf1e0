"""Which item leaves a cache that is full.

`KnownNextUse` knows the whole job. With equal sizes and costs it is Belady's rule (1966), which loads least: the item
whose next use is farthest away leaves. With unequal ones, "farthest" has to be weighed against the bytes an item
occupies and the cost of loading it again. Memory gets a price for every moment, high where many items compete
(`memory_prices`), and what an item is worth per byte is the cost it saves less the price of keeping it until then:

    worth = cost of the next access / bytes - sum of prices up to the next access

An optimal solution of the fractional problem keeps exactly what is worth more than nothing (linear programming
duality), so with the right prices little is lost. Since every item pays the same prices from now on, the order of two
items never changes while they stay: a heap is enough.

The others see only the past; they are there to be compared with.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

import numpy as np

from batchllm.planner.accesses import AccessSequence, FloatArray, next_uses


class EvictionPolicy(Protocol):
    """Ranks the items that are in a cache. The cache says what happens, in the order in which it does."""

    def use(self, item: int, access: int) -> None:
        """Access `access` has used `item`, and it is in the cache from now on."""

    def forget(self, item: int) -> None:
        """`item` is not in the cache any more, or may not leave it now. Nothing happens if it was not ranked."""

    def victim(self) -> int:
        """The ranked item that should leave first. At least one item is ranked."""


class KnownNextUse:
    """Keeps what is worth most; see the module. What is never used again is worth least of all.

    `prices[a]` is what a byte costs from access `a` to the next one. Without prices it is the same at all times
    and so high that only the next use counts: Belady's rule.
    """

    def __init__(self, sequence: AccessSequence, prices: FloatArray | None = None):
        self.next_use = next_uses(sequence.item)
        self._worth = _worth_after(sequence, self.next_use, prices)
        self._ranking = _Ranking()

    def use(self, item: int, access: int) -> None:
        self._ranking.set(item, float(self._worth[access]), -int(self.next_use[access]))

    def forget(self, item: int) -> None:
        self._ranking.remove(item)

    def victim(self) -> int:
        return self._ranking.lowest()


class LeastRecentlyUsed:
    def __init__(self) -> None:
        self._items: OrderedDict[int, None] = OrderedDict()

    def use(self, item: int, access: int) -> None:
        self._items[item] = None
        self._items.move_to_end(item)

    def forget(self, item: int) -> None:
        self._items.pop(item, None)

    def victim(self) -> int:
        return next(iter(self._items))


class MostScored:
    """The item with the lowest sum of scores over all its accesses so far leaves; of equals the least recent one.

    Sums outlive the stay in the cache. A score of 1 for every access is LFU. Cache-Craft's (Agarwal et al., SIGMOD
    2025) is 1 / CFO, where CFO is the share of the chunk's tokens that this access has to recompute.
    """

    def __init__(self, score: FloatArray):
        self._score = score  # [accesses]
        self._sum: dict[int, float] = {}
        self._ranking = _Ranking()

    def use(self, item: int, access: int) -> None:
        total = self._sum.get(item, 0.0) + float(self._score[access])
        self._sum[item] = total
        self._ranking.set(item, total, access)

    def forget(self, item: int) -> None:
        self._ranking.remove(item)

    def victim(self) -> int:
        return self._ranking.lowest()


def least_frequently_used(num_accesses: int) -> MostScored:
    return MostScored(np.ones(num_accesses))


def cache_craft_score(fix_share: FloatArray, least: float = 0.01) -> MostScored:
    """`fix_share[a]`: CFO of access `a`, 0 to 1; shares below `least` count as `least`."""
    return MostScored(1.0 / np.maximum(fix_share, least))


def _worth_after(sequence: AccessSequence, next_use: np.ndarray, prices: FloatArray | None) -> FloatArray:
    """[accesses] what a byte of the accessed item is worth from then on, up to a term that is the same for all."""
    count = len(sequence)
    used_again = next_use < count
    worth = np.full(count, -np.inf)
    upcoming = next_use[used_again]
    if prices is None:
        worth[used_again] = -upcoming
        return worth
    paid = np.append(0.0, np.cumsum(prices))
    item = sequence.item[upcoming]
    worth[used_again] = sequence.cost[upcoming] / sequence.bytes[item] - paid[upcoming]
    return worth


class _Ranking:
    """Items by a key, lowest first. An item that moves leaves its old entry in the heap, where it is skipped later."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, int]] = []  # key, tie, version, item
        self._version: dict[int, int] = {}
        self._versions = 0

    def set(self, item: int, key: float, tie: int) -> None:
        self._versions += 1
        self._version[item] = self._versions
        heapq.heappush(self._heap, (key, tie, self._versions, item))

    def remove(self, item: int) -> None:
        self._version.pop(item, None)

    def lowest(self) -> int:
        while True:
            _, _, version, item = self._heap[0]
            if self._version.get(item) == version:
                return item
            heapq.heappop(self._heap)
