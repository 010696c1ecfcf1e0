"""Chunks in memory, as they were read from disk and checked: under a byte limit, with the whole job known ahead."""

from __future__ import annotations

from collections.abc import Sequence

from batchllm.chunkcache.chunk_file import Bytes
from batchllm.planner.accesses import AccessSequence
from batchllm.planner.eviction import KnownNextUse
from batchllm.planner.eviction_simulator import simulate_cache
from batchllm.planner.memory_prices import memory_prices

_PRICED_ACCESSES = 200_000  # finding prices of memory takes a second for so many
_MUCH_LARGER = 1.05  # chunks of nearly the same size need no prices: the farthest next use leaves


class HostTier:
    """Holds the KV of stored variants. Accesses come in the order of the sequence."""

    def __init__(self, sequence: AccessSequence, capacity: int):
        self.capacity = capacity
        self.used = self.peak = 0
        self.hits = self.misses = 0
        self._policy = _policy(sequence, capacity)
        self._used_again = self._policy.next_use < len(sequence)
        self._held: dict[int, Sequence[Bytes]] = {}

    def get(self, item: int) -> Sequence[Bytes] | None:
        """The KV of each layer, if it is here."""
        found = self._held.get(item)
        self.hits += found is not None
        self.misses += found is None
        return found

    def use(self, item: int, access: int, layers: Sequence[Bytes]) -> None:
        """The access has happened. Keeps the item if that is worth it; others may leave."""
        size = sum(layer.nbytes for layer in layers)
        if item not in self._held:
            if size > self.capacity or not self._used_again[access]:
                return
            self._held[item] = layers
            self.used += size
        self._policy.use(item, access)
        while self.used > self.capacity:
            self._drop(self._policy.victim())
        if item in self._held and not self._used_again[access]:
            self._drop(item)
        self.peak = max(self.peak, self.used)

    def drop(self, item: int) -> None:
        """What was read turned out to be damaged."""
        if item in self._held:
            self._drop(item)

    def _drop(self, item: int) -> None:
        self._policy.forget(item)
        self.used -= sum(layer.nbytes for layer in self._held.pop(item))


def _policy(sequence: AccessSequence, capacity: int) -> KnownNextUse:
    sizes = sequence.bytes
    alike = not len(sizes) or sizes.max() <= _MUCH_LARGER * sizes.min()
    if alike or len(sequence) > _PRICED_ACCESSES or sizes.sum() <= capacity:
        return KnownNextUse(sequence)
    reachable = simulate_cache(sequence, KnownNextUse(sequence), capacity).cost
    return KnownNextUse(sequence, memory_prices(sequence, capacity, reachable).price)
