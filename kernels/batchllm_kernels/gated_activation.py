"""The product of a gated MLP: activation(gate) x up, reading the joined output of the gate and up projections.

SwiGLU and GEGLU (Shazeer, "GLU Variants Improve Transformer", 2020). The activation is computed in float32 and rounded
to the inputs' dtype before the product, as separate modules round it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """gate_up [T, 2 I], the gate's half first → silu(gate) x up, [T, I]. Rows may be strided."""
    return _gated(gate_up, out, gelu=False)


def gelu_tanh_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """The same with GELU in its tanh form (Hendrycks and Gimpel 2016), `gelu_pytorch_tanh` in transformers."""
    return _gated(gate_up, out, gelu=True)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_and_mul` in torch operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_and_mul_reference(gate_up: Tensor) -> Tensor:
    """`gelu_tanh_and_mul` in torch operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _gated(gate_up: Tensor, out: Tensor | None, gelu: bool) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * width and gate_up.stride(1) == 1
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    if rows:
        # Columns last in the grid's order of rows: a grid's second dimension holds only 65,535.
        gated_activation_kernel[(rows, triton.cdiv(width, _BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=_BLOCK, GELU=gelu, num_warps=4
        )
    return out


@triton.jit
def gated_activation_kernel(
    GateUp,  # [T, 2 WIDTH]
    Output,  # [T, WIDTH]
    stride_gate_up,
    stride_output,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,  # else SiLU
):
    """One row's BLOCK columns per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = GateUp + row * stride_gate_up + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    slope = gate
    if GELU:
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), and z = sqrt(2 / pi) (x + 0.044715 x^3).
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    dtype = Output.dtype.element_ty
    active = (gate / (1.0 + tl.exp(-slope))).to(dtype).to(tl.float32)
    tl.store(Output + row * stride_output + column, (active * up).to(dtype), mask=inside)
