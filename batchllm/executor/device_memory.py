"""What of a GPU's memory a step needs beside weights and KV, and a KV pool that fits what is left."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch

from batchllm.errors import JobError

Pool = TypeVar("Pool")

_MARGIN = 0.03  # of what is free: fragments and workspaces of libraries
_FRAGMENTS = 1.25  # activations take more than their sum
_PARTS = 3  # of a token's attention, at most, on average (docs/kernels.md)
_SHRINK = 0.9
_TRIES = 12  # after which a pool is a quarter of what was meant
# In the words of the driver (Triton, CUDA graphs) and of cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated where the tensors of `device` live."""
    if device.type == "cuda":
        collect()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def activation_bytes(config: Any, dtype: torch.dtype, step_tokens: int, logit_rows: int) -> int:
    """An estimate of what one forward pass holds at its peak. `config` is of a transformers text model."""
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd")
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dense = getattr(config, "intermediate_size", None) or 4 * hidden
    routed = (getattr(config, "moe_intermediate_size", None) or 0) * (
        getattr(config, "num_experts_per_tok", None) or 0
    )
    states = 6 * hidden + 2 * (heads + 2 * kv_heads) * head_dim + 3 * max(dense, routed)
    parts = _PARTS * heads * head_dim
    logits = logit_rows * int(config.vocab_size) * (dtype.itemsize + 4)  # as they are, and in float32
    return int(_FRAGMENTS * step_tokens * (states + parts) * dtype.itemsize) + logits


def kv_bytes(free: int, activations: int) -> int:
    """What is left for KV."""
    return max(0, int(free * (1 - _MARGIN)) - activations)


def largest_pool(make: Callable[[int], Pool], tokens: int, smallest: int = 1) -> Pool:
    """make(tokens), or for fewer tokens where memory does not suffice.

    Raises JobError when not even `smallest` tokens, or a quarter of what was meant, fit.
    """
    wanted = tokens
    for attempt in range(_TRIES):
        try:
            return make(tokens)
        except torch.OutOfMemoryError:
            tokens = int(tokens * _SHRINK) if attempt else tokens
            if tokens < smallest:
                break
        if not attempt:
            collect()
    raise JobError(
        f"engine.kv_memory: the GPU has no room for {wanted:,} tokens of KV nor for a quarter of them; free memory "
        f"on it, lower engine.kv_memory or set engine.device to cpu."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU has no memory left; not every library says so by torch's own exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def collect() -> None:
    """Memory that nothing refers to any more goes back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _number(config: Any, *names: str) -> int:
    return next(int(getattr(config, name)) for name in names if getattr(config, name, None))
