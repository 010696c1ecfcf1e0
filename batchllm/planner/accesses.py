"""The sequence in which a job uses items that are worth keeping (KV of chunks), known before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class AccessSequence:
    """Access `a` uses item `item[a]`. If the item is not in the cache then, it is loaded, at `cost[a]`.

    An item is in use only while it is accessed; whether it stays until its next access is what a policy decides.
    """

    item: IntArray  # [accesses] numbers from 0
    bytes: IntArray  # [items] positive
    cost: FloatArray  # [accesses] seconds, bytes, or whatever is to be saved; not negative

    def __post_init__(self) -> None:
        assert len(self.cost) == len(self.item), "one cost for every access"
        assert not len(self.item) or (self.item.min() >= 0 and self.item.max() < len(self.bytes))

    def __len__(self) -> int:
        return len(self.item)

    @property
    def distinct_bytes(self) -> int:
        """Loaded when nothing is ever loaded twice: no policy loads less."""
        return int(self.bytes[np.unique(self.item)].sum())


def accesses_by_bytes(item: IntArray, bytes: IntArray) -> AccessSequence:
    """A load costs the bytes it moves."""
    return AccessSequence(item, bytes, bytes[item].astype(np.float64))


def next_uses(item: IntArray) -> IntArray:
    """[accesses] the next access to the same item; `len(item)` when there is none."""
    count = len(item)
    by_item = np.argsort(item, kind="stable")
    following = np.full(count, count, dtype=np.int64)
    again = item[by_item[1:]] == item[by_item[:-1]]
    following[by_item[:-1][again]] = by_item[1:][again]
    return following
