"""What a decoder layer does between its matrix products: with torch, and in bfloat16 with kernels in C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from batchllm_kernels.cpu.layer import LayerOps
from torch import Tensor

from batchllm.executor.native import native_kernels
from batchllm.executor.rotary import RotaryTables

_BLOCK_VALUES = 1 << 18  # of one elementwise pass of torch: they stay in a CPU's cache


class BetweenProducts(Protocol):
    """`norm` is one of transformers' RMSNorm modules. States are [n, size] unless said otherwise."""

    def norm(self, states: Tensor, norm: Any) -> Tensor: ...

    def norm_heads(self, states: Tensor, norm: Any) -> None:
        """[n, heads, D], in place."""
        ...

    def gated(self, joined: Tensor) -> Tensor:
        """[n, 2 size] → silu of the first half times the second, [n, size]. `joined` may be overwritten."""
        ...

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[n, heads, D] with rotary positions; cos and sin [1, n, D]. `states` may be overwritten."""
        ...


def ops_for(dtype: torch.dtype) -> BetweenProducts:
    """The fastest that this machine has. One object serves all layers of a model."""
    kernels = native_kernels(dtype)
    return TorchOps() if kernels is None else NativeOps(LayerOps(kernels))


class TorchOps:
    """Few passes over memory, in blocks of rows."""

    def __init__(self) -> None:
        self._rotary = RotaryTables()

    def norm(self, states: Tensor, norm: Any) -> Tensor:
        return rms_norm(states, norm)

    def norm_heads(self, states: Tensor, norm: Any) -> None:
        states.copy_(rms_norm(states, norm))

    def gated(self, joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        for rows in _blocks(gate):
            F.silu(gate[rows], inplace=True).mul_(up[rows])
        return gate

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._rotary.apply(states, cos, sin)


class NativeOps:
    """One pass each, by the kernels in C."""

    def __init__(self, ops: LayerOps):
        self._ops = ops

    def norm(self, states: Tensor, norm: Any) -> Tensor:
        normed: Tensor = self._ops.rms_norm(states, norm.weight, norm.variance_epsilon)
        return normed

    def norm_heads(self, states: Tensor, norm: Any) -> None:
        self._ops.norm_heads(states, norm.weight, norm.variance_epsilon)

    def gated(self, joined: Tensor) -> Tensor:
        output: Tensor = self._ops.silu_and_mul(joined)
        return output

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned: Tensor = self._ops.rotate(states, cos[0].contiguous(), sin[0].contiguous())
        return turned


def rms_norm(states: Tensor, norm: Any) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension of states of any shape, in float32 as transformers
    computes it."""
    normed = torch.empty(states.shape, dtype=states.dtype)
    size = states.shape[-1]
    for rows in _blocks(states):
        wide = states[rows].float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(size).add_(norm.variance_epsilon).rsqrt_()
        # Where the states are float32 already they are not a copy: nothing is written in place.
        normed[rows] = wide * scale
        normed[rows].mul_(norm.weight)
    return normed


def _blocks(states: Tensor) -> Iterator[slice]:
    """Rows in blocks of about _BLOCK_VALUES values."""
    rows = len(states)
    step = max(1, _BLOCK_VALUES * rows // max(1, states.numel()))
    for first in range(0, rows, step):
        yield slice(first, first + step)
