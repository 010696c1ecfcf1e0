"""Logits of tokens that must not come: the binding of `forbid.c`."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts


def forbid(kernels: ctypes.CDLL, logits: Tensor, allowed: NDArray[np.int32]) -> None:
    """logits float32 [n, V] become -inf where the bit of `allowed` [n, words], lowest first, is 0; 32 words >= V."""
    rows, size = logits.shape
    assert (
        logits.element_size() == 4
        and logits.stride(1) == 1
        and allowed.strides[1] == 4
        and 32 * allowed.shape[1] >= size
    )
    kernels.batchllm_forbid(
        address(logits),
        ctypes.c_void_p(allowed.ctypes.data),
        *counts(rows, size, logits.stride(0), allowed.strides[0] // 4),
    )
