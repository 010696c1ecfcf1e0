"""Log-probabilities of given tokens, without the softmax, and without the logits where only these are wanted.

`token_logprobs` reads rows of logits once. `linear_token_logprobs` starts from hidden states and the weight of the
output projection: tile by tile the logits are computed, folded into a running log-sum-exp and forgotten, so a prompt
of T tokens needs no [T, V] matrix (online softmax: Milakov and Gimelshein 2018; fused with the projection as in Wijmans
et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter

_BLOCK = 4096  # logits that a program reads at once
_TILE_TOKENS, _TILE_VOCABULARY, _TILE_WIDTH = 128, 128, 64
_PROGRAMS = 264  # at least so many where there is work for them: two on each of 132 multiprocessors


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [n, V] (contiguous rows), tokens [n] (int32 or int64) → float32 [n], natural logarithms."""
    rows, vocabulary = logits.shape
    assert tokens.shape == (rows,) and tokens.is_contiguous() and logits.stride(1) == 1
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        token_logprobs_kernel[(rows,)](
            logits, tokens, logprobs, logits.stride(0), vocabulary, BLOCK=block, num_warps=8
        )
    return logprobs


def token_logprobs_reference(logits: Tensor, tokens: Tensor) -> Tensor:
    """`token_logprobs` in torch operations, in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(dim=-1).gather(1, tokens.long().unsqueeze(1)).squeeze(1)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """hidden [T, H], weight [V, H] of the same dtype, tokens [T] (int32 or int64) → float32 [T], natural logarithms.

    The logits are hidden @ weight.T x scale, then softcap x tanh(logits / softcap) if there is a softcap; products are
    summed in float32 and not rounded (a model in bfloat16 that rounds its logits is less exact). Rows may be strided.
    """
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    assert weight.shape[1] == width and weight.dtype == hidden.dtype and tokens.shape == (rows,)
    assert hidden.stride(1) == 1 and weight.stride(1) == 1 and tokens.is_contiguous()
    chosen = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if not rows:
        return chosen
    token_tiles = triton.cdiv(rows, _TILE_TOKENS)
    vocabulary_tiles = triton.cdiv(vocabulary, _TILE_VOCABULARY)
    parts = min(vocabulary_tiles, triton.cdiv(_PROGRAMS, token_tiles))
    tiles_of_part = triton.cdiv(vocabulary_tiles, parts)
    parts = triton.cdiv(vocabulary_tiles, tiles_of_part)  # none without tiles
    sums = torch.empty((parts, rows), dtype=torch.float32, device=hidden.device)
    linear_token_logprobs_kernel[(token_tiles, parts)](
        *(hidden, weight, tokens, chosen, sums, rows, vocabulary, hidden.stride(0), weight.stride(0)),
        *(tiles_of_part, scale, softcap or 1.0),
        WIDTH=width,
        SOFTCAP=softcap is not None,
        TILE_TOKENS=_TILE_TOKENS,
        TILE_VOCABULARY=_TILE_VOCABULARY,
        TILE_WIDTH=_TILE_WIDTH,
        UPCAST=interpreter.INTERPRETED,
        num_warps=8,
        num_stages=3,
    )
    return chosen - torch.logsumexp(sums, dim=0)


def linear_token_logprobs_reference(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`linear_token_logprobs` in torch operations, by way of all logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs_reference(logits, tokens)


@triton.jit
def token_logprobs_kernel(
    Logits,  # [n, vocabulary]
    Tokens,  # [n]
    Logprobs,  # [n]
    stride_logits,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """One row per program: running maximum and sum."""
    row = tl.program_id(0).to(tl.int64)
    logits = Logits + row * stride_logits
    largest, total = float("-inf"), 0.0
    for start in tl.range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        block = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(block, axis=0))
        # While all are -inf, a finite reference point keeps -inf - -inf out.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(block - reference), axis=0)
        largest = new_largest
    chosen = tl.load(logits + tl.load(Tokens + row)).to(tl.float32)
    tl.store(Logprobs + row, chosen - largest - tl.log(total))


@triton.jit
def linear_token_logprobs_kernel(
    Hidden,  # [rows, WIDTH]
    Weight,  # [vocabulary, WIDTH]
    Tokens,  # [rows]
    Chosen,  # [rows] out: the logit of each row's token
    Sums,  # [parts, rows] out: log-sum-exp over each part of the vocabulary
    rows,
    vocabulary,
    stride_hidden,
    stride_weight,
    tiles_of_part,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_VOCABULARY: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (t, p): TILE_TOKENS rows against a part of the vocabulary. Neighbours read the same weights."""
    row = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    part = tl.program_id(1)
    in_rows = row < rows
    token = tl.load(Tokens + row, mask=in_rows, other=-1).to(tl.int32)
    hidden = Hidden + row.to(tl.int64)[:, None] * stride_hidden
    largest = tl.full((TILE_TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_TOKENS,), tl.float32)
    chosen = tl.zeros((TILE_TOKENS,), tl.float32)
    first = part * tiles_of_part * TILE_VOCABULARY
    for start in tl.range(
        first, tl.minimum(first + tiles_of_part * TILE_VOCABULARY, vocabulary), TILE_VOCABULARY
    ):
        entry = start + tl.arange(0, TILE_VOCABULARY)
        in_vocabulary = entry < vocabulary
        weight = Weight + entry.to(tl.int64)[None, :] * stride_weight
        logits = tl.zeros((TILE_TOKENS, TILE_VOCABULARY), tl.float32)
        for offset in tl.range(0, WIDTH, TILE_WIDTH):
            column = offset + tl.arange(0, TILE_WIDTH)
            in_width = column < WIDTH
            left = tl.load(hidden + column[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0)
            right = tl.load(
                weight + column[:, None], mask=in_vocabulary[None, :] & in_width[:, None], other=0.0
            )
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            logits = tl.dot(left, right, logits, input_precision="ieee")
        logits *= scale
        if SOFTCAP:
            logits = softcap * (2.0 / (1.0 + tl.exp(-2.0 / softcap * logits)) - 1.0)  # tanh
        chosen += tl.sum(tl.where(entry[None, :] == token[:, None], logits, 0.0), axis=1)
        logits = tl.where(in_vocabulary[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    tl.store(Sums + part * rows + row, largest + tl.log(total), mask=in_rows)
    here = (token >= first) & (token < first + tiles_of_part * TILE_VOCABULARY)
    tl.store(Chosen + row, chosen, mask=in_rows & here)
