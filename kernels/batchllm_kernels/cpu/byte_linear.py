"""Linear layers in 8-bit integers on a CPU, inputs included: the binding of `byte_linear.c`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import check_memory
from batchllm_kernels.cpu.large_pages import zeros_in_large_pages
from batchllm_kernels.cpu.linear import PANEL

_FOUR = 4  # inputs of a step


class _ByteProduct(ctypes.Structure):
    """As ByteProduct in byte_linear.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("input", "weight", "shift", "scale", "bias", "residual", "output")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("input_row", "residual_row", "output_row")),
    ]


class BytePanels(NamedTuple):
    """Weights of a linear layer, a byte each, with zeros to fill up steps and panels."""

    bytes: Tensor  # int32 [panels, ceil(inputs / 4), 64] four weights of an output
    shift: Tensor  # int32 [panels, 64] -128 times the sum of an output's weights
    scale: Tensor  # float32 [panels, 64]

    def panels(self, first: int, last: int) -> BytePanels:
        """Some of the panels, sharing their memory."""
        return BytePanels(*(part[first:last] for part in self))


def pack_byte_panels(weight: Tensor, scale: Tensor) -> BytePanels:
    """weight int8 [outputs, inputs] and what its rows are multiplied with, [outputs]."""
    assert weight.dtype == torch.int8 and weight.dim() == 2 and scale.shape == (len(weight),)
    outputs, inputs = weight.shape
    panels, steps = -(-outputs // PANEL), -(-inputs // _FOUR)
    packed = zeros_in_large_pages(panels * steps * PANEL, torch.int32).view(panels, steps, PANEL)
    shift = torch.zeros(panels * PANEL, dtype=torch.int32)
    scales = torch.zeros(panels * PANEL)
    shift[:outputs] = weight.sum(dim=1, dtype=torch.int32).mul_(-128)
    scales[:outputs] = scale
    bytes_of = packed.view(torch.int8).view(panels, steps, PANEL, _FOUR)
    for panel in range(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        filled = torch.nn.functional.pad(rows, (0, steps * _FOUR - inputs, 0, PANEL - len(rows)))
        bytes_of[panel] = filled.view(PANEL, steps, _FOUR).transpose(0, 1)
    return BytePanels(packed, shift.view(panels, PANEL), scales.view(panels, PANEL))


def byte_linear(
    kernels: ctypes.CDLL,
    states: Tensor,
    weights: BytePanels,
    outputs: int,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """states bfloat16 [n, inputs] → [n, outputs] in bfloat16. Needs AVX-512 VNNI (`can_screen`).

    States are rounded to 8-bit integers as torchao does, with a scale for each row. With `add_to` [n, outputs], the
    result is added to it, rounded first, and it is what is returned.
    """
    states = states if states.stride(1) == 1 else states.contiguous()
    assert states.dtype == torch.bfloat16 and -(-states.shape[1] // _FOUR) == weights.bytes.shape[1]
    output = states.new_empty(len(states), outputs) if add_to is None else add_to
    assert output.stride(1) == 1 and output.dtype == torch.bfloat16
    product = _ByteProduct(
        input=states.data_ptr(),
        weight=weights.bytes.data_ptr(),
        shift=weights.shift.data_ptr(),
        scale=weights.scale.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        residual=None if add_to is None else add_to.data_ptr(),
        output=output.data_ptr(),
        rows=len(states),
        inputs=states.shape[1],
        outputs=outputs,
        input_row=states.stride(0),
        residual_row=0 if add_to is None else add_to.stride(0),
        output_row=output.stride(0),
    )
    check_memory(kernels.batchllm_byte_linear(ctypes.byref(product)), "an int8 layer")
    return output
