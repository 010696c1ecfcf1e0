"""The least that any cache policy must load, and the prices of memory that come close to it.

From each access an item may stay until its next one. Keeping it saves that access's cost and occupies the item's
bytes all the while; at no time may what is kept exceed the capacity. Choosing what to keep is NP-hard when sizes
differ (Berger, Beckmann and Harchol-Balter, "Practical bounds on optimal caching with variable object sizes", 2018).
If items may be kept in part, it is a linear program, whose optimum no policy can beat:

- where a load costs the bytes it moves, Belady's rule applied to single bytes is that optimum
  (`fewest_loaded_bytes`, exact);
- for any costs, each vector of prices, one for every moment, gives a bound by duality. `memory_prices` lowers it by
  deflected subgradient steps (Camerini, Fratta and Maffioli 1975) and returns the best prices found with their bound.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from batchllm.core import IntArray
from batchllm.planner.accesses import AccessSequence, FloatArray, next_uses

_DEFLECTION = 0.7
_PATIENCE = 20  # steps without a better bound, after which a smaller gap is aimed at
_FIRST_GAP, _SMALLER = 0.05, 0.7
_NOTABLE = 1e-5


@dataclass(frozen=True)
class MemoryPrices:
    price: FloatArray  # [accesses] of one byte from an access to the next
    least_cost: float  # no policy has loads that cost less


@dataclass(frozen=True)
class _Stays:
    """What may be kept: from access `begin[k]` to access `end[k]`."""

    begin: IntArray
    end: IntArray
    bytes: FloatArray
    saving: FloatArray
    num_accesses: int
    capacity: int

    def bought(self, price: FloatArray) -> tuple[float, FloatArray]:
        """At these prices: an upper bound on what can be saved, and the room left at every moment (its gradient)."""
        paid = np.append(0.0, np.cumsum(price))
        profit = self.saving - self.bytes * (paid[self.end] - paid[self.begin])
        bought = profit > 0
        bound = self.capacity * float(paid[-1]) + float(profit[bought].sum())
        count = self.num_accesses + 1
        change = np.bincount(self.begin[bought], self.bytes[bought], count).astype(np.float64)
        change -= np.bincount(self.end[bought], self.bytes[bought], count)
        return bound, self.capacity - np.cumsum(change)[:-1]


def memory_prices(
    sequence: AccessSequence, capacity: int, reachable_cost: float, iterations: int = 300
) -> MemoryPrices:
    """`reachable_cost`: the cost of some policy, the better the faster; see `simulate_cache`.

    Zero prices are what is found when everything can be kept.
    """
    stays = _stays(sequence, capacity)
    total = float(sequence.cost.sum())
    reachable = total - reachable_cost
    price = best_price = np.zeros(len(sequence))
    best, gap, since = np.inf, _FIRST_GAP, 0
    direction = np.zeros(len(sequence))
    for _ in range(iterations):
        bound, room = stays.bought(price)
        if bound < best * (1 - _NOTABLE):
            best, best_price, since = bound, price, 0
        else:
            since += 1
            if since == _PATIENCE:
                gap, since = gap * _SMALLER, 0
                price, direction = best_price, np.zeros(len(sequence))
                continue
        uphill = np.where((price <= 0) & (room > 0), 0.0, room)
        direction = _DEFLECTION * direction + uphill
        norm = float(direction @ direction)
        aim = max(reachable, best * (1 - gap))
        if norm == 0 or bound <= aim:
            break
        price = np.maximum(0.0, price - (bound - aim) / norm * direction)
    return MemoryPrices(best_price, total - best)


def fewest_loaded_bytes(sequence: AccessSequence, capacity: int) -> int:
    """Bytes loaded when bytes of an item can be kept one by one: no policy loads fewer. Costs do not matter."""
    next_use = next_uses(sequence.item).tolist()
    size = sequence.bytes.tolist()
    held: dict[int, int] = {}  # item → bytes kept until its next use
    upcoming: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []  # (-next use, item); outdated entries are skipped
    loaded = used = 0
    for access, item in enumerate(sequence.item.tolist()):
        kept = held.pop(item, 0)
        loaded += size[item] - kept
        used -= kept
        if next_use[access] == len(sequence):
            continue
        held[item], upcoming[item] = size[item], next_use[access]
        used += size[item]
        heapq.heappush(farthest, (-next_use[access], item))
        while used > capacity:
            when, victim = farthest[0]
            if victim not in held or upcoming[victim] != -when:
                heapq.heappop(farthest)
                continue
            dropped = min(held[victim], used - capacity)
            held[victim] -= dropped
            used -= dropped
            if not held[victim]:
                del held[victim]
                heapq.heappop(farthest)
    return loaded


def _stays(sequence: AccessSequence, capacity: int) -> _Stays:
    next_use = next_uses(sequence.item)
    begin = np.flatnonzero(next_use < len(sequence))
    size = sequence.bytes[sequence.item[begin]]
    begin, size = begin[size <= capacity], size[size <= capacity]
    end = next_use[begin]
    return _Stays(begin, end, size.astype(np.float64), sequence.cost[end], len(sequence), capacity)
