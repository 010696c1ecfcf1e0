"""What the scheduler asks of KV memory, whatever the device: contiguous extents on a CPU, pages on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from batchllm.executor.kv_buffers import LayerKv


class KvExtent(Protocol):
    """Token slots of one node, in order. Where they lie is known to its pool and to attention only."""

    @property
    def capacity(self) -> int: ...

    def slots(self, first: int, count: int) -> NDArray[Any]:
        """Pool slots of `count` of the node's slots, from the `first` one on."""
        ...


class KvMemory(Protocol):
    """Hands out extents under a budget. An extent goes back to the pool that made it."""

    capacity: int  # slots in all

    @property
    def layers(self) -> Sequence[LayerKv]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def used(self) -> int:
        """Slots that are handed out, those lost to rounding included."""
        ...

    @property
    def peak(self) -> int:
        """Most slots that were ever handed out at once."""
        ...

    def usable(self, extents: int) -> int:
        """Tokens that so many extents can hold together, with what rounding may be expected to cost."""
        ...

    def allocate(self, tokens: int, high: bool = False) -> Any | None:
        """An extent of at least `tokens` slots, or None; `high` for shared nodes, to keep them apart from leaves."""
        ...

    def free(self, extent: Any) -> None: ...

    def grow(self, extent: Any, capacity: int) -> bool:
        """Enlarges an extent where it is. False, and nothing changed, if there is no room."""
        ...

    def copy(self, source: Any, target: Any, tokens: int) -> None:
        """Copies the first `tokens` slots of one extent to another, in every layer."""
        ...

    def compact(self, last: Any | None = None) -> None:
        """Makes all free slots usable together; `last` can grow afterwards if any slot is free."""
        ...

    def check_integrity(self) -> None:
        """For tests: nothing is handed out twice or lost."""
        ...
