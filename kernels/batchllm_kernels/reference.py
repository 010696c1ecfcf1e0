"""Runs a tile plan in torch, tile by tile: what the kernels compute, for any device and without triton.

It reads the same arrays as the kernels and makes the same parts, so that a wrong plan gives a wrong result here too.
Slow: one small product per tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchllm_kernels.tile_plan import TilePlan


def reference_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    plan: TilePlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [T, Hq, Dk]; pools [pages, Hkv, page_size, D]; positions [T]; sinks [Hq] → [T, Hq, Dv].

    Computes in query's dtype, parts and merge included; use float64 for an oracle.
    """
    rows, heads, _ = query.shape
    output = query.new_zeros(rows, heads, values.shape[-1])
    part_output = query.new_zeros(plan.num_slots, heads, values.shape[-1])
    part_lse = query.new_zeros(plan.num_slots, heads)
    for first_row, count, first_entry, _, end_entry, *_ in plan.tiles.tolist():
        members = torch.from_numpy(plan.tile_rows[first_row : first_row + count]).long()
        slots = torch.from_numpy(plan.tile_slots[first_row : first_row + count]).long()
        entries = slice(first_entry, end_entry)
        key, value, key_position = _gathered(keys, values, plan, entries, query.dtype)
        seen = key_position[None, :] <= positions[members][:, None]
        if window is not None:
            seen &= key_position[None, :] > positions[members][:, None] - window
        tile_output, tile_lse = _attend(query[members], key, value, seen, scale, softcap)
        is_part = slots >= 0
        part_output[slots[is_part]], part_lse[slots[is_part]] = tile_output[is_part], tile_lse[is_part]
        if sinks is not None:
            tile_output = tile_output * torch.sigmoid(tile_lse - sinks.to(query.dtype)).unsqueeze(-1)
        output[members[~is_part]] = tile_output[~is_part]
    for row, begin, end in zip(plan.merge_rows, plan.merge_ptr[:-1], plan.merge_ptr[1:]):
        output[row] = reference_merge(part_output[begin:end], part_lse[begin:end], sinks)
    return output


def reference_merge(parts: Tensor, lses: Tensor, sinks: Tensor | None = None) -> Tensor:
    """parts [n, Hq, Dv] with LSE [n, Hq] of one row → [Hq, Dv]. Parts that saw no key have LSE -inf."""
    if sinks is not None:
        parts = torch.cat([parts, parts.new_zeros(1, *parts.shape[1:])])
        lses = torch.cat([lses, sinks.to(lses.dtype).unsqueeze(0)])
    weights = torch.exp(lses - torch.logsumexp(lses, dim=0)).nan_to_num(nan=0.0)
    return (weights.unsqueeze(-1) * parts).sum(dim=0)


def _gathered(
    keys: Tensor, values: Tensor, plan: TilePlan, entries: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [Hkv, n, Dk], values [Hkv, n, Dv] and positions [n] of the readable tokens on a tile's pages."""
    pages = torch.from_numpy(plan.entry_pages[entries]).long()
    first = torch.from_numpy(plan.entry_positions[entries]).long()
    fill = torch.from_numpy(plan.entry_fills[entries]).long()
    index = torch.arange(keys.shape[2])
    readable = index[None, :] < fill[:, None]
    key = keys[pages].to(dtype).transpose(0, 1)[:, readable]
    value = values[pages].to(dtype).transpose(0, 1)[:, readable]
    return key, value, (first[:, None] + index[None, :])[readable]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """query [n, Hq, Dk] over key [Hkv, L, Dk]; seen [n, L] → output [n, Hq, Dv] and LSE [n, Hq]."""
    rows, heads, dim = query.shape
    kv_heads = key.shape[0]
    grouped = query.view(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nhgd,hld->nhgl", grouped, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
    # A position that nobody sees may not have been written: zero times NaN would be NaN.
    value = torch.where(seen.any(dim=0)[None, :, None], value, 0.0)
    output = torch.einsum("nhgl,hld->nhgd", weights, value)
    return output.reshape(rows, heads, -1), lse.reshape(rows, heads)
