"""Linear layers by the kernel in C, with packed weights, and with what follows the product done in the same pass."""

from __future__ import annotations

import ctypes

import torch
from batchllm_kernels.cpu.linear import (
    gated_linear,
    linear,
    pack_gated_panels,
    pack_panels,
    unpack_gated_panels,
    unpack_panels,
)
from torch import Tensor, nn

from batchllm.executor.joined_linear import joined_bias
from batchllm.executor.native_byte_linear import NativeByteLinear


class NativeLinear(nn.Module):
    """Takes the place of bfloat16 layers with one input, of an even number of features: its outputs are theirs, one
    after another. A row's result does not depend on what rows come with it."""

    def __init__(self, kernels: ctypes.CDLL, *parts: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = parts[0].in_features, sum(part.out_features for part in parts)
        self.bias = joined_bias(*parts)
        self._kernels = kernels
        self._packed: Tensor = pack_panels(kernels, *(part.weight.data for part in parts))

    @property
    def packed(self) -> Tensor:
        """The weights, as `pack_panels` returns them."""
        return self._packed

    def forward(self, states: Tensor) -> Tensor:
        """states [..., in_features] → [..., out_features]."""
        rows = states.reshape(-1, self.in_features)
        output: Tensor = linear(self._kernels, rows, self._packed, self.out_features, self.bias)
        return output.view(*states.shape[:-1], self.out_features)

    def add_to(self, total: Tensor, states: Tensor) -> Tensor:
        """total [n, out_features] += the layer of states [n, in_features], in place; returns it."""
        added: Tensor = linear(
            self._kernels, states, self._packed, self.out_features, self.bias, add_to=total
        )
        return added

    def unpacked(self) -> nn.Linear:
        """The layer that this was made of, or several joined."""
        return _plain(unpack_panels(self._packed, self.out_features), self.bias)


class NativeGatedLinear(nn.Module):
    """silu(gate) * up of a gated MLP in one product, from layers [size, in_features] without bias."""

    def __init__(self, kernels: ctypes.CDLL, gate: nn.Linear, up: nn.Linear):
        super().__init__()
        self._kernels = kernels
        self.size = gate.out_features
        self._packed: Tensor = pack_gated_panels(kernels, gate.weight.data, up.weight.data)

    @property
    def packed(self) -> Tensor:
        """The weights, as `pack_gated_panels` returns them."""
        return self._packed

    def forward(self, states: Tensor) -> Tensor:
        """states [n, in_features] → [n, size]."""
        output: Tensor = gated_linear(self._kernels, states, self._packed, self.size)
        return output

    def unpacked(self) -> nn.Linear:
        """Both layers joined."""
        return _plain(unpack_gated_panels(self._packed, self.size), None)


def add_product(layer: nn.Module, states: Tensor, total: Tensor) -> Tensor:
    """total [n, out] += layer(states [n, in]), in place, in one pass where the layer has one; returns it."""
    if isinstance(layer, NativeLinear | NativeByteLinear):
        return layer.add_to(total, states)
    return total.add_(layer(states))


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = bias  # type: ignore[assignment]
    return plain


def can_be_native(layer: nn.Linear) -> bool:
    """Whether the kernel can do this layer's product."""
    weight = layer.weight
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and layer.in_features % 2 == 0
