"""The kernels in C that this machine compiled, or none."""

from __future__ import annotations

import ctypes

import torch
from batchllm_kernels.cpu.build import library

from batchllm.user_cache import user_cache_folder


def native_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Kernels for a model of this dtype on this CPU. The first call of all compiles them."""
    if dtype != torch.bfloat16:
        return None
    found = library(user_cache_folder() / "kernels")
    return None if isinstance(found, str) else found
