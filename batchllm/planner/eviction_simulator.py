"""What a cache of some bytes would load during a job, access by access, under a policy. No data moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.planner.accesses import AccessSequence
from batchllm.planner.eviction import EvictionPolicy


@dataclass(frozen=True)
class SimulatedCache:
    """What happened, in the units of the sequence."""

    loaded: NDArray[np.bool_]  # [accesses] the item was not in the cache and had to be loaded
    loaded_bytes: int
    cost: float
    peak_bytes: int

    @property
    def hits(self) -> int:
        return int(len(self.loaded) - self.loaded.sum())


def simulate_cache(sequence: AccessSequence, policy: EvictionPolicy, capacity: int) -> SimulatedCache:
    """The cache holds at most `capacity` bytes at all times between accesses.

    An item in use is outside of it: the accessed item may leave at once, and one that is larger than the cache does.
    """
    size = sequence.bytes.tolist()
    loaded = np.zeros(len(sequence), dtype=np.bool_)
    resident: set[int] = set()
    used = peak = 0
    for access, item in enumerate(sequence.item.tolist()):
        if item not in resident:
            loaded[access] = True
            if size[item] > capacity:
                continue
            resident.add(item)
            used += size[item]
        policy.use(item, access)
        while used > capacity:
            victim = policy.victim()
            policy.forget(victim)
            resident.remove(victim)
            used -= size[victim]
        peak = max(peak, used)
    moved = int(sequence.bytes[sequence.item[loaded]].sum())
    return SimulatedCache(loaded, moved, float(sequence.cost[loaded].sum()), peak)
