"""Puts the parts of a row's attention together by their log-sum-exp (Milakov and Gimelshein 2018)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def merge_parts(
    part_output,  # [slots, HEADS, DIM], contiguous
    part_lse,  # [slots, HEADS] float32, natural logarithm; -inf: this part saw no key
    output,  # [T, HEADS, DIM]
    sinks,  # [HEADS], any pointer without HAS_SINKS
    merge_rows,  # int32 [capacity]: rows with several parts
    merge_ptr,  # int32 [capacity + 1]: their slots, neighbours
    num_rows,  # int32 [1]: how many of them are used, read on the device
    output_row_stride,
    output_head_stride,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Grid: (capacity, ceil(HEADS / BLOCK_HEADS)). A row whose parts all saw no key becomes zero."""
    index = tl.program_id(0)
    if index < tl.load(num_rows):
        BLOCK_DIM: tl.constexpr = triton.next_power_of_2(DIM)
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        is_head = head < HEADS
        dims = tl.arange(0, BLOCK_DIM)
        is_element = is_head[:, None] & (dims < DIM)[None, :]
        if HAS_SINKS:
            # A sink is one more part, with weight but no value.
            highest = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32) * LOG2_E
            weight = tl.full([BLOCK_HEADS], 1.0, tl.float32)
        else:
            highest = tl.full([BLOCK_HEADS], MINUS_INFINITY, tl.float32)
            weight = tl.zeros([BLOCK_HEADS], tl.float32)
        total = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
        for slot in tl.range(tl.load(merge_ptr + index), tl.load(merge_ptr + index + 1), num_stages=3):
            place = (slot * HEADS + head).to(tl.int64)
            lse = tl.load(part_lse + place, mask=is_head, other=MINUS_INFINITY) * LOG2_E
            part = tl.load(part_output + place[:, None] * DIM + dims[None, :], mask=is_element, other=0.0)
            new_highest = tl.maximum(highest, lse)
            shift = tl.where(new_highest == MINUS_INFINITY, 0.0, new_highest)
            shrink, share = tl.exp2(highest - shift), tl.exp2(lse - shift)
            total = total * shrink[:, None] + part.to(tl.float32) * share[:, None]
            weight = weight * shrink + share
            highest = new_highest
        row = tl.load(merge_rows + index).to(tl.int64)
        tl.store(
            output + (row * output_row_stride + head * output_head_stride)[:, None] + dims[None, :],
            (total / tl.where(weight > 0, weight, 1.0)[:, None]).to(output.dtype.element_ty),
            mask=is_element,
        )
