"""The kernels in C that this machine compiled, or none, and why."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from batchllm_kernels.cpu.build import cpu_has_bfloat16_products, library

from batchllm.user_cache import user_cache_folder

if TYPE_CHECKING:
    from batchllm.executor.model import ModelRunner


def native_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Kernels for a model of this dtype on this CPU. The first call of all compiles them."""
    found = _found(dtype)
    return None if isinstance(found, str) else found


def why_no_kernels(model: ModelRunner) -> str | None:
    """Why this model does without the kernels; None where it has them, or is on a GPU."""
    if model.placement.gpu is not None:
        return None
    found = _found(model.dtype)
    return found if isinstance(found, str) else None


def missing_kernels_note(model: ModelRunner) -> str | None:
    """For the user: only where this model and this CPU could have them, so that something can be done about it."""
    reason = why_no_kernels(model)
    if reason is None or model.dtype != torch.bfloat16 or not cpu_has_bfloat16_products():
        return None
    return f"the kernels in C are missing, so this takes several times as long as it could: {reason}"


def _found(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    if dtype != torch.bfloat16:
        return f"they are for bfloat16, and the model is in {str(dtype).removeprefix('torch.')}"
    found: ctypes.CDLL | str = library(user_cache_folder() / "kernels")
    return found
