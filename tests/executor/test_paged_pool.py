"""Pages taken and given back in random order: none has two owners, what is stored stays, neighbours are used."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.kv_memory import KvMemory
from batchllm.executor.paged_pool import PagedExtent, PagedPool

PAGE = 4
LAYERS = (LayerKv(2, 3, 5), LayerKv(1, 4, 2))


def make_pool(pages: int) -> PagedPool:
    return PagedPool(LAYERS, pages * PAGE, torch.float32, torch.device("cpu"), PAGE)


def write(pool: PagedPool, extent: PagedExtent, first: int, count: int, mark: float) -> None:
    """Marks slots of an extent in every layer."""
    slots = torch.from_numpy(extent.slots(first, count))
    for buffer in (*pool.keys, *pool.values):
        buffer[slots // PAGE, :, slots % PAGE] = mark


def marks(pool: PagedPool, extent: PagedExtent, count: int) -> set[float]:
    slots = torch.from_numpy(extent.slots(0, count))
    return {
        value
        for buffer in (*pool.keys, *pool.values)
        for value in buffer[slots // PAGE, :, slots % PAGE].unique().tolist()
    }


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_extents_keep_what_is_theirs(seed: int) -> None:
    random = np.random.default_rng(seed)
    pool = make_pool(12)
    held: dict[int, tuple[PagedExtent, int]] = {}
    for mark in range(1, 40):
        action = random.random()
        if held and action < 0.35:
            extent, _ = held.pop(int(random.choice(list(held))))
            pool.free(extent)
        elif held and action < 0.55:
            key = int(random.choice(list(held)))
            extent, tokens = held[key]
            pages_before, more = list(extent.pages), tokens + int(random.integers(1, 9))
            if pool.grow(extent, more):
                assert extent.capacity >= more and list(extent.pages[: len(pages_before)]) == pages_before
                write(pool, extent, tokens, more - tokens, key)
                held[key] = extent, more
            else:
                assert list(extent.pages) == pages_before
        else:
            tokens = int(random.integers(1, 20))
            room = pool.capacity - pool.used
            extent_or_none = pool.allocate(tokens, high=bool(random.random() < 0.5))
            assert (extent_or_none is None) == (room < -(-tokens // PAGE) * PAGE)
            if extent_or_none is not None:
                write(pool, extent_or_none, 0, tokens, mark)
                held[mark] = extent_or_none, tokens
        pool.check_integrity()
        assert pool.used == sum(extent.capacity for extent, _ in held.values()) <= pool.peak
        for key, (extent, tokens) in held.items():
            assert marks(pool, extent, tokens) == {key}


def test_neighbouring_pages_are_used_where_there_are_enough() -> None:
    pool = make_pool(10)
    extents = [pool.allocate(PAGE) for _ in range(10)]
    for index in (1, 4, 5, 6, 9):
        freed = extents[index]
        assert freed is not None
        pool.free(freed)
    run = pool.allocate(3 * PAGE)
    assert run is not None and run.pages.tolist() == [4, 5, 6]
    scattered = pool.allocate(2 * PAGE)
    assert scattered is not None and scattered.pages.tolist() == [1, 9]
    assert pool.allocate(1) is None


def test_shared_nodes_and_leaves_start_at_opposite_ends() -> None:
    pool = make_pool(10)
    leaf, shared = pool.allocate(5), pool.allocate(9, high=True)
    assert leaf is not None and leaf.pages.tolist() == [0, 1]
    assert shared is not None and shared.pages.tolist() == [7, 8, 9]


def test_copies_follow_the_pages() -> None:
    pool = make_pool(8)
    blocked = pool.allocate(PAGE)
    source, target = pool.allocate(3 * PAGE), pool.allocate(3 * PAGE, high=True)
    assert blocked is not None and source is not None and target is not None
    write(pool, target, 0, 3 * PAGE, 9.0)
    for first in range(0, 3 * PAGE, 2):
        write(pool, source, first, 2, float(first))
    pool.copy(source, target, 7)
    assert marks(pool, target, 7) == {0.0, 2.0, 4.0, 6.0}
    assert marks(pool, target, 8) == {0.0, 2.0, 4.0, 6.0, 9.0}, "nothing beyond the copied slots changes"


def test_half_a_page_of_each_extent_counts_as_lost() -> None:
    pool = make_pool(10)
    assert pool.usable(0) == 40 and pool.usable(6) == 40 - 12 and pool.usable(100) == 0


def test_it_is_what_the_scheduler_asks_for() -> None:
    pool: KvMemory = make_pool(3)
    assert pool.capacity == 12 and pool.layers == LAYERS and pool.dtype == torch.float32
