"""In which order rows that share chunks should be answered, so that little has to be loaded twice.

Lossless first. Where passages may stand in any order, `field_order` puts those that rows have in common to the front;
rows that begin with the same chunks then share that beginning exactly, as a prefix, and are answered one after
another. What is left is reuse of chunks at other places, and for it rows with the same chunks should be near each
other: a walk that goes on with the row of which most is still in a window of the last chunks used, the size of the
cache. The walk is made in two ways, what each order loads is simulated with the best eviction, and the given order
takes part: the result never loads more.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchllm.core import IntArray
from batchllm.planner.accesses import AccessSequence, accesses_by_bytes
from batchllm.planner.field_order import FieldOrder, FreeItems, choose_order
from batchllm.planner.memory_prices import fewest_loaded_bytes

_HOT = 2000  # a chunk of more units than this is in the cache anyway and says nothing about nearness
_RARITY = (0.0, 0.5)  # a chunk of n units counts as bytes / (n - 1) ** rarity


@dataclass(frozen=True)
class ReuseOrder:
    """`row` is the order in which rows should be answered, `passages` the order of each row's passages.

    Bytes are loads into a cache of the given capacity when what leaves it is chosen with the whole future known; a
    beginning that neighbours share is loaded once.
    """

    row: IntArray  # [rows]
    passages: FieldOrder | None  # None: as given
    loaded_as_given: int
    loaded: int  # not more

    @property
    def saved_share(self) -> float:
        return 1 - self.loaded / self.loaded_as_given if self.loaded_as_given else 0.0


def order_for_reuse(
    passages: FreeItems, bytes: IntArray, capacity: int, *, may_reorder: bool = False
) -> ReuseOrder:
    """`passages`: the chunks of every row as given; `bytes[c]`: of chunk `c` in the cache of `capacity` bytes.

    `may_reorder`: the user allows the passages of a row to stand in any order.
    """
    given = np.arange(passages.num_rows)
    as_given = fewest_loaded_bytes(chunk_accesses(passages, given, bytes), capacity)
    chosen = choose_order(passages) if may_reorder else None
    arranged = passages if chosen is None else _arranged(passages, chosen)
    best: tuple[IntArray, FieldOrder | None, int] = (given, None, as_given)
    for row in _candidates(arranged, bytes, capacity):
        loaded = fewest_loaded_bytes(chunk_accesses(arranged, row, bytes), capacity)
        if loaded < best[2]:
            best = (row, chosen, loaded)
    return ReuseOrder(best[0], best[1], as_given, best[2])


def chunk_accesses(passages: FreeItems, row: IntArray, bytes: IntArray) -> AccessSequence:
    """The chunks that rows answered in this order use, without those of a beginning shared with the row before."""
    shared = _shared_with_previous(passages, row)
    start, end = passages.ptr[row] + shared, passages.ptr[row + 1]
    entry = _ranges(start, end)
    return accesses_by_bytes(passages.item[entry], bytes)


def _candidates(passages: FreeItems, bytes: IntArray, capacity: int) -> Iterator[IntArray]:
    sorted_rows, unit = _units(passages)
    yield sorted_rows
    chunk, ptr = _chunks_of_units(passages, sorted_rows, unit)
    for rarity in _RARITY:
        walk = _Walk(ptr, chunk, bytes, capacity, rarity).order()
        place = np.empty(len(walk), dtype=np.int64)
        place[walk] = np.arange(len(walk))
        yield sorted_rows[np.argsort(place[unit], kind="stable")]


def _units(passages: FreeItems) -> tuple[IntArray, IntArray]:
    """Rows so that equal beginnings are neighbours, and for each the number of its unit.

    A unit is all rows with the same first chunk after the same lead.
    """
    count = np.diff(passages.ptr)
    keys: list[IntArray] = []
    for depth in range(int(count.max(initial=0))):
        has = count > depth
        item = np.full(len(count), -1, dtype=np.int64)
        item[has] = passages.item[passages.ptr[:-1][has] + depth]
        keys.append(item)
    row = np.lexsort((*reversed(keys), passages.lead))
    first = keys[0][row] if keys else np.full(len(row), -1, dtype=np.int64)
    starts = np.ones(len(row), dtype=np.bool_)
    starts[1:] = (np.diff(first) != 0) | (np.diff(passages.lead[row]) != 0) | (first[1:] < 0)
    return row, np.cumsum(starts) - 1


def _chunks_of_units(passages: FreeItems, row: IntArray, unit: IntArray) -> tuple[IntArray, IntArray]:
    """CSR of the distinct chunks of each unit."""
    count = np.diff(passages.ptr)[row]
    entry = _ranges(passages.ptr[row], passages.ptr[row + 1])
    spread = max(1, len(passages.length))
    pairs = np.unique(np.repeat(unit, count) * spread + passages.item[entry])
    units = int(unit[-1]) + 1 if len(unit) else 0
    ptr = np.append(0, np.cumsum(np.bincount(pairs // spread, minlength=units)))
    return pairs % spread, ptr


class _Walk:
    """Goes from unit to unit, always to the one with the largest share of its bytes in the window.

    Where no unit left has anything in the window, it goes on with the one that has least in common with others.
    Plain lists: a chunk has few units, for which arrays would cost more than they save.
    """

    def __init__(self, ptr: IntArray, chunk: IntArray, bytes: IntArray, capacity: int, rarity: float):
        num_units = len(ptr) - 1
        unit = np.repeat(np.arange(num_units), np.diff(ptr))
        degree = np.bincount(chunk, minlength=len(bytes))
        total = np.bincount(unit, bytes[chunk], num_units)
        connected = np.bincount(unit, bytes[chunk] * (degree[chunk] - 1.0), num_units)
        weight = np.where(degree <= _HOT, bytes / np.maximum(1, degree - 1) ** rarity, 0.0)
        self._chunks = _as_lists(chunk, ptr)
        self._units = _as_lists(unit[np.argsort(chunk, kind="stable")], np.append(0, np.cumsum(degree)))
        self._left: list[int] = degree.tolist()
        self._bytes: list[int] = bytes.tolist()
        self._weight: list[float] = weight.tolist()
        self._part: list[float] = (1 / np.maximum(total, 1)).tolist()
        self._loneliest_first: list[int] = np.argsort(connected, kind="stable").tolist()
        self._capacity = capacity
        self._near = [0.0] * num_units  # weight of each unit's chunks in the window
        self._done = [False] * num_units
        self._heap: list[tuple[float, int]] = []  # (-share, unit); outdated shares are corrected when met
        self._window: OrderedDict[int, None] = OrderedDict()  # chunks, least recent first
        self._used = 0

    def order(self) -> IntArray:
        found = []
        lonely = iter(self._loneliest_first)
        for _ in range(len(self._done)):
            unit = self._nearest()
            if unit is None:
                unit = next(unit for unit in lonely if not self._done[unit])
            found.append(unit)
            self._done[unit] = True
            for chunk in self._chunks[unit]:
                self._use(chunk)
        return np.array(found, dtype=np.int64)

    def _nearest(self) -> int | None:
        while self._heap:
            share, unit = heapq.heappop(self._heap)
            if self._done[unit] or self._near[unit] <= 0:
                continue
            current = -self._near[unit] * self._part[unit]
            if share < current:  # chunks have left the window since
                heapq.heappush(self._heap, (current, unit))
                continue
            return unit
        return None

    def _use(self, chunk: int) -> None:
        self._left[chunk] -= 1
        if chunk in self._window:
            self._window.move_to_end(chunk)
            if self._left[chunk] == 0:
                self._drop(chunk)
        elif self._left[chunk]:
            self._window[chunk] = None
            self._used += self._bytes[chunk]
            self._approach(chunk)
            while self._used > self._capacity:
                self._drop(next(iter(self._window)))

    def _approach(self, chunk: int) -> None:
        weight, near, part, done = self._weight[chunk], self._near, self._part, self._done
        if not weight:
            return
        for unit in self._units[chunk]:
            if not done[unit]:
                near[unit] += weight
                heapq.heappush(self._heap, (-near[unit] * part[unit], unit))

    def _drop(self, chunk: int) -> None:
        del self._window[chunk]
        self._used -= self._bytes[chunk]
        for unit in self._units[chunk] if self._weight[chunk] else ():
            if not self._done[unit]:
                self._near[unit] -= self._weight[chunk]


def _as_lists(values: IntArray, ptr: IntArray) -> list[list[int]]:
    flat, bounds = values.tolist(), ptr.tolist()
    return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]


def _shared_with_previous(passages: FreeItems, row: IntArray) -> IntArray:
    """[rows] how many leading chunks each row has in common with the row before it in this order."""
    shared = np.zeros(len(row), dtype=np.int64)
    count = np.diff(passages.ptr)[row]
    start = passages.ptr[row]
    alike = np.flatnonzero(passages.lead[row[1:]] == passages.lead[row[:-1]]) + 1
    depth = 0
    while len(alike):
        alike = alike[(count[alike] > depth) & (count[alike - 1] > depth)]
        same = passages.item[start[alike] + depth] == passages.item[start[alike - 1] + depth]
        alike = alike[same]
        shared[alike] += 1
        depth += 1
    return shared


def _arranged(passages: FreeItems, chosen: FieldOrder) -> FreeItems:
    start = np.repeat(chosen.ptr[:-1], np.diff(chosen.ptr))
    return FreeItems(passages.ptr, passages.item[start + chosen.order], passages.length, passages.lead)


def _ranges(start: IntArray, end: IntArray) -> IntArray:
    """start[0] .. end[0] - 1, start[1] .. end[1] - 1, ..."""
    count = end - start
    index: IntArray = np.arange(int(count.sum())) + np.repeat(start - (np.cumsum(count) - count), count)
    return index
