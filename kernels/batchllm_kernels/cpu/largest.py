"""The largest few of many logits: the binding of `largest.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts


def take_largest(kernels: ctypes.CDLL, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits float32 [n, V] → the largest [n, count] and their tokens, by rising token; of equal ones the first."""
    rows, size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and 0 < count <= size
    values = logits.new_empty(rows, count)
    tokens = torch.empty(rows, count, dtype=torch.int64)
    if kernels.batchllm_largest(
        *map(address, (logits, values, tokens)), *counts(rows, size, count, logits.stride(0))
    ):
        raise MemoryError
    return values, tokens
