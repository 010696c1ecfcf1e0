"""The KV pool against a plain model of it: whatever is allocated, grown, freed or moved keeps its contents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.kv_pool import Extent, KvPool, bytes_per_token

LAYERS = (LayerKv(2, 4, 4), LayerKv(1, 6, 3))  # the second one stores narrow values padded


def make_pool(capacity: int = 64) -> KvPool:
    return KvPool(KvBuffers.empty(LAYERS, capacity, torch.float32))


class PoolModel:
    """What each extent must hold: one number a slot, written to every layer, key and value."""

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self.contents: dict[Extent, np.ndarray] = {}
        self._next = 1.0

    def fill(self, extent: Extent, first: int = 0) -> None:
        """Writes new numbers into the slots from `first` on."""
        count = extent.capacity - first
        numbers = np.arange(self._next, self._next + count)
        self._next += count
        for buffer in (*self.pool.keys, *self.pool.values):
            stretch = buffer[extent.offset + first : extent.end]
            stretch.copy_(torch.from_numpy(numbers).view(-1, 1, 1).expand_as(stretch))
        old = self.contents.get(extent, np.zeros(0))[:first]
        self.contents[extent] = np.concatenate([old, numbers])

    def check(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used == sum(map(len, self.contents.values()))
        for extent, numbers in self.contents.items():
            assert extent.capacity == len(numbers)
            for buffer in (*self.pool.keys, *self.pool.values):
                stretch = buffer[extent.offset : extent.end].flatten(1)
                assert (stretch == torch.from_numpy(numbers).float()[:, None]).all()


@pytest.mark.parametrize("seed", range(8))
def test_random_use_keeps_contents(seed: int) -> None:
    random = np.random.default_rng(seed)
    pool = make_pool()
    model = PoolModel(pool)
    for _ in range(250):
        extents = list(model.contents)
        chosen = extents[random.integers(len(extents))] if extents else None
        action = random.random()
        if action < 0.45 or chosen is None:
            size = int(random.integers(1, 12))
            extent = pool.allocate(size)
            if extent is None:
                assert largest_gap(pool, extents) < size, "a gap that is large enough was not found"
            else:
                model.fill(extent)
        elif action < 0.75:
            pool.free(chosen)
            del model.contents[chosen]
        elif action < 0.9:
            size = chosen.capacity + int(random.integers(0, 8))
            room = room_after(pool, chosen, extents)
            before = chosen.capacity
            assert pool.grow(chosen, size) == (size <= before + room)
            if chosen.capacity > before:
                model.fill(chosen, before)
        else:
            last = chosen if random.random() < 0.5 else None
            pool.compact(last=last)
            assert max((extent.end for extent in extents), default=0) == pool.used, "a gap was left"
            if last is not None:
                assert last.end == pool.used
                assert pool.grow(last, last.capacity + pool.capacity - pool.used)
                model.fill(last, len(model.contents[last]))
                pool.free(last)
                del model.contents[last]
        model.check()
    assert pool.peak <= pool.capacity


def largest_gap(pool: KvPool, extents: list[Extent]) -> int:
    taken = np.zeros(pool.capacity + 1, dtype=bool)
    taken[-1] = True
    for extent in extents:
        taken[extent.offset : extent.end] = True
    ends = np.flatnonzero(taken)
    return int(np.diff(np.append(-1, ends)).max()) - 1


def room_after(pool: KvPool, extent: Extent, extents: list[Extent]) -> int:
    """Free slots directly behind an extent."""
    following = [other.offset for other in extents if other is not extent and other.offset >= extent.end]
    return min([*following, pool.capacity]) - extent.end


def test_the_whole_capacity_can_be_used_and_no_more() -> None:
    pool = make_pool(10)
    first, second = pool.allocate(6), pool.allocate(4)
    assert first is not None and second is not None
    assert pool.allocate(1) is None
    pool.free(first)
    assert pool.allocate(7) is None
    assert pool.allocate(6) is not None
    assert pool.used == pool.peak == 10


def test_copy_takes_the_leading_slots_of_every_layer() -> None:
    pool = make_pool()
    model = PoolModel(pool)
    source, target = pool.allocate(5), pool.allocate(5)
    assert source is not None and target is not None
    model.fill(source)
    model.fill(target)
    pool.copy(source, target, 3)
    model.contents[target][:3] = model.contents[source][:3]
    model.check()


def test_fresh_slots_are_finite() -> None:
    pool = make_pool(1000)
    assert all(torch.isfinite(buffer).all() for buffer in (*pool.keys, *pool.values))


def test_bytes_per_token_counts_what_is_stored() -> None:
    pool = make_pool(7)
    stored = sum(buffer.numel() * buffer.element_size() for buffer in (*pool.keys, *pool.values))
    assert bytes_per_token(LAYERS, torch.float32) * 7 == stored
