"""Tensors and counts as the functions in C take them."""

from __future__ import annotations

import ctypes

from torch import Tensor


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Of its first number."""
    return ctypes.c_void_p(tensor.data_ptr())


def counts(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))


def rows_of_pairs(states: Tensor) -> Tensor:
    """states [n, width], or a copy whose rows can be read as pairs of neighbouring numbers, four bytes each."""
    return states if states.stride(1) == 1 and states.stride(0) % 2 == 0 else states.contiguous()


def check_memory(failed: int, who: str) -> None:
    """Raises MemoryError where a function in C says that it got none."""
    if failed:
        raise MemoryError(f"{who} found no memory for what its threads work in")
