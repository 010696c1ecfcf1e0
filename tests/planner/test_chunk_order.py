"""Orders for chunk reuse: always permutations, never worse than given, and what they load is what is said."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner.chunk_order import ReuseOrder, chunk_accesses, order_for_reuse
from batchllm.planner.field_order import FreeItems
from batchllm.planner.memory_prices import fewest_loaded_bytes


def table(rows: list[list[int]], bytes: list[int], lead: list[int] | None = None) -> FreeItems:
    ptr = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64)
    item = np.array([item for row in rows for item in row], dtype=np.int64)
    return FreeItems(ptr, item, np.array(bytes, np.int64), np.array(lead or [0] * len(rows), np.int64))


def accessed(rows: list[list[int]], order: list[int], lead: list[int] | None = None) -> list[int]:
    """The chunks used, by hand: what a row shares with the beginning of the row before is not used again."""
    used: list[int] = []
    before: list[int] = []
    lead_before = None
    for row in order:
        chunks, lead_here = rows[row], lead[row] if lead else 0
        shared = 0
        if lead_here == lead_before:
            while shared < min(len(chunks), len(before)) and chunks[shared] == before[shared]:
                shared += 1
        used += chunks[shared:]
        before, lead_before = chunks, lead_here
    return used


def arranged(rows: list[list[int]], found: ReuseOrder) -> list[list[int]]:
    if found.passages is None:
        return rows
    return [[row[place] for place in found.passages.of(number)] for number, row in enumerate(rows)]


tables = st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=8)


@settings(max_examples=150, deadline=None)
@given(tables, st.lists(st.integers(0, 1), min_size=8, max_size=8), st.integers(0, 40), st.booleans())
def test_orders_are_never_worse(rows: list[list[int]], lead: list[int], capacity: int, may_reorder: bool):
    lead = lead[: len(rows)]
    passages = table(rows, [3, 1, 4, 1, 5, 9, 2], lead)
    found = order_for_reuse(passages, passages.length, capacity, may_reorder=may_reorder)
    assert sorted(found.row.tolist()) == list(range(len(rows)))
    assert found.loaded <= found.loaded_as_given
    new_rows = arranged(rows, found)
    for given_row, new_row in zip(rows, new_rows):
        assert sorted(given_row) == sorted(new_row)
        assert may_reorder or given_row == new_row
    used = np.array(accessed(new_rows, found.row.tolist(), lead), dtype=np.int64)
    again = chunk_accesses(table(new_rows, [3, 1, 4, 1, 5, 9, 2], lead), found.row, passages.length)
    assert again.item.tolist() == used.tolist()
    assert found.loaded == fewest_loaded_bytes(again, capacity)


def test_rows_with_the_same_chunks_come_together():
    topics = [[topic * 4 + chunk for chunk in range(4)] for topic in range(6)]
    rng = np.random.default_rng(0)
    rows = [rng.permutation(topics[row % 6]).tolist() for row in range(60)]
    passages = table(rows, [10] * 24)
    found = order_for_reuse(passages, passages.length, 40)
    assert found.loaded == 240  # every chunk once
    assert found.loaded_as_given > 1000
    assert all(len({row % 6 for row in found.row[i : i + 10]}) == 1 for i in range(0, 60, 10))


def test_a_shared_beginning_is_used_once():
    rows = [[0, 1, 2], [0, 1, 3], [0, 1, 2]]
    passages = table(rows, [10, 10, 10, 10])
    found = order_for_reuse(passages, passages.length, 0)
    assert found.loaded == 40  # 0 1 2, the same row again, then 3
    assert found.loaded_as_given == 50


def test_passages_are_moved_only_where_allowed():
    rows = [[0, 1], [2, 0], [0, 3], [4, 0]]
    passages = table(rows, [10] * 5)
    assert order_for_reuse(passages, passages.length, 0).passages is None
    found = order_for_reuse(passages, passages.length, 0, may_reorder=True)
    assert found.passages is not None
    assert all(row[0] == 0 for row in arranged(rows, found))
    assert found.loaded == 50


def test_no_rows_and_rows_without_chunks():
    empty = order_for_reuse(table([], []), np.zeros(0, np.int64), 10, may_reorder=True)
    assert empty.row.tolist() == [] and empty.saved_share == 0.0
    assert order_for_reuse(table([[], []], []), np.zeros(0, np.int64), 10).row.tolist() == [0, 1]
