"""Logits of tokens that must not come: the binding of `forbid.c`."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts


def forbid(kernels: ctypes.CDLL, logits: Tensor, rows: NDArray[np.int64], allowed: NDArray[np.int32]) -> None:
    """Of logits float32 [n, V], `rows` [m] become -inf where the bit of `allowed` [m, words], lowest first, is 0.

    32 words >= V.
    """
    count, words = allowed.shape
    assert logits.element_size() == 4 and logits.stride(1) == 1 and 32 * words >= logits.shape[1]
    assert len(rows) == count and allowed.flags.c_contiguous and rows.dtype == np.int64
    kernels.batchllm_forbid(
        address(logits),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(allowed.ctypes.data),
        *counts(count, logits.shape[1], logits.stride(0), words),
    )
