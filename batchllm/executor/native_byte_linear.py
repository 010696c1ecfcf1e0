"""Linear layers in 8-bit integers (W8A8) by the kernel in C: torchao's integers and scales, multiplied in one pass."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from batchllm_kernels.cpu.byte_linear import BytePanels, byte_linear, pack_byte_panels
from batchllm_kernels.cpu.linear import PANEL
from batchllm_kernels.cpu.screen import can_screen
from torch import Tensor, nn

from batchllm.executor.native import native_kernels


class NativeByteLinear(nn.Module):
    """Takes the place of a bfloat16 layer whose weight torchao has quantised for int8_dynamic. A row's result does not
    depend on what rows come with it."""

    def __init__(self, kernels: ctypes.CDLL, panels: BytePanels, inputs: int, outputs: int, bias: Any):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bias = bias
        self.panels = panels
        self._kernels = kernels

    @classmethod
    def of(cls, kernels: ctypes.CDLL, linear: nn.Linear) -> NativeByteLinear:
        """With packed weights of its own."""
        weight: Any = linear.weight  # torchao's tensor, with fields of its own
        panels = pack_byte_panels(weight.qdata, weight.scale.flatten())
        return cls(kernels, panels, linear.in_features, linear.out_features, linear.bias)

    def rows(self, rows: slice, bias: Any) -> NativeByteLinear | None:
        """A layer of some of its outputs, sharing its memory; None where they do not begin with a panel."""
        if rows.start % PANEL:
            return None
        panels = self.panels.panels(rows.start // PANEL, -(-rows.stop // PANEL))
        return NativeByteLinear(self._kernels, panels, self.in_features, rows.stop - rows.start, bias)

    def forward(self, states: Tensor) -> Tensor:
        """states [..., in_features] → [..., out_features]."""
        rows = states.reshape(-1, self.in_features)
        output: Tensor = byte_linear(self._kernels, rows, self.panels, self.out_features, self.bias)
        return output.view(*states.shape[:-1], self.out_features)

    def add_to(self, total: Tensor, states: Tensor) -> Tensor:
        """total [n, out_features] += the layer of states [n, in_features], in place; returns it."""
        added: Tensor = byte_linear(
            self._kernels, states, self.panels, self.out_features, self.bias, add_to=total
        )
        return added


def byte_kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, where they are there for a model of this dtype and the CPU multiplies bytes."""
    kernels = native_kernels(dtype)
    return kernels if kernels is not None and can_screen(kernels) else None
