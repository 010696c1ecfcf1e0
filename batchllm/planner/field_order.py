"""In which order a row's free items should stand, so that rows have as much of their beginning in common as possible.

Items are what the user marked as free: the values of some columns, or the elements of a list. A row's prompt
starts to be shared with its first item and stops at the first one that differs, so what counts is the trie of
all rows' item sequences. Every item below a node of that trie but the first costs nothing:

    saved = sum over trie nodes of length(item) * (rows below - 1)

Finding the best order is NP-hard. Two greedy searches (`field_search`) run with several settings, the order of
each is measured exactly, and the best is kept; the given order takes part, so the result is never worse.

Lengths are in whatever unit the caller has, bytes of text for one: only their proportions matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray
from batchllm.planner.field_search import UNSHARED, Rule, Sets, search

_SLOW_ENTRIES = 3_000_000  # beyond: fewer settings are tried
_PAIRS = 2_000_000  # pairs of rows that may be compared in the bottom-up search
_REGRET = 0.05
_FEW_ENTRIES = 100_000  # up to here one more search costs next to nothing
_STRONG_REGRET = 0.5


@dataclass(frozen=True)
class FreeItems:
    """The free items of every row in the given order. Rows are CSR: row i has `item[ptr[i]:ptr[i + 1]]`.

    An item is a number from 0; the same number means the same text. Numbers break ties, so they must not depend
    on the order of the rows (`intern_items` sees to that). `lead[i]`: rows can share items only if what stands
    before them in the prompt, of which this is the number, is the same.
    """

    ptr: IntArray  # [rows + 1]
    item: IntArray  # [entries]
    length: IntArray  # [items]
    lead: IntArray  # [rows]
    columns: bool = False  # the j-th item of every row belongs to the j-th column: all rows have as many

    @property
    def num_rows(self) -> int:
        return len(self.ptr) - 1


@dataclass(frozen=True)
class ReorderGain:
    """In the unit of the lengths."""

    total: int  # of all items of all rows
    saved_as_given: int  # of these, in a beginning that another row has as well
    saved: int  # the same in the chosen order; not less

    @property
    def gain(self) -> int:
        return self.saved - self.saved_as_given

    @property
    def gained_share(self) -> float:
        """Of all items, 0 to 1."""
        return self.gain / self.total if self.total else 0.0


@dataclass(frozen=True)
class FieldOrder:
    """`order[ptr[i]:ptr[i + 1]]`: the given positions of row i's items, in the order in which they should stand."""

    ptr: IntArray
    order: IntArray
    gain: ReorderGain

    def of(self, row: int) -> list[int]:
        positions: list[int] = self.order[self.ptr[row] : self.ptr[row + 1]].tolist()
        return positions


def choose_order(items: FreeItems, good_enough: float = 0.0) -> FieldOrder:
    """The best order found. The same table gives the same result, whichever way its rows are shuffled.

    `good_enough`: the search ends when no order can save more than this share of all items beyond the best one found.
    """
    items = _with_repeats(items)
    position = _positions(items.ptr)
    given, most = saved_length(items), _most_saved(items)
    total = int(items.length[items.item].sum())
    best, best_saved = position, given
    candidates = _candidates(items, position)
    while most - best_saved > good_enough * total and (order := next(candidates, None)) is not None:
        saved = saved_length(items, order)
        if saved > best_saved:
            best, best_saved = order, saved
    return FieldOrder(items.ptr, best, ReorderGain(total, given, best_saved))


def estimate_reorder_gain(items: FreeItems) -> ReorderGain:
    """What `choose_order` would save, for a report: to a hundredth of all items, in a fraction of the time."""
    return choose_order(items, good_enough=0.01).gain


def _most_saved(items: FreeItems) -> int:
    """What no order can exceed: every item computed once for each lead. Rows are sets."""
    lead = np.repeat(items.lead, np.diff(items.ptr))
    key, count = np.unique(lead * max(1, len(items.length)) + items.item, return_counts=True)
    return int((items.length[key % max(1, len(items.length))] * (count - 1)).sum())


