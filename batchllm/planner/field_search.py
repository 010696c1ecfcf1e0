"""Two greedy searches for an order of items in which many rows begin alike; `field_order` compares their results.

*Top down*, as Greedy Group Recursion (Liu et al., arXiv 2403.05821): the item that saves most goes to the front
of all rows that have it, the next best one of the other rows, and so on; then the same again among the rows
behind each front item. Instead of one item at a time, every item that is the best one for all of its rows is
taken at once: these would be taken anyway, since taking others only makes an item worse.

*Bottom up*, for items that few rows have: every row is a cluster; the two clusters that have most in common are
merged into one that has only what both had, again and again. A merge saves exactly what is left in common.
Again every pair of clusters that are the best for each other is merged at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

UNSHARED = -1
_EXACT_ROUNDS = 40  # of picking items in one level; what is left by then is decided by majority
_MERGE_ROUNDS = 200
_SCORE_BITS = 62
_MOST_PAIRS = 8_000_000  # compared in one round of merging; beyond, the most frequent items do not count


@dataclass(frozen=True)
class Sets:
    """Distinct sets of items. Entries are sorted by row, then item; every entry of a row is another item."""

    row: IntArray  # [entries]
    item: IntArray  # [entries]
    length: IntArray  # [items]
    group: IntArray  # [rows] only rows of one group can share


class Rule(NamedTuple):
    """How a search decides."""

    worth: FloatArray  # [items] what one row saves by an item, for the choice in the top-down search
    rare: int  # items of at most so many rows of a group are left to the bottom-up search
    regret: float  # of a merge: for each unit of length that both clusters could have shared with others


class _Entries(NamedTuple):
    """Some of the entries, in their order."""

    at: IntArray  # into the entries of the sets
    row: IntArray
    item: IntArray

    def where(self, chosen: BoolArray) -> _Entries:
        return _Entries(self.at[chosen], self.row[chosen], self.item[chosen])


def search(sets: Sets, rule: Rule) -> IntArray:
    """The place of each entry in its row: 0, 1, 2 ... with gaps; equal places by item; UNSHARED comes last."""
    place = np.full(len(sets.item), UNSHARED, dtype=np.int64)
    repeated = np.bincount(sets.item, minlength=len(sets.length)) > 1
    entries = _Entries(np.arange(len(sets.item)), sets.row, sets.item).where(repeated[sets.item])
    group, depth = sets.group.copy(), 0
    left: list[_Entries] = []
    names = int(group.max(initial=0)) + 1
    while len(entries.row):
        code, count, entries = _shared_items(sets, entries, group)
        if not len(entries.row):
            break
        chosen = _pick(sets, rule, entries, code, count, group)
        taken = chosen[entries.row] == code
        place[entries.at[taken]] = depth
        goes_on = chosen[entries.row] >= 0
        left.append(entries.where(~goes_on))
        moving = np.flatnonzero(chosen >= 0)
        fronts, front = np.unique(chosen[moving], return_inverse=True)
        group[moving] = names + front
        names += len(fronts)
        entries = entries.where(goes_on & ~taken)
        depth += 1
    if rule.rare and left:
        _merge(sets, rule, _joined(left), group, place, depth)
    return place


def _joined(parts: list[_Entries]) -> _Entries:
    """In the order of the entries."""
    whole = _Entries(*(np.concatenate(arrays) for arrays in zip(*parts)))
    order = np.argsort(whole.at)
    return _Entries(whole.at[order], whole.row[order], whole.item[order])


def _shared_items(sets: Sets, entries: _Entries, group: IntArray) -> tuple[IntArray, IntArray, _Entries]:
    """A code for each (group, item) that more than one row has, its count, and the entries that have a code."""
    key = group[entries.row] * len(sets.length) + entries.item
    _, code, count = np.unique(key, return_inverse=True, return_counts=True)
    kept = count > 1
    number = np.cumsum(kept) - 1
    shared = kept[code]
    return number[code[shared]], count[kept], entries.where(shared)


def _pick(
    sets: Sets, rule: Rule, entries: _Entries, code: IntArray, count: IntArray, group: IntArray
) -> IntArray:
    """[rows] the code of the item that each row begins with, -1: none that is shared."""
    item = np.empty(len(count), dtype=np.int64)
    item[code] = entries.item
    rows_of = np.bincount(group)
    of_group = np.empty(len(count), dtype=np.int64)
    of_group[code] = rows_of[group[entries.row]]
    everywhere = count == of_group  # costs no other item a row
    chosen = np.full(len(group), -1, dtype=np.int64)
    row, count = entries.row, count.copy()
    for turn in range(_EXACT_ROUNDS * 2):
        pickable = (count > max(1, rule.rare)) | (everywhere & (count > 1))
        live = pickable[code] & (chosen[row] < 0)
        row, code = row[live], code[live]
        if not len(row):
            break
        key = _ranking(rule.worth[item] * (count - 1), everywhere, len(count))
        first = np.flatnonzero(np.diff(row, prepend=-1))
        best = np.maximum.reduceat(key[code], first)
        winner = best & ((1 << len(count).bit_length()) - 1)
        votes = np.bincount(winner, minlength=len(count))
        settled = votes == count if turn < _EXACT_ROUNDS else votes > 1
        decided = settled[winner]
        if not decided.any():
            break
        chosen[row[first[decided]]] = winner[decided]
        gone = chosen[row] >= 0
        count -= np.bincount(code[gone], minlength=len(count))
    return chosen


def _ranking(score: FloatArray, everywhere: BoolArray, codes: int) -> IntArray:
    """Whole numbers in the order of the scores, ties by code; the code is in the lower bits."""
    bits = codes.bit_length()
    most = 1 << (_SCORE_BITS - bits)
    scale = min(16.0, (most - 1) / max(1.0, float(score.max(initial=0.0))))
    whole = np.where(everywhere, most - 1, (score * scale).astype(np.int64))
    key: IntArray = (np.minimum(whole, most - 1) << bits) | np.arange(codes)
    return key


class _Pairs(NamedTuple):
    """Pairs of clusters with something in common; a cluster is named by its first row."""

    one: IntArray
    other: IntArray
    common: IntArray  # length of what both have


def _merge(sets: Sets, rule: Rule, entries: _Entries, group: IntArray, place: IntArray, depth: int) -> None:
    """Sets the places of the entries whose items survive merges: the longer they do, the nearer to the front."""
    cluster = np.arange(len(group))
    for turn in range(_MERGE_ROUNDS):
        first = entries.where(cluster[entries.row] == entries.row)
        pairs = _pairs(sets, first, group)
        if not len(pairs.one):
            return
        one, other = _mutual_best(pairs, _weights(sets, rule, first, pairs, len(group)), len(group))
        target = np.arange(len(group))
        target[other] = one
        merged = np.zeros(len(group), dtype=np.bool_)
        merged[one] = merged[other] = True
        survives = _survivors(sets, first.where(merged[first.row]), target)
        cluster = target[cluster]
        at = cluster[entries.row]
        concerned = merged[at]
        kept = np.isin(at * len(sets.length) + entries.item, survives)
        place[entries.at[concerned & kept]] = depth + _MERGE_ROUNDS - turn
        entries = entries.where(~concerned | kept)


def _pairs(sets: Sets, first: _Entries, group: IntArray) -> _Pairs:
    """All pairs, from the entries of each cluster's first row."""
    key = group[first.row] * len(sets.length) + first.item
    order = np.argsort(key, kind="stable")
    row, key = first.row[order], key[order]
    begin = np.flatnonzero(np.diff(key, prepend=-1))
    size = np.diff(begin, append=len(key))
    fitting = np.cumsum(np.sort(size * (size - 1) // 2)) <= _MOST_PAIRS
    size = np.where(size <= np.sort(size)[fitting].max(initial=0), size, 1)
    # Entry j of an item with `size` rows is paired with the later ones.
    rank = np.arange(len(key)) - np.repeat(begin, np.diff(begin, append=len(key)))
    later = np.maximum(np.repeat(size, np.diff(begin, append=len(key))) - 1 - rank, 0)
    one = np.repeat(np.arange(len(key)), later)
    other = one + 1 + np.arange(len(one)) - np.repeat(np.cumsum(later) - later, later)
    length = sets.length[first.item[order[one]]]
    rows = len(group)
    pair, inverse = np.unique(row[one] * rows + row[other], return_inverse=True)
    common = np.bincount(inverse, weights=length, minlength=len(pair)).astype(np.int64)
    useful = common > 0
    return _Pairs(pair[useful] // rows, pair[useful] % rows, common[useful])


def _weights(sets: Sets, rule: Rule, first: _Entries, pairs: _Pairs, rows: int) -> FloatArray:
    """What a merge is worth: what it saves, less what the two give up of what they could share with others."""
    if not rule.regret:
        return pairs.common.astype(np.float64)
    repeated = np.bincount(first.item, minlength=len(sets.length)) > 1
    shareable = np.bincount(first.row, sets.length[first.item] * repeated[first.item], rows)
    given_up = shareable[pairs.one] + shareable[pairs.other] - 2 * pairs.common
    return pairs.common - rule.regret * given_up


def _mutual_best(pairs: _Pairs, weight: FloatArray, rows: int) -> tuple[IntArray, IntArray]:
    """The pairs that are the best one of both clusters. At least the best pair of all is among them."""
    best = np.full(rows, -np.inf)
    np.maximum.at(best, pairs.one, weight)
    np.maximum.at(best, pairs.other, weight)
    top = (weight == best[pairs.one]) & (weight == best[pairs.other])
    one, other = pairs.one[top], pairs.other[top]
    # Ties in an order without pattern: by row number, a set of equal pairs would be a chain, merged one by one.
    scattered = (one * 0x9E3779B1 + other * 0x85EBCA6B) & 0xFFFFFFFF
    rank = np.empty(len(one), dtype=np.int64)
    rank[np.lexsort((other, one, scattered))] = np.arange(len(one))
    first = np.full(rows, -1, dtype=np.int64)
    np.maximum.at(first, one, rank)
    np.maximum.at(first, other, rank)
    mutual = (first[one] == rank) & (first[other] == rank)
    return one[mutual], other[mutual]


def _survivors(sets: Sets, entries: _Entries, target: IntArray) -> IntArray:
    """Keys (cluster, item) of what both clusters of each merge have."""
    key = target[entries.row] * len(sets.length) + entries.item
    distinct, count = np.unique(key, return_counts=True)
    survives: IntArray = distinct[count == 2]
    return survives
