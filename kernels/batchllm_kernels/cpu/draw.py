"""Tokens drawn at a temperature: the binding of `draw.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, counts


def draw(kernels: ctypes.CDLL, logits: Tensor, rows: Tensor, temperature: Tensor, words: Tensor) -> Tensor:
    """logits float32 [.., V], of these the rows int64 [n]; temperature float32 [n], words int32 [n, 2] → tokens [n].

    A token is the one with the largest logit / temperature + noise if it leads by more than what rounding can come to
    (1e-4), however either is computed; else it is -1, as it is where logits are no numbers.
    """
    assert logits.dtype == temperature.dtype == torch.float32 and words.dtype == torch.int32
    assert logits.stride(1) == 1 and words.is_contiguous() and temperature.is_contiguous()
    tokens = torch.empty(len(rows), dtype=torch.int64)
    kernels.batchllm_draw(
        *map(address, (logits, rows, temperature, words, tokens)),
        *counts(len(rows), logits.shape[1], logits.stride(0)),
    )
    return tokens


def stand(kernels: ctypes.CDLL, logits: Tensor, rows: Tensor, temperature: Tensor, tokens: Tensor) -> Tensor:
    """Where drawn tokens [n], of the same rows, stand among the others: float32 [n, 3] weights.

    That of the tokens with a larger scaled logit, or one less than 1e-4 below; the token's own; that of all. They are
    shares of the largest logit's; sums of up to 250,000 err by less than 1e-3 of themselves, and mostly by 1e-6. Rows
    with a negative token have zeros.
    """
    assert logits.dtype == temperature.dtype == torch.float32
    assert logits.stride(1) == 1 and tokens.is_contiguous() and temperature.is_contiguous()
    weights = torch.zeros(len(rows), 3)
    kernels.batchllm_stand(
        *map(address, (logits, rows, temperature, tokens, weights)),
        *counts(len(rows), logits.shape[1], logits.stride(0)),
    )
    return weights
