"""Attention over one block of keys with its log-sum-exp, and the merge of two such results.

Softmax over a set of keys can be computed in parts: each part gives (output, LSE), and parts are combined by
their LSE (Milakov and Gimelshein 2018, online softmax; used for shared prefixes by Hydragen, Juravsky et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """query [B, H, n, D]; key, value [B, Hkv, L, D], H a multiple of Hkv → output [B, H, n, D], LSE [B, H, n].

    The LSE is float32, natural log. `mask` [B or 1, 1, n or 1, L] is additive, in query's dtype; `causal` needs
    n == L. Every query row must see at least one key: torch's kernel returns LSE 0 for a row that sees none.
    """
    if softcap is None:
        if mask is not None:
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        output, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return output, lse
    return _attend_softcapped(query, key, value, scale, mask, causal, softcap)


def _attend_softcapped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores are capped as `cap * tanh(score / cap)` (Gemma 2), which torch's kernel does not do."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    scores = torch.matmul(grouped, key.float().unsqueeze(2).transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask.float().unsqueeze(2)
    if causal:
        above = torch.ones(rows, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    output = torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), value.float().unsqueeze(2))
    return output.reshape(batch, heads, rows, -1).to(query.dtype), lse.reshape(batch, heads, rows)


def merge_into(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor | slice) -> None:
    """Adds a part to running results in place: output [T, H, D] and lse [T, H], float32, at `rows`.

    part [n, H, D] any dtype, part_lse [n, H] float32.
    """
    if isinstance(rows, slice):
        old, old_lse = output[rows], lse[rows]
    else:
        old, old_lse = output.index_select(0, rows), lse.index_select(0, rows)
    total = torch.logaddexp(old_lse, part_lse)
    merged = old * torch.exp(old_lse - total).unsqueeze(-1)
    merged += part * torch.exp(part_lse - total).unsqueeze(-1)
    if isinstance(rows, slice):
        output[rows], lse[rows] = merged, total
    else:
        output.index_copy_(0, rows, merged)
        lse.index_copy_(0, rows, total)
