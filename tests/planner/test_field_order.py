from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner.field_order import (
    FieldOrder,
    FreeItems,
    _most_saved,
    choose_order,
    estimate_reorder_gain,
    intern_items,
    saved_length,
)
from batchllm.planner.field_search import UNSHARED, Rule, Sets, search

Rows = Sequence[Sequence[int]]


def items_of(
    rows: Rows, length: Sequence[int], lead: Sequence[int] | None = None, columns: bool = False
) -> FreeItems:
    ptr = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64)
    item = np.array([item for row in rows for item in row], dtype=np.int64)
    leads = np.zeros(len(rows)) if lead is None else np.array(lead)
    return FreeItems(ptr, item, np.array(length, dtype=np.int64), leads.astype(np.int64), columns)


def arranged(rows: Rows, order: FieldOrder) -> list[tuple[int, ...]]:
    return [tuple(row[position] for position in order.of(number)) for number, row in enumerate(rows)]


def trie_saving(rows: Rows, length: Sequence[int], lead: Sequence[int]) -> int:
    """What the rows have in common, from a trie of Python tuples."""
    below: dict[tuple[int, ...], int] = {}
    for row, before in zip(rows, lead):
        for end in range(1, len(row) + 1):
            node = (before, *row[:end])
            below[node] = below.get(node, 0) + 1
    return sum(length[node[-1]] * (count - 1) for node, count in below.items())


def most_saving(rows: Rows, length: Sequence[int], lead: Sequence[int]) -> int:
    every = itertools.product(*(set(itertools.permutations(row)) for row in rows))
    return max(trie_saving(orders, length, lead) for orders in every)


@st.composite
def lists(draw: st.DrawFn, most_rows: int = 4, most_items: int = 3, numbers: int = 6) -> FreeItems:
    row = st.lists(st.integers(0, numbers - 1), max_size=most_items)
    rows = draw(st.lists(row, min_size=1, max_size=most_rows))
    lead = draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    length = draw(st.lists(st.integers(0, 50), min_size=numbers, max_size=numbers))
    return items_of(rows, length, lead)


@st.composite
def tables(draw: st.DrawFn, most_rows: int = 4, columns: int = 3) -> FreeItems:
    """Column j holds the numbers 3j .. 3j + 2."""
    row = st.tuples(*(st.integers(3 * column, 3 * column + 2) for column in range(columns)))
    rows = draw(st.lists(row, min_size=1, max_size=most_rows))
    length = draw(st.lists(st.integers(0, 50), min_size=3 * columns, max_size=3 * columns))
    return items_of(rows, length, columns=True)


def rows_of(items: FreeItems) -> list[list[int]]:
    return [items.item[begin:end].tolist() for begin, end in itertools.pairwise(items.ptr.tolist())]


def test_two_pairs_save_more_than_the_best_pair() -> None:
    """Rows 1 and 3 have most in common, and would leave nothing to rows 0 and 2."""
    rows = [(0, 3, 6), (0, 4, 6), (1, 3, 7), (1, 4, 7)]
    length = [0, 5, 0, 0, 6, 0, 5, 0, 0]
    for columns in (True, False):
        assert choose_order(items_of(rows, length, columns=columns)).gain.saved == 10


@settings(max_examples=300, deadline=None)
@given(st.one_of(lists(), tables()))
def test_against_all_orders(items: FreeItems) -> None:
    rows, length, lead = rows_of(items), items.length.tolist(), items.lead.tolist()
    order = choose_order(items)
    chosen = arranged(rows, order)
    assert [sorted(row) for row in chosen] == [sorted(row) for row in rows]
    given_saving, best = trie_saving(rows, length, lead), most_saving(rows, length, lead)
    assert given_saving <= order.gain.saved <= best
    assert order.gain.saved_as_given <= given_saving  # repeated items in a row count as different ones
    assert trie_saving(chosen, length, lead) >= order.gain.saved
    assert 3 * order.gain.saved >= 2 * best
    assert order.gain.total == sum(length[item] for row in rows for item in row)
    if all(len(set(row)) == len(row) for row in rows):
        assert _most_saved(items) >= best


@settings(max_examples=300, deadline=None)
@given(st.one_of(lists(12, 6, 12), tables(12, 4)))
def test_an_estimate_is_less_by_a_hundredth_at_most(items: FreeItems) -> None:
    gain, estimate = choose_order(items).gain, estimate_reorder_gain(items)
    assert gain.saved - 0.01 * gain.total <= estimate.saved <= gain.saved
    assert (estimate.total, estimate.saved_as_given) == (gain.total, gain.saved_as_given)


