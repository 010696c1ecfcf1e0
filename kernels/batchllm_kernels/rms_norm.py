"""RMSNorm of rows, optionally of the sum with a residual, in one pass over memory.

Root mean square layer normalisation (Zhang and Sennrich 2019). The sum, the normalised row and the product with the
weight are rounded where transformers' modules round them, so that float16 and bfloat16 results agree with theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels


def rms_norm(
    states: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    one_plus: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """states [T, H] → RMSNorm over H, [T, H] in the dtype of `states`.

    With a `residual` [T, H], that becomes residual + states (in place, rounded to its dtype), and the result is the
    norm of this sum. weight [H]; `one_plus` scales by 1 + weight as Gemma's norms do, rounding once at the end;
    otherwise the normalised row is rounded before it is multiplied, as in Llama's. Rows may be strided, the last
    dimension is contiguous. `out` may be `states` itself.
    """
    rows, width = states.shape
    assert weight.shape == (width,) and weight.is_contiguous()
    assert states.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    out = torch.empty((rows, width), dtype=states.dtype, device=states.device) if out is None else out
    block = triton.next_power_of_2(width)
    if rows:
        rms_norm_kernel[(rows,)](
            states,
            residual if residual is not None else states,
            weight,
            out,
            epsilon,
            states.stride(0),
            residual.stride(0) if residual is not None else 0,
            out.stride(0),
            WIDTH=width,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            ONE_PLUS=one_plus,
            num_warps=warps_for(block),
        )
    return out


def warps_for(block: int) -> int:
    """Warps of one program: 8 to 32 elements of the row for each thread."""
    return min(max(block // 512, 1), 16)


def rms_norm_reference(
    states: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    one_plus: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(result, the new residual) of `rms_norm`, which it leaves unchanged, in torch operations."""
    if residual is not None:
        residual = residual + states
        states = residual
    wide = states.float() if states.dtype != torch.float64 else states
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if one_plus:
        return (normed * (1.0 + weight.to(wide.dtype))).to(states.dtype), residual
    return (weight * normed.to(states.dtype)).to(states.dtype), residual


@triton.jit
def scaled_by_norm(normed, weight, dtype: tl.constexpr, ONE_PLUS: tl.constexpr):
    """normed x weight, both float32, with the roundings of Llama's norm, or of Gemma's (ONE_PLUS)."""
    if ONE_PLUS:
        return (normed * (1.0 + weight)).to(dtype)
    else:
        return (normed.to(dtype).to(tl.float32) * weight).to(dtype)


@triton.jit
def rms_norm_kernel(
    States,  # [T, WIDTH]
    Residual,  # [T, WIDTH], read and written if HAS_RESIDUAL
    Weight,  # [WIDTH]
    Output,  # [T, WIDTH]
    epsilon,
    stride_states,
    stride_residual,
    stride_output,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least WIDTH
    HAS_RESIDUAL: tl.constexpr,
    ONE_PLUS: tl.constexpr,
):
    """One row per program, held in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype = Output.dtype.element_ty
    states = tl.load(States + row * stride_states + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = Residual + row * stride_residual + column
        total = (states + tl.load(residual, mask=inside, other=0.0).to(tl.float32)).to(
            Residual.dtype.element_ty
        )
        tl.store(residual, total, mask=inside)
        states = total.to(tl.float32)
    weight = tl.load(Weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = states * tl.rsqrt(tl.sum(states * states, axis=0) / WIDTH + epsilon)
    tl.store(
        Output + row * stride_output + column, scaled_by_norm(normed, weight, dtype, ONE_PLUS), mask=inside
    )
