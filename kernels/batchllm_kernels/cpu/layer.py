"""What a decoder layer does between its matrix products, on a CPU in bfloat16: the binding of `layer.c`.

All tensors are bfloat16. Results are those of transformers' modules, rounded where they round.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts


class LayerOps:
    """The functions of `layer.c` for tensors."""

    def __init__(self, kernels: ctypes.CDLL):
        self._kernels = kernels

    def rms_norm(self, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """The RMSNorm of states [n, size] times weight [size], contiguous."""
        normed = states.new_empty(states.shape)
        rows, size = states.shape
        assert states.stride(1) == 1
        self._kernels.batchllm_rms_norm(
            address(states),
            address(weight),
            address(normed),
            *counts(rows, size, states.stride(0), size),
            ctypes.c_float(epsilon),
        )
        return normed

    def norm_heads(self, states: Tensor, weight: Tensor, epsilon: float) -> None:
        """The RMSNorm of every head of states [n, heads, dim], in place, times weight [dim], contiguous."""
        rows, heads, dim = states.shape
        assert states.stride()[1:] == (dim, 1) and len(weight) == dim
        self._kernels.batchllm_norm_heads(
            address(states),
            address(weight),
            *counts(rows, heads, dim, states.stride(0)),
            ctypes.c_float(epsilon),
        )

    def silu_and_mul(self, joined: Tensor) -> Tensor:
        """joined [n, 2 size], contiguous → silu of the first half times the second, [n, size]."""
        assert joined.is_contiguous()
        rows, width = joined.shape
        output = joined.new_empty(rows, width // 2)
        self._kernels.batchllm_silu_and_mul(address(joined), address(output), *counts(rows, width // 2))
        return output

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """states [n, heads, dim] are turned in place and returned; cos and sin [n, dim], both halves equal."""
        rows, heads, dim = states.shape
        assert states.stride()[1:] == (dim, 1) and cos.is_contiguous() and sin.is_contiguous()
        self._kernels.batchllm_rotate(
            address(states), address(cos), address(sin), *counts(rows, heads, dim, states.stride(0))
        )
        return states


def store_kv(
    kernels: ctypes.CDLL, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """keys[slots] = key and values[slots] = value, in one pass: key and value [n, width], keys and values
    [capacity, width], contiguous, slots int64 [n], contiguous."""
    rows, width = key.shape
    assert value.shape == key.shape and key.stride(1) == value.stride(1) == 1
    assert keys.is_contiguous() and values.is_contiguous() and slots.is_contiguous()
    assert keys.shape[1] == values.shape[1] == width and len(slots) == rows
    kernels.batchllm_store_kv(
        *map(address, (key, value, keys, values, slots)),
        *counts(rows, width, key.stride(0), value.stride(0)),
    )
