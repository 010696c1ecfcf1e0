"""Attention of one step as work tiles: decode tokens, every level of a prefix tree and prompt chunks in one launch.

A tile (see tile_plan) is a set of query rows and a list of KV pages. One program runs one tile for one KV head, with
all query heads of that KV head packed into the rows of the matrix products. The softmax is computed online (Milakov
and Gimelshein 2018; Dao 2022). A tile's pages come in two runs: pages that every row sees whole, without any masking,
then those that need a mask (partly filled, causal edge, window edge); a softmax does not care about their order.

A row that is read in several tiles leaves one part per tile, an output and its log-sum-exp; `merge` puts them
together. Small and large tiles are in the same launch, so that tiles which wait for memory and tiles which compute
share a multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MINUS_INFINITY = tl.constexpr(float("-inf"))
LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def attend_tiles(
    query,  # [T, Hq, DIM]
    keys,  # pool of pages: a pointer, or a tensor descriptor whose block is one page of one head
    values,
    output,  # [T, Hq, VALUE_DIM]: rows with one part
    part_output,  # [slots, Hq, VALUE_DIM], contiguous: rows with several
    part_lse,  # [slots, Hq] float32, natural logarithm, contiguous
    sinks,  # [Hq], any pointer without HAS_SINKS
    tiles,  # int32 [capacity, 8]; tile_plan.TilePlan
    num_tiles,  # int32 [1]: how many of them are used, read on the device
    tile_rows,
    tile_slots,
    positions,  # int32 [T]
    entry_pages,
    entry_positions,
    entry_fills,
    key_scales,  # [KV_HEADS] or [1] float32: key = scale * stored, any pointer without HAS_SCALES
    value_scales,
    score_scale,  # of query · key, natural units
    softcap,
    query_row_stride,
    query_head_stride,
    key_page_stride,  # in elements; for descriptors rows a page, rows a head, columns a head
    key_head_stride,
    key_token_stride,
    value_page_stride,
    value_head_stride,
    value_token_stride,
    output_row_stride,
    output_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    GROUP_SPLITS: tl.constexpr,  # programs that share them, where the group is larger than a tile
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SMALL_ROWS: tl.constexpr,
    LARGE_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,  # 1: a scale for each KV head, 0: one for all
    DESCRIPTORS: tl.constexpr,
    DOT_TYPE: tl.constexpr,  # operands of the matrix products
    STAGES: tl.constexpr,  # of the loop without masks; page ids are loaded first, so 5 gives two KV buffers
):
    """Grid: (capacity * KV_HEADS * GROUP_SPLITS,). Programs beyond `num_tiles` end at once."""
    HEAD_PROGRAMS: tl.constexpr = KV_HEADS * GROUP_SPLITS
    program = tl.program_id(0)
    if program < tl.load(num_tiles) * HEAD_PROGRAMS:
        tile = tiles + (program // HEAD_PROGRAMS) * 8
        head_program = program % HEAD_PROGRAMS
        if tl.load(tile + 5) == 0:
            _attend_tile(
                query, keys, values, output, part_output, part_lse, sinks, tile, head_program, tile_rows, tile_slots,
                positions, entry_pages, entry_positions, entry_fills, key_scales, value_scales, score_scale, softcap,
                query_row_stride, query_head_stride, key_page_stride, key_head_stride, key_token_stride,
                value_page_stride, value_head_stride, value_token_stride, output_row_stride, output_head_stride,
                KV_HEADS, GROUP, GROUP_SPLITS, DIM, VALUE_DIM, PAGE, SMALL_ROWS,
                WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_SCALES, SCALE_STRIDE, DESCRIPTORS, DOT_TYPE, STAGES,
            )  # fmt: skip
        else:
            _attend_tile(
                query, keys, values, output, part_output, part_lse, sinks, tile, head_program, tile_rows, tile_slots,
                positions, entry_pages, entry_positions, entry_fills, key_scales, value_scales, score_scale, softcap,
                query_row_stride, query_head_stride, key_page_stride, key_head_stride, key_token_stride,
                value_page_stride, value_head_stride, value_token_stride, output_row_stride, output_head_stride,
                KV_HEADS, GROUP, GROUP_SPLITS, DIM, VALUE_DIM, PAGE, LARGE_ROWS,
                WINDOW, HAS_SOFTCAP, HAS_SINKS, HAS_SCALES, SCALE_STRIDE, DESCRIPTORS, DOT_TYPE, STAGES,
            )  # fmt: skip


@triton.jit
def _attend_tile(
    query, keys, values, output, part_output, part_lse, sinks, tile, head_program, tile_rows, tile_slots,
    positions, entry_pages, entry_positions, entry_fills, key_scales, value_scales, score_scale, softcap,
    query_row_stride, query_head_stride, key_page_stride, key_head_stride, key_token_stride,
    value_page_stride, value_head_stride, value_token_stride, output_row_stride, output_head_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_SPLITS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SCALES: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DOT_TYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile for the query heads of one KV head. Packed row r is row r // HEADS of the tile, head r % HEADS."""
    HEADS: tl.constexpr = (GROUP + GROUP_SPLITS - 1) // GROUP_SPLITS
    # 16 at least: what a matrix product sums over on NVIDIA's chips.
    BLOCK_DIM: tl.constexpr = 16 if DIM < 16 else triton.next_power_of_2(DIM)
    BLOCK_VALUE: tl.constexpr = 16 if VALUE_DIM < 16 else triton.next_power_of_2(VALUE_DIM)
    packed = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    value_dims = tl.arange(0, BLOCK_VALUE)
    key_of_page = tl.arange(0, PAGE)

    first_row = tl.load(tile)
    first_entry = tl.load(tile + 2)
    first_masked = tl.load(tile + 3)
    end_entry = tl.load(tile + 4)
    kv_head = head_program // GROUP_SPLITS
    head_in_group = (head_program % GROUP_SPLITS) * HEADS + packed % HEADS
    is_row = (packed // HEADS < tl.load(tile + 1)) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    row = tl.load(tile_rows + first_row + packed // HEADS, mask=is_row, other=0).to(tl.int64)
    position = tl.load(positions + row, mask=is_row, other=0)
    q = tl.load(
        query + (row * query_row_stride + head * query_head_stride)[:, None] + dims[None, :],
        mask=is_row[:, None] & (dims < DIM)[None, :],
        other=0.0,
    ).to(DOT_TYPE)

    value_scale = 1.0
    if HAS_SCALES:
        score_scale *= tl.load(key_scales + kv_head * SCALE_STRIDE)
        value_scale = tl.load(value_scales + kv_head * SCALE_STRIDE)
    total = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], MINUS_INFINITY, tl.float32)
    for entry in tl.range(first_entry, first_masked, num_stages=STAGES):
        page = tl.load(entry_pages + entry)
        k = _page(
            keys, page, kv_head, key_page_stride, key_head_stride, key_token_stride, PAGE, DIM, DESCRIPTORS
        )
        v = _page(
            values,
            page,
            kv_head,
            value_page_stride,
            value_head_stride,
            value_token_stride,
            PAGE,
            VALUE_DIM,
            DESCRIPTORS,
        )
        scores = _scores(q, k.to(DOT_TYPE), score_scale, softcap, HAS_SOFTCAP)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        weight = weight * shrink + tl.sum(p, 1)
        total = tl.dot(p.to(DOT_TYPE), v.to(DOT_TYPE), total * shrink[:, None], input_precision="ieee")
        highest = new_highest

    last_position = tl.max(position, 0)
    for entry in tl.range(first_masked, end_entry, num_stages=1):
        page = tl.load(entry_pages + entry)
        k = _page(
            keys, page, kv_head, key_page_stride, key_head_stride, key_token_stride, PAGE, DIM, DESCRIPTORS
        )
        v = _page(
            values,
            page,
            kv_head,
            value_page_stride,
            value_head_stride,
            value_token_stride,
            PAGE,
            VALUE_DIM,
            DESCRIPTORS,
        )
        key_position = tl.load(entry_positions + entry) + key_of_page
        written = (key_of_page < tl.load(entry_fills + entry)) & (key_position <= last_position)
        visible = written[None, :] & (key_position[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (key_position[None, :] > position[:, None] - WINDOW)
        # A weight of zero times whatever an unwritten slot holds, NaN perhaps, must be zero.
        v = tl.where(written[:, None], v.to(DOT_TYPE), 0.0)
        scores = _scores(q, k.to(DOT_TYPE), score_scale, softcap, HAS_SOFTCAP)
        scores = tl.where(visible, scores, MINUS_INFINITY)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        shift = tl.where(new_highest == MINUS_INFINITY, 0.0, new_highest)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(highest - shift)
        weight = weight * shrink + tl.sum(p, 1)
        total = tl.dot(p.to(DOT_TYPE), v, total * shrink[:, None], input_precision="ieee")
        highest = new_highest

    slot = tl.load(tile_slots + first_row + packed // HEADS, mask=is_row, other=0)
    is_part = is_row & (slot >= 0)
    divisor = tl.where(weight > 0, weight, 1.0)
    lse = tl.where(weight > 0, (highest + tl.log2(divisor)) * LN_2, MINUS_INFINITY)
    place = slot.to(tl.int64) * (KV_HEADS * GROUP) + head
    part = total * (value_scale / divisor)[:, None]
    tl.store(part_lse + place, lse, mask=is_part)
    kept = part
    if part_output.dtype.element_ty == tl.float16:
        kept = tl.clamp(part, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    tl.store(
        part_output + place[:, None] * VALUE_DIM + value_dims[None, :],
        kept.to(part_output.dtype.element_ty),
        mask=is_part[:, None] & (value_dims < VALUE_DIM)[None, :],
    )
    if HAS_SINKS:
        # A sink is one more key without a value: it only takes its share of the softmax.
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        shift = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - shift)
        part = total * (value_scale * shrink / (weight * shrink + tl.exp2(sink - shift)))[:, None]
    tl.store(
        output + (row * output_row_stride + head * output_head_stride)[:, None] + value_dims[None, :],
        part.to(output.dtype.element_ty),
        mask=(is_row & (slot < 0))[:, None] & (value_dims < VALUE_DIM)[None, :],
    )


@triton.jit
def _scores(q, k, score_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log 2, so that exp2 can be used: [rows, PAGE] float32."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:
        # cap * tanh(x / cap), tanh from exp2: tanh(y) = 1 - 2 / (e^2y + 1)
        power = tl.exp2(products * (score_scale / softcap * 2.0 * LOG2_E))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (power + 1.0))
    else:
        return products * (score_scale * LOG2_E)


@triton.jit
def _page(
    pool, page, kv_head, page_stride, head_stride, token_stride,
    PAGE: tl.constexpr, DIM: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[PAGE, DIM rounded up to a power of two, 16 at least], zeros beyond DIM."""
    if DESCRIPTORS:
        return pool.load([page * page_stride + kv_head * head_stride, kv_head * token_stride])
    else:
        BLOCK_DIM: tl.constexpr = 16 if DIM < 16 else triton.next_power_of_2(DIM)
        dims = tl.arange(0, BLOCK_DIM)
        start = pool + page.to(tl.int64) * page_stride + kv_head.to(tl.int64) * head_stride
        pointers = start + tl.arange(0, PAGE)[:, None] * token_stride + dims[None, :]
        if BLOCK_DIM == DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
