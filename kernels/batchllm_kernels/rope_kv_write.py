"""Rotary positions on queries and keys, and the step's keys and values written into the paged pool, in one launch.

Rotary position embedding: Su et al., "RoFormer", 2021. Optionally each query and key head is normalised first (RMSNorm
per head, as in Qwen3 and Gemma 3), and the pool may hold 8-bit floats: stored = value / scale of the KV head, rounded.
Everything is computed in float32. The norm is rounded where transformers' modules round it, the rotation once, at its
end (transformers rounds its two products too, so bfloat16 results may differ in the last bit).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels
from batchllm_kernels.rms_norm import rms_norm_reference
from batchllm_kernels.rotated_heads import rotate_heads, stored_as

_ELEMENTS = 1024  # of a program: a few heads of one token


def rope_kv_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 1e-6,
    one_plus: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the rotated queries [T, Hq, D]; keys and values go to their slots. Pools are changed in place.

    query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv]: any strides but a contiguous last dimension, so they may be
      views of one joined projection.
    cos, sin: [T, R / 2], or with `positions` [T] (int32 or int64) tables [P, R / 2] that are read at these rows.
      R <= D dimensions of each head are rotated, dimension i with i + R / 2, or `interleaved`: 2 i with 2 i + 1; the
      others pass through. Any scaling of the rotation is in the tables.
    key_pool [pages, Hkv, page, D], value_pool [pages, Hkv, page, Dv]: any strides but a contiguous last dimension.
    slots [T] (int32 or int64): page x page size + offset; a negative one writes nothing. No slot may occur twice.
    query_norm, key_norm [D]: weights of the norm of each head, both or neither; `epsilon` and `one_plus` as in
      `rms_norm`.
    key_scale, value_scale: float32, [Hkv] or [1], both or neither: for pools of 8-bit floats. What lies beyond the
      largest number of the pool's format is stored as that number.
    out: [T, Hq, D], not `query` itself.
    """
    tokens, query_heads, width = query.shape
    kv_heads, value_width = key.shape[1], value.shape[2]
    page, half = key_pool.shape[2], cos.shape[1]
    assert key.shape == (tokens, kv_heads, width) and value.shape[:2] == (tokens, kv_heads)
    assert key_pool.shape[1:] == (kv_heads, page, width) and value_pool.shape[1:] == (
        kv_heads,
        page,
        value_width,
    )
    assert sin.shape == cos.shape and 0 < 2 * half <= width
    assert (query_norm is None) == (key_norm is None) and (key_scale is None) == (value_scale is None)
    assert all(part.stride(-1) == 1 for part in (query, key, value, cos, sin, key_pool, value_pool))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    assert out.shape == query.shape and out.stride(-1) == 1
    block_heads = _block_heads(max(width, value_width), max(query_heads, kv_heads))
    blocks = triton.cdiv(query_heads, block_heads) + 2 * triton.cdiv(kv_heads, block_heads)
    if tokens:
        rope_kv_write_kernel[(tokens, blocks)](
            *(query, key, value, cos, sin, positions, query_norm, key_norm, key_scale, value_scale, slots),
            *(out, key_pool, value_pool, epsilon),
            *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0), sin.stride(0)),
            *(*out.stride()[:2], *key_pool.stride()[:3], *value_pool.stride()[:3]),
            QUERY_HEADS=query_heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            HALF=half,
            PAGE=page,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(width - 2 * half),
            BLOCK_VALUE=triton.next_power_of_2(value_width),
            INTERLEAVED=interleaved,
            BY_POSITION=positions is not None,
            HAS_NORM=query_norm is not None,
            ONE_PLUS=one_plus,
            LARGEST=0.0 if key_scale is None else torch.finfo(key_pool.dtype).max,
            KEY_SCALE_STRIDE=0 if key_scale is None or key_scale.numel() == 1 else 1,
            VALUE_SCALE_STRIDE=0 if value_scale is None or value_scale.numel() == 1 else 1,
            num_warps=2,
        )
    return out


