"""Batched products of attention that write into place, shaped so that torch's CPU kernels make no hidden copies.

torch hands bfloat16 products to oneDNN, and copies a batched factor first unless it is contiguous, or the transpose of
something contiguous. It copies in the layout it is given, and transposing while copying is slow; a single product of
two matrices is never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANY_ROWS = 512  # from here on, a call for each matrix costs less than copying the weights


def scores(query: Tensor, keys: Tensor, cells: Tensor) -> None:
    """query [B, n, D] times keys [B, L, D] → cells [B, n, L], any strides."""
    torch.bmm(query, keys.contiguous().transpose(1, 2), out=cells)


def products(weights: Tensor, values: Tensor, output: Tensor) -> None:
    """weights [B, n, L] times values [B, L, D] → output [B, n, D], any strides."""
    torch.bmm(weights, values, out=output)


def add_product(weights: Tensor, values: Tensor, output: Tensor) -> None:
    """Adds weights [B, n, L] times values [B, L, D] to output [B, n, D], any strides."""
    if weights.shape[1] < _MANY_ROWS:
        output.baddbmm_(weights, values)
        return
    for rows, columns, total in zip(weights, values, output):
        total.addmm_(rows, columns)