def saved_length(items: FreeItems, order: IntArray | None = None) -> int:
    """Exactly what rows with these item sequences have in common, each node of their trie counted once."""
    start, count = items.ptr[:-1], np.diff(items.ptr)
    row, group = np.arange(items.num_rows), items.lead
    saved, depth, spread = 0, 0, len(items.length)
    while len(row):
        longer = count[row] > depth
        row, group = row[longer], group[longer]
        entry = start[row] + depth
        if order is not None:
            entry = start[row] + order[entry]
        item = items.item[entry]
        _, first, group, size = np.unique(
            group * spread + item, return_index=True, return_inverse=True, return_counts=True
        )
        saved += int((items.length[item[first]] * (size - 1)).sum())
        shared = size[group] > 1
        row, group = row[shared], group[shared]
        depth += 1
    return saved


def intern_items(
    hashes: NDArray[np.uint64], lengths: IntArray, ptr: IntArray, lead: NDArray[np.uint64], *, columns: bool
) -> FreeItems:
    """Numbers instead of 64-bit hashes of items and of what leads up to them, by the order of the hashes.

    Two texts with one hash would make the order a worse one and nothing else.
    """
    distinct, first, item = np.unique(hashes, return_index=True, return_inverse=True)
    length = lengths[first] if len(distinct) else np.empty(0, np.int64)
    lead_number = np.unique(lead, return_inverse=True)[1]
    return FreeItems(
        ptr, item.astype(np.int64), length.astype(np.int64), lead_number.astype(np.int64), columns
    )


def _candidates(items: FreeItems, position: IntArray) -> Iterator[IntArray]:
    sets = _distinct_sets(items)
    if items.columns:
        yield _by_column(items)
    for rule in _rules(items, sets.sets):
        yield _orders(items, position, sets, search(sets.sets, rule))


def _rules(items: FreeItems, sets: Sets) -> Iterator[Rule]:
    length = items.length.astype(np.float64)
    reach = _reach(items) if items.columns else length
    rare = _rare_count(sets) if len(sets.item) <= _SLOW_ENTRIES else 0
    for worth in (reach, length) if items.columns else (length,):
        yield Rule(worth, 0, 0.0)
        if rare > 1:
            yield Rule(worth, rare, 0.0)
            yield Rule(worth, rare, _REGRET)
            if len(sets.item) <= _FEW_ENTRIES:  # a pair that takes each other from better ones is left alone
                yield Rule(worth, rare, _STRONG_REGRET)


