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
