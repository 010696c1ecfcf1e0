"""What a program of `rope_kv_write` does with the few heads it has: norm, rotation, and the format they are kept in."""

from __future__ import annotations

import triton
import triton.language as tl

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels
from batchllm_kernels.rms_norm import scaled_by_norm


@triton.jit
def rotate_heads(
    Source,  # [BLOCK_HEADS, 1] pointers to the heads
    inside_heads,  # [BLOCK_HEADS, 1]
    Target,  # [BLOCK_HEADS, 1] pointers to where they go
    scale,
    Cos,  # [HALF]
    Sin,
    Norm,  # [WIDTH]
    epsilon,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Loads heads, normalises and rotates them, and stores them divided by `scale`."""
    source_type: tl.constexpr = Source.dtype.element_ty
    target_type: tl.constexpr = Target.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = pair < HALF
    inside = inside_heads & in_half
    if INTERLEAVED:
        first_column, second_column = 2 * pair, 2 * pair + 1
    else:
        first_column, second_column = pair, pair + HALF
    first = tl.load(Source + first_column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(Source + second_column, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    if BLOCK_REST > 0:
        rest_column = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside_rest = inside_heads & (rest_column < WIDTH)
        rest = tl.load(Source + rest_column, mask=inside_rest, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(rest * rest, axis=1, keep_dims=True)
    if HAS_NORM:
        factor = tl.rsqrt(squares / WIDTH + epsilon)
        first_weight = tl.load(Norm + first_column, mask=in_half, other=0.0).to(tl.float32)
        second_weight = tl.load(Norm + second_column, mask=in_half, other=0.0).to(tl.float32)
        first = scaled_by_norm(first * factor, first_weight, source_type, ONE_PLUS).to(tl.float32)
        second = scaled_by_norm(second * factor, second_weight, source_type, ONE_PLUS).to(tl.float32)
        if BLOCK_REST > 0:
            rest_weight = tl.load(Norm + rest_column, mask=rest_column < WIDTH, other=0.0).to(tl.float32)
            rest = scaled_by_norm(rest * factor, rest_weight, source_type, ONE_PLUS).to(tl.float32)
    cos = tl.load(Cos + pair, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(Sin + pair, mask=in_half, other=0.0).to(tl.float32)
    new_first = stored_as(first * cos - second * sin, scale, target_type, LARGEST)
    new_second = stored_as(second * cos + first * sin, scale, target_type, LARGEST)
    tl.store(Target + first_column, new_first, mask=inside)
    tl.store(Target + second_column, new_second, mask=inside)
    if BLOCK_REST > 0:
        tl.store(Target + rest_column, stored_as(rest, scale, target_type, LARGEST), mask=inside_rest)


@triton.jit
def stored_as(states, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """float32 states as the pool holds them."""
    if LARGEST > 0:
        return tl.clamp(states / scale, -LARGEST, LARGEST).to(dtype)
    else:
        return states.to(dtype)