def _rare_count(sets: Sets) -> int:
    """The largest count up to which items are rare: their pairs of rows are few enough to look at all of them."""
    count = np.sort(np.bincount(sets.item))
    count = count[count > 1]
    pairs = np.cumsum(count * (count - 1) // 2)
    fitting = int(np.searchsorted(pairs, _PAIRS, side="right"))
    if fitting == len(count):
        return int(count[-1]) if fitting else 0
    return int(count[fitting]) - 1  # all items with one count, or none of them


def _reach(items: FreeItems) -> NDArray[np.float64]:
    """Length of each item with all that comes with it for nothing: values that its rows have in common anyway.

    This is how functional dependencies between columns (a product has one price) come in.
    """
    table = items.item.reshape(items.num_rows, -1)
    reach = items.length.astype(np.float64)
    first_row = np.empty(len(items.length), dtype=np.int64)
    varies = np.zeros(len(items.length), dtype=np.bool_)
    for number, column in enumerate(table.T):
        first_row[column] = np.arange(len(column))
        distinct = np.unique(column)
        representative = first_row[column]
        for other in np.delete(table, number, axis=1).T:
            varies[distinct] = False
            varies[column[other[representative] != other]] = True
            fixed = distinct[~varies[distinct]]
            reach[fixed] += items.length[other[first_row[fixed]]]
    return reach


def _by_column(items: FreeItems) -> IntArray:
    """One order of the columns for all rows: those that repeat most, by length, first."""
    table = items.item.reshape(items.num_rows, -1)
    worth = []
    for column in table.T:
        distinct, count = np.unique(column, return_counts=True)
        worth.append(int((items.length[distinct] * (count - 1)).sum()))
    order = np.argsort(-np.array(worth), kind="stable")
    return np.tile(order, items.num_rows)


@dataclass(frozen=True)
class _DistinctSets:
    """Rows with the same items in any order are one set: they share everything, whatever is decided."""

    sets: Sets
    entry: IntArray  # [entries] entries of the table, row by row, the items of a row ascending
    set_of_row: IntArray  # [rows]
    rows_of_set: IntArray  # [sets] number of rows


def _distinct_sets(items: FreeItems) -> _DistinctSets:
    count = np.diff(items.ptr)
    row = np.repeat(np.arange(items.num_rows), count)
    entry = np.argsort(row * len(items.length) + items.item, kind="stable")
    item = items.item[entry]
    digest = _row_digests(items, row, item)
    _, first, set_of_row, rows_of_set = np.unique(
        digest, return_index=True, return_inverse=True, return_counts=True
    )
    if not _equal_rows(
        items, item, first[set_of_row]
    ):  # two different rows with one digest: next to impossible
        first = set_of_row = np.arange(items.num_rows)
        rows_of_set = np.ones(items.num_rows, dtype=np.int64)
    chosen = _entries_of(items.ptr, first)
    set_row = np.repeat(np.arange(len(first)), count[first])
    sets = Sets(set_row, item[chosen], items.length, items.lead[first])
    return _DistinctSets(sets, entry, set_of_row, rows_of_set)


def _row_digests(items: FreeItems, row: IntArray, item: IntArray) -> NDArray[np.uint64]:
    """64 bits over a row's items, whatever their order, and its lead."""
    digest = _mixed(items.lead.astype(np.uint64) + np.uint64(len(items.length)))
    np.add.at(digest, row, _mixed(item.astype(np.uint64)))
    return digest


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64: every bit of the number decides over every bit of the result."""
    value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _equal_rows(items: FreeItems, item: IntArray, other: IntArray) -> bool:
    """Whether each row has the lead and the sorted items of the other row named for it."""
    count = np.diff(items.ptr)
    if not (np.array_equal(count, count[other]) and np.array_equal(items.lead, items.lead[other])):
        return False
    return np.array_equal(item, item[_entries_of(items.ptr, other)])


def _orders(items: FreeItems, position: IntArray, sets: _DistinctSets, place: IntArray) -> IntArray:
    """From the place of each entry of each set to the order of each row.

    Entries with one place stand in item order, and those that nobody shares, the last ones, as given. (In rows
    that are the same set nothing is left over: they share everything, also with each other.)
    """
    count = np.diff(items.ptr)
    set_ptr = np.append(0, np.cumsum(np.bincount(sets.sets.row, minlength=len(sets.rows_of_set))))
    place = place[_entries_of(set_ptr, sets.set_of_row)]
    last = int(place.max(initial=0)) + 1
    unshared = place == UNSHARED
    place = np.where(unshared, last, place)
    alone = np.repeat(sets.rows_of_set[sets.set_of_row] == 1, count)
    tie = np.where(unshared & alone, position[sets.entry], position)
    row = np.repeat(np.arange(items.num_rows), count)
    key = (row * (last + 1) + place) * int(count.max(initial=1)) + tie
    return position[sets.entry][np.argsort(key, kind="stable")]


def _with_repeats(items: FreeItems) -> FreeItems:
    """The second, third ... occurrence of an item in a row as items of their own: rows become sets."""
    row = np.repeat(np.arange(items.num_rows), np.diff(items.ptr))
    key = row * max(1, len(items.length)) + items.item
    by_item = np.argsort(key, kind="stable")
    new = np.append(True, np.diff(key[by_item]) != 0)[: len(key)]
    if new.all():
        return items
    index = np.arange(len(key))
    occurrence = np.empty(len(key), dtype=np.int64)
    occurrence[by_item] = index - np.maximum.accumulate(np.where(new, index, 0))
    numbers, item = np.unique(occurrence * len(items.length) + items.item, return_inverse=True)
    length = items.length[numbers % len(items.length)]
    return FreeItems(items.ptr, item.astype(np.int64), length, items.lead, items.columns)


def _positions(ptr: IntArray) -> IntArray:
    """0, 1, 2 ... within each row."""
    index: IntArray = np.arange(ptr[-1]) - np.repeat(ptr[:-1], np.diff(ptr))
    return index


def _entries_of(ptr: IntArray, rows: IntArray) -> IntArray:
    """The indices of the entries of these rows, one row after another."""
    count = ptr[rows + 1] - ptr[rows]
    index: IntArray = np.arange(int(count.sum())) + np.repeat(ptr[rows] - (np.cumsum(count) - count), count)
    return index
