"""The C kernel where few queries read a stretch of KV: keys and values are taken as they lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchllm_kernels.cpu.attention import TiledReads, attend, make_job
from torch import Tensor

from batchllm.executor.native import native_kernels
from tests.native import needs_kernels

BF16 = torch.bfloat16
FIRST = 7  # slot of the first key; what lies before and behind is not to be read


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def attended(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """query [n, heads, D] of the last n positions; keys and values [slots, KV heads, D], with others around them."""
    kernels = native_kernels(BF16)
    assert kernels is not None
    rows, count = len(query), len(keys) - 2 * FIRST
    reads = TiledReads(
        np.arange(rows),
        np.arange(count - rows, count),
        np.array([0, rows]),
        np.array([0, 1]),
        np.array([[0, rows, FIRST, 0, count]]),
    )
    output = torch.empty(*query.shape[:2], values.shape[-1], dtype=BF16)
    job = make_job(reads, query, keys, values, output, scale=0.125, window=window, softcap=softcap)
    attend(kernels, job)
    return output


def exact(query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None) -> Tensor:
    group, count = query.shape[1] // keys.shape[1], len(keys) - 2 * FIRST
    keys, values = (each[FIRST:-FIRST].double().repeat_interleave(group, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * 0.125
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(count - len(query), count)[:, None] - torch.arange(count)
    scores[:, (distance < 0) | (distance >= (window or count))] = -torch.inf
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), values)


@needs_kernels
@pytest.mark.parametrize(("rows", "group"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3), (1, 4)])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (128, 128), (96, 32), (32, 160), (80, 64), (64, 48)]
)
def test_few_queries_over_any_number_of_keys(rows: int, group: int, key_dim: int, value_dim: int) -> None:
    """The last two head sizes do not fill vectors: these are packed, as for many queries."""
    for count in (4, 5, 6, 7, 15, 16, 17, 49, 64, 255, 256, 257, 300):
        for window, softcap in ((None, None), (min(count, 37), None), (None, 5.0)):
            query = random(rows, 2 * group, key_dim, seed=count)
            keys, values = (
                random(count + 2 * FIRST, 2, dim, seed=count + dim) for dim in (key_dim, value_dim)
            )
            for each in (keys, values):
                each[:FIRST] = each[-FIRST:] = torch.nan
            found = attended(query, keys, values, window, softcap)
            difference = (found.double() - exact(query, keys, values, window, softcap)).abs().max()
            assert difference < 0.02, (count, window, softcap)