def _block_heads(width: int, heads: int) -> int:
    """Heads of one program."""
    return max(1, min(_ELEMENTS // triton.next_power_of_2(width), triton.next_power_of_2(heads)))


def rope_kv_write_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 1e-6,
    one_plus: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """`rope_kv_write` in torch operations, in the dtype of its inputs (at least float32) between the roundings."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)

    def rotated(heads: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            heads = rms_norm_reference(heads, norm, epsilon, one_plus=one_plus)[0]
        turned, half = heads.to(wide, copy=True), cos.shape[-1]
        first, second = (
            (turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2])
            if interleaved
            else (turned[..., :half], turned[..., half : 2 * half])
        )
        new_first, new_second = first * cos - second * sin, second * cos + first * sin
        first.copy_(new_first)
        second.copy_(new_second)
        return turned

    def write(pool: Tensor, states: Tensor, scale: Tensor | None) -> None:
        if scale is not None:
            largest = torch.finfo(pool.dtype).max
            states = (states.to(wide) / scale.to(wide).unsqueeze(-1)).clamp(-largest, largest)
        kept = slots >= 0
        slot = slots[kept].long()
        pool[slot // pool.shape[2], :, slot % pool.shape[2]] = states[kept].to(pool.dtype)

    write(key_pool, rotated(key, key_norm), key_scale)
    write(value_pool, value, value_scale)
    return rotated(query, query_norm).to(query.dtype)


@triton.jit
def rope_kv_write_kernel(
    Query,  # [T, QUERY_HEADS, WIDTH]
    Key,  # [T, KV_HEADS, WIDTH]
    Value,  # [T, KV_HEADS, VALUE_WIDTH]
    Cos,  # [T or positions, HALF]
    Sin,
    Positions,  # [T] if BY_POSITION
    QueryNorm,  # [WIDTH] if HAS_NORM
    KeyNorm,
    KeyScale,  # [KV_HEADS] or [1], if LARGEST
    ValueScale,
    Slots,  # [T]
    Output,  # [T, QUERY_HEADS, WIDTH]
    KeyPool,  # [pages, KV_HEADS, PAGE, WIDTH]
    ValuePool,  # [pages, KV_HEADS, PAGE, VALUE_WIDTH]
    epsilon,
    stride_query_token,
    stride_query_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_cos,
    stride_sin,
    stride_output_token,
    stride_output_head,
    stride_key_page,
    stride_key_pool_head,
    stride_key_slot,
    stride_value_page,
    stride_value_pool_head,
    stride_value_slot,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HALF: tl.constexpr,  # half of the rotated dimensions
    PAGE: tl.constexpr,  # slots of a page
    BLOCK_HEADS: tl.constexpr,  # heads of one program
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # 0: every dimension is rotated
    BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BY_POSITION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    LARGEST: tl.constexpr,  # largest number of the pool's 8-bit format; 0: the pool is not scaled
    KEY_SCALE_STRIDE: tl.constexpr,
    VALUE_SCALE_STRIDE: tl.constexpr,
):
    """Program (t, b): BLOCK_HEADS heads of token t; blocks of query heads first, then of key, then of value heads."""
    QUERY_BLOCKS: tl.constexpr = (QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(Slots + token).to(tl.int64)
    table_row = token
    if BY_POSITION:
        table_row = tl.load(Positions + token).to(tl.int64)
    cos, sin = Cos + table_row * stride_cos, Sin + table_row * stride_sin
    if block < QUERY_BLOCKS:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        rotate_heads(
            *(Query + token * stride_query_token + head * stride_query_head, head < QUERY_HEADS),
            *(Output + token * stride_output_token + head * stride_output_head, 1.0),
            *(
                cos,
                sin,
                QueryNorm,
                epsilon,
                WIDTH,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                INTERLEAVED,
                HAS_NORM,
                ONE_PLUS,
            ),
            LARGEST=0.0,
        )
    elif slot >= 0:
        page, offset = slot // PAGE, slot % PAGE
        if block < QUERY_BLOCKS + KV_BLOCKS:
            head = (block - QUERY_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
            target = KeyPool + page * stride_key_page + offset * stride_key_slot + head * stride_key_pool_head
            scale = 1.0
            if LARGEST > 0:
                scale = tl.load(KeyScale + head * KEY_SCALE_STRIDE, mask=head < KV_HEADS, other=1.0)
            rotate_heads(
                *(Key + token * stride_key_token + head * stride_key_head, head < KV_HEADS, target, scale),
                *(
                    cos,
                    sin,
                    KeyNorm,
                    epsilon,
                    WIDTH,
                    HALF,
                    BLOCK_HALF,
                    BLOCK_REST,
                    INTERLEAVED,
                    HAS_NORM,
                    ONE_PLUS,
                ),
                LARGEST=LARGEST,
            )
        else:
            head = (block - QUERY_BLOCKS - KV_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
            column = tl.arange(0, BLOCK_VALUE)[None, :]
            inside = (head < KV_HEADS) & (column < VALUE_WIDTH)
            source = Value + token * stride_value_token + head * stride_value_head
            target = (
                ValuePool
                + page * stride_value_page
                + offset * stride_value_slot
                + head * stride_value_pool_head
            )
            scale = 1.0
            if LARGEST > 0:
                scale = tl.load(ValueScale + head * VALUE_SCALE_STRIDE, mask=head < KV_HEADS, other=1.0)
            states = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                target + column, stored_as(states, scale, ValuePool.dtype.element_ty, LARGEST), mask=inside
            )
