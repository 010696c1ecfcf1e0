"""Eviction against brute force, bounds against what is reachable, policies against each other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner.accesses import AccessSequence, accesses_by_bytes, next_uses
from batchllm.planner.eviction import (
    EvictionPolicy,
    KnownNextUse,
    LeastRecentlyUsed,
    cache_craft_score,
    least_frequently_used,
)
from batchllm.planner.eviction_simulator import SimulatedCache, simulate_cache
from batchllm.planner.memory_prices import fewest_loaded_bytes, memory_prices
from benchmarks.chunk_eviction import mooncake_accesses, musique_accesses

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="there is no ../shared/data here")


def least_cost(sequence: AccessSequence, capacity: int) -> float:
    """Every choice of what to keep from one access to the next, tried."""
    following = next_uses(sequence.item)
    stays = [(a, int(b)) for a, b in enumerate(following) if b < len(sequence)]
    best = float(sequence.cost.sum())
    for choice in itertools.product((False, True), repeat=len(stays)):
        held = np.zeros(len(sequence), dtype=np.int64)
        saved = 0.0
        for (begin, end), kept in zip(stays, choice):
            if kept:
                held[begin:end] += sequence.bytes[sequence.item[begin]]
                saved += float(sequence.cost[end])
        if held.max(initial=0) <= capacity:
            best = min(best, float(sequence.cost.sum()) - saved)
    return best


@st.composite
def small_sequences(draw: st.DrawFn, equal_sizes: bool = False) -> tuple[AccessSequence, int]:
    items = draw(st.lists(st.integers(0, 4), min_size=1, max_size=14))
    size = st.just(1) if equal_sizes else st.integers(1, 9)
    bytes = np.array(draw(st.lists(size, min_size=5, max_size=5)), dtype=np.int64)
    item = np.array(items, dtype=np.int64)
    cost = bytes[item].astype(np.float64)
    if not equal_sizes and draw(st.booleans()):
        cost = np.array(draw(st.lists(st.integers(0, 20), min_size=len(item), max_size=len(item))), float)
    return AccessSequence(item, bytes, cost), draw(st.integers(0, int(bytes.sum()) + 1))


def policies(sequence: AccessSequence) -> list[EvictionPolicy]:
    return [
        KnownNextUse(sequence),
        LeastRecentlyUsed(),
        least_frequently_used(len(sequence)),
        cache_craft_score(np.linspace(0, 1, len(sequence))),
    ]


@settings(max_examples=120, deadline=None)
@given(small_sequences(equal_sizes=True))
def test_equal_sizes_are_optimal(case: tuple[AccessSequence, int]):
    sequence, capacity = case
    found = simulate_cache(sequence, KnownNextUse(sequence), capacity)
    assert found.loaded_bytes == least_cost(sequence, capacity) == fewest_loaded_bytes(sequence, capacity)


@settings(max_examples=120, deadline=None)
@given(small_sequences())
def test_bounds_hold_and_no_policy_breaks_the_limit(case: tuple[AccessSequence, int]):
    sequence, capacity = case
    by_bytes = accesses_by_bytes(sequence.item, sequence.bytes)
    assert fewest_loaded_bytes(sequence, capacity) <= least_cost(by_bytes, capacity)
    best = least_cost(sequence, capacity)
    for policy in policies(sequence):
        found = simulate_cache(sequence, policy, capacity)
        assert found.peak_bytes <= capacity
        assert found.cost >= best - 1e-9
        assert_is_what_happened(sequence, found)
    prices = memory_prices(sequence, capacity, float(sequence.cost.sum()), 60)
    assert prices.least_cost <= best + 1e-6
    priced = simulate_cache(sequence, KnownNextUse(sequence, prices.price), capacity)
    assert best - 1e-9 <= priced.cost <= sequence.cost.sum()


def assert_is_what_happened(sequence: AccessSequence, found: SimulatedCache) -> None:
    first = np.ones(len(sequence), dtype=bool)
    first[next_uses(sequence.item)[next_uses(sequence.item) < len(sequence)]] = False
    assert found.loaded[first].all(), "an item was there before its first use"
    assert found.loaded_bytes == sequence.bytes[sequence.item[found.loaded]].sum()
    assert found.hits == len(sequence) - found.loaded.sum()


def test_next_uses():
    assert next_uses(np.array([3, 1, 3, 3, 0])).tolist() == [2, 5, 3, 5, 5]
    assert next_uses(np.array([], dtype=np.int64)).tolist() == []


def test_lru_and_lfu_by_hand():
    sequence = accesses_by_bytes(np.array([0, 0, 0, 1, 2, 0, 1]), np.array([1, 1, 1]))
    # LRU: 0 | 0 1 | 1 2 (0 left) | 0 again, 1 left | 1 again
    assert simulate_cache(sequence, LeastRecentlyUsed(), 2).loaded.tolist() == [1, 0, 0, 1, 1, 1, 1]
    # LFU: 0 was used most and stays; 2 takes the place of 1, which is as frequent and less recent
    assert simulate_cache(sequence, least_frequently_used(7), 2).loaded.tolist() == [1, 0, 0, 1, 1, 0, 1]


def test_cache_craft_keeps_what_needs_little_repair():
    sequence = accesses_by_bytes(np.array([0, 1, 2, 0, 1]), np.array([1, 1, 1]))
    fix = np.array([0.9, 0.05, 0.5, 0.9, 0.05])
    assert simulate_cache(sequence, cache_craft_score(fix), 2).loaded.tolist() == [1, 1, 1, 1, 0]


def random_accesses(rng: np.random.Generator, unequal: bool, costs: bool) -> AccessSequence:
    """Popular and unpopular items."""
    share = 1 / np.arange(1, 201) ** 0.8
    item = rng.choice(200, 3000, p=share / share.sum())
    bytes = (
        np.maximum(1, rng.lognormal(4, 1, 200)).astype(np.int64) if unequal else np.full(200, 50, np.int64)
    )
    each = bytes * (rng.lognormal(0, 1, 200) if costs else np.ones(200))
    return AccessSequence(item, bytes, each[item])


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_prices_bring_weighted_eviction_to_within_two_percent(share: float):
    """Where costs are not proportional to bytes, the farthest next use is a bad choice, and prices a good one."""
    sequence = random_accesses(np.random.default_rng(3), unequal=False, costs=True)
    capacity = int(sequence.distinct_bytes * share) // 50 * 50
    plain = simulate_cache(sequence, KnownNextUse(sequence), capacity)
    prices = memory_prices(sequence, capacity, plain.cost)
    priced = simulate_cache(sequence, KnownNextUse(sequence, prices.price), capacity)
    assert prices.least_cost <= priced.cost <= 1.02 * prices.least_cost
    assert plain.cost > 1.1 * prices.least_cost


def test_a_cache_for_everything_loads_everything_once():
    sequence = random_accesses(np.random.default_rng(4), unequal=True, costs=False)
    capacity = sequence.distinct_bytes
    for policy in policies(sequence):
        assert simulate_cache(sequence, policy, capacity).loaded_bytes == sequence.distinct_bytes
    prices = memory_prices(sequence, capacity, float(sequence.distinct_bytes))
    assert prices.least_cost == pytest.approx(sequence.distinct_bytes)
    assert not prices.price.any()


@needs_data
@pytest.mark.parametrize("share", [0.005, 0.02])
def test_musique_is_within_two_percent_of_the_bound(share: float):
    questions = json.loads((DATA / "cacheblend" / "musique_s.json").read_text())
    sequence = musique_accesses(questions, lambda text: len(text.split())).by_bytes
    assert (len(sequence), len(np.unique(sequence.item))) == (1500, 1255)
    capacity = int(sequence.distinct_bytes * share)
    found = simulate_cache(sequence, KnownNextUse(sequence), capacity)
    assert found.peak_bytes <= capacity
    assert found.loaded_bytes <= 1.02 * fewest_loaded_bytes(sequence, capacity)
    assert simulate_cache(sequence, LeastRecentlyUsed(), capacity).loaded_bytes > found.loaded_bytes


@needs_data
def test_mooncake_equals_belady_with_equal_blocks_and_the_bound_with_partial_ones():
    sequence = mooncake_accesses(DATA / "mooncake" / "conversation_trace.jsonl", limit=3000).by_bytes
    for sizes in (np.full(len(sequence.bytes), 512), sequence.bytes):
        of_size = accesses_by_bytes(sequence.item, sizes)
        capacity = of_size.distinct_bytes // 100
        found = simulate_cache(of_size, KnownNextUse(of_size), capacity // 512 * 512)
        bound = fewest_loaded_bytes(of_size, capacity // 512 * 512)
        assert found.loaded_bytes <= (bound if sizes is not sequence.bytes else 1.02 * bound)