def test_no_search_where_the_given_order_cannot_be_beaten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document first, then questions of which one in a hundred comes twice."""
    monkeypatch.setattr("batchllm.planner.field_order.search", None)
    rows = [[row % 10, 10 + row % 297] for row in range(300)]
    assert choose_order(items_of(rows[:200], [500] * 10 + [40] * 297)).gain.gain == 0
    assert estimate_reorder_gain(items_of(rows, [500] * 10 + [40] * 297)).gain == 0


def test_usually_the_best() -> None:
    generator, shares = np.random.default_rng(0), []
    for _ in range(100):
        rows = [generator.choice(6, 3, replace=False).tolist() for _ in range(4)]
        length = generator.integers(1, 100, 6).tolist()
        best = most_saving(rows, length, [0] * 4)
        shares.append(choose_order(items_of(rows, length)).gain.saved / best)
    assert np.mean(shares) > 0.99


@settings(max_examples=100, deadline=None)
@given(st.one_of(lists(12, 6, 12), tables(12, 4)), st.randoms(use_true_random=False))
def test_shuffled_rows_get_the_same_orders(items: FreeItems, random: object) -> None:
    rows, length, lead = rows_of(items), items.length.tolist(), items.lead.tolist()
    shuffle = list(range(len(rows)))
    random.shuffle(shuffle)  # type: ignore[attr-defined]
    order = choose_order(items)
    shuffled_rows = [rows[i] for i in shuffle]
    shuffled = choose_order(items_of(shuffled_rows, length, [lead[i] for i in shuffle], items.columns))
    assert shuffled.gain == order.gain
    expected = [arranged(rows, order)[i] for i in shuffle]
    assert arranged(shuffled_rows, shuffled) == expected


@settings(max_examples=200, deadline=None)
@given(lists(10, 5, 8))
def test_saved_length_is_that_of_the_trie(items: FreeItems) -> None:
    rows = [list(dict.fromkeys(row)) for row in rows_of(items)]
    length, lead = items.length.tolist(), items.lead.tolist()
    assert saved_length(items_of(rows, length, lead)) == trie_saving(rows, length, lead)


@settings(max_examples=100, deadline=None)
@given(lists(12, 6, 10), st.sampled_from([0, 2, 3, 100]), st.sampled_from([0.0, 0.05, 1.0]))
def test_places_are_the_same_for_all_who_share(items: FreeItems, rare: int, regret: float) -> None:
    """Whatever the rule, a place is given only to items that another row has at the same place."""
    rows = [sorted(set(row)) for row in rows_of(items)]
    table = items_of(rows, items.length.tolist(), items.lead.tolist())
    row = np.repeat(np.arange(len(rows)), np.diff(table.ptr))
    sets = Sets(row, table.item, table.length, table.lead)
    place = search(sets, Rule(table.length.astype(float), rare, regret))
    placed = list(zip(table.lead[row], table.item, place))
    assert all(placed.count(entry) > 1 for entry in placed if entry[2] != UNSHARED)


def test_an_order_without_gain_is_the_given_one() -> None:
    items = items_of([[2, 0], [2, 1], [5, 4]], [10] * 6)
    order = choose_order(items)
    assert order.order.tolist() == [0, 1] * 3
    assert order.gain.gain == 0
    assert order.gain.saved == 10
    for rows in ([], [[]], [[1, 2]], [[], []]):
        assert choose_order(items_of(rows, [1, 1, 1])).gain.gain == 0


def test_functional_dependencies() -> None:
    """A product has one long description: its number is short, and goes first because of what comes with it."""
    generator = np.random.default_rng(1)
    product, shop = generator.integers(0, 30, 500), generator.integers(0, 12, 500)
    rows = np.stack([np.arange(500), 500 + shop, 512 + product, 542 + product], axis=1).tolist()
    length = [6] * 500 + [40] * 12 + [4] * 30 + [30] * 30
    order = choose_order(items_of(rows, length, columns=True))
    best = sum(length[item] for row in rows for item in row[2:]) - 30 * 34
    assert order.gain.saved >= best
    assert all(set(row[:2]) & set(range(512, 572)) for row in arranged(rows, order)[:10])


def test_weight_of_rows_that_share_many_items() -> None:
    """Pairs of rows with all items in common, and one item that everybody has."""
    rows = [[99, *range(10 * pair, 10 * pair + 5), 90 + side] for pair in range(8) for side in range(2)]
    order = choose_order(items_of([row[::-1] for row in rows], [10] * 100))
    assert order.gain.saved == 10 * 15 + 8 * 50
    assert estimate_reorder_gain(items_of([row[::-1] for row in rows], [10] * 100)) == order.gain


def test_interning_ignores_the_order_of_rows() -> None:
    hashes = np.array([9, 4, 2**63, 4], dtype=np.uint64)
    lead = np.array([7, 3], dtype=np.uint64)
    items = intern_items(hashes, np.array([1, 2, 3, 2]), np.array([0, 2, 4]), lead, columns=True)
    assert items.item.tolist() == [1, 0, 2, 0]
    assert items.length.tolist() == [2, 1, 3]
    assert items.lead.tolist() == [1, 0]


@pytest.mark.parametrize("columns", [True, False])
def test_many_rows(columns: bool) -> None:
    """20,000 rows of six items take about 2 s; work per row in Python would show. (A million rows of ten: see docs.)"""
    generator = np.random.default_rng(2)
    rows = generator.zipf(1.3, (20_000, 6)) % 5_000
    if columns:
        rows = rows + 5_000 * np.arange(6)
    length = generator.integers(1, 500, 30_000)
    items = FreeItems(np.arange(20_001) * 6, rows.ravel(), length, np.zeros(20_000, dtype=np.int64), columns)
    gain = choose_order(items).gain
    assert gain.saved > gain.saved_as_given


def test_equal_pairs_are_not_merged_one_by_one() -> None:
    """A hundred rows that share one item each with a hundred others: every pair is equal."""
    rows = [[min(a, b) * 20 + max(a, b) for b in range(20) if b != a] for a in range(20)]
    order = choose_order(items_of(rows, [7] * 400))
    assert order.gain.saved == 10 * 7  # each row shares one item with one other row
