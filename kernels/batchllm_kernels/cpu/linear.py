"""Linear layers with packed weights on a CPU in bfloat16: the binding of `linear.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts, rows_of_pairs
from batchllm_kernels.cpu.large_pages import zeros_in_large_pages

PANEL = 64  # outputs of a panel


class Product(ctypes.Structure):
    """As Product in linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bias", "residual", "output")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("input_row", "residual_row", "output_row", "gated")),
    ]


class _Part(ctypes.Structure):
    """As Part in linear.c."""

    _fields_ = [("weight", ctypes.c_void_p), ("rows", ctypes.c_int64)]


def pack_panels(kernels: ctypes.CDLL, *parts: Tensor) -> Tensor:
    """bfloat16 [outputs, inputs] each, inputs even → int32 [panels, inputs / 2, 64]: pairs of inputs, the outputs of
    all parts side by side.

    Outputs are filled up with zeros. In large pages where the system has them: products wait less for their first read.
    """
    return _pack(kernels, parts, -(-sum(map(len, parts)) // PANEL), gated=0)


def pack_gated_panels(kernels: ctypes.CDLL, gate: Tensor, up: Tensor) -> Tensor:
    """[size, inputs] each → panels of 32 gates and the 32 outputs that they apply to."""
    assert gate.shape == up.shape
    return _pack(kernels, (gate, up), -(-len(gate) // (PANEL // 2)), gated=1)


def _pack(kernels: ctypes.CDLL, parts: Sequence[Tensor], panels: int, gated: int) -> Tensor:
    inputs = parts[0].shape[1]
    assert inputs % 2 == 0
    for part in parts:
        assert part.dtype == torch.bfloat16 and part.is_contiguous() and part.shape[1] == inputs
    packed = zeros_in_large_pages(panels * inputs // 2 * PANEL, torch.int32).view(panels, inputs // 2, PANEL)
    listed = (_Part * len(parts))(*((part.data_ptr(), len(part)) for part in parts))
    count, *shape = counts(len(parts), panels, inputs, gated)
    kernels.batchllm_pack_panels(listed, count, address(packed), *shape)
    return packed


def unpack_panels(packed: Tensor, outputs: int) -> Tensor:
    """What `pack_panels` was given, joined: [outputs, inputs]."""
    panels, pairs, _ = packed.shape
    rows = packed.new_empty(panels, PANEL, pairs).copy_(packed.transpose(1, 2))
    return rows.view(panels * PANEL, pairs)[:outputs].view(torch.bfloat16)


def unpack_gated_panels(packed: Tensor, size: int) -> Tensor:
    """What `pack_gated_panels` was given, the gates first: [2 size, inputs]."""
    panels, pairs, _ = packed.shape
    rows = unpack_panels(packed, panels * PANEL).view(panels, 2, PANEL // 2, 2 * pairs)
    return rows.transpose(0, 1).reshape(2, -1, 2 * pairs)[:, :size].reshape(2 * size, -1)


def linear(
    kernels: ctypes.CDLL,
    states: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """states [n, inputs] → [n, outputs] in bfloat16, by weights of `pack_panels`.

    With `add_to` [n, outputs], the result is added to it, rounded first, and it is what is returned.
    """
    output = states.new_empty(len(states), outputs) if add_to is None else add_to
    _run(kernels, states, packed, output, outputs, bias=bias, residual=add_to)
    return output


def gated_linear(kernels: ctypes.CDLL, states: Tensor, packed: Tensor, size: int) -> Tensor:
    """states [n, inputs] → silu(gates) times the numbers they apply to [n, size], by weights of `pack_gated_panels`."""
    output = states.new_empty(len(states), size)
    _run(kernels, states, packed, output, 2 * size, gated=1)
    return output


def _run(
    kernels: ctypes.CDLL,
    states: Tensor,
    packed: Tensor,
    output: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: int = 0,
) -> None:
    states = rows_of_pairs(states)
    assert output.stride(1) == 1 and states.shape[1] == 2 * packed.shape[1]
    product = Product(
        input=states.data_ptr(),
        weight=packed.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        output=output.data_ptr(),
        rows=len(states),
        inputs=states.shape[1],
        outputs=outputs,
        input_row=states.stride(0),
        residual_row=0 if residual is None else residual.stride(0),
        output_row=output.stride(0),
        gated=gated,
    )
    kernels.batchllm_linear(ctypes.byref(product))
