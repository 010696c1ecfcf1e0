"""The C kernel where scores rise from block to block: weights that count from an earlier largest score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchllm_kernels.cpu.attention import TiledReads, attend, make_job
from torch import Tensor

from batchllm.executor.native import native_kernels
from tests.native import needs_kernels

ROWS, KEYS, BLOCK = 13, 1100, 256
BF16 = torch.bfloat16


def attended(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> Tensor:
    """All rows see all keys: query [n, heads, D], keys and values [n, 1, D]."""
    kernels = native_kernels(BF16)
    assert kernels is not None
    reads = TiledReads(
        np.arange(len(query)),
        np.full(len(query), len(keys)),
        np.array([0, len(query)]),
        np.array([0, 1]),
        np.array([[0, len(query), 0, 0, len(keys)]]),
    )
    output = torch.empty(*query.shape[:2], values.shape[-1], dtype=BF16)
    attend(kernels, make_job(reads, query, keys, values, output, scale=1.0, sinks=sinks))
    return output


def exact(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> Tensor:
    scores = query.double() @ keys[:, 0].double().T
    extra = torch.empty(*scores.shape[:2], 0) if sinks is None else sinks.double().view(1, -1, 1)
    joined = torch.cat((scores, extra.expand(len(query), -1, -1)), dim=-1)
    return torch.softmax(joined, dim=-1)[..., : len(keys)] @ values[:, 0].double()


@needs_kernels
@pytest.mark.parametrize("dim", [64, 128, 96])
@pytest.mark.parametrize("rise", [0.0, 15.0, 35.0, 50.0, 90.0, -35.0, 1000.0])
def test_scores_that_rise_with_every_block(dim: int, rise: float) -> None:
    """By less and by more than what weights may count from: 60 in powers of two are 41.6."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(ROWS, 4, dim, generator=generator)
    keys, values = (torch.randn(KEYS, 1, dim, generator=generator) for _ in range(2))
    query[..., 0], keys[..., 0] = 1.0, (torch.arange(KEYS) // BLOCK * rise)[:, None]
    query, keys, values = query.to(BF16), keys.to(BF16), values.to(BF16)
    difference = (attended(query, keys, values).double() - exact(query, keys, values)).abs().max()
    assert difference < 0.02


@needs_kernels
@pytest.mark.parametrize("sink", [-100.0, 0.0, 20.0, 200.0])
def test_sinks_far_below_and_above_all_scores(sink: float) -> None:
    """A sink is what the first weights count from."""
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS, 4, 64), *[(KEYS, 1, 64)] * 2)
    )
    query, keys, values = (query / 2).to(BF16), keys.to(BF16), values.to(BF16)
    sinks = torch.full((4,), sink)
    difference = (
        (attended(query, keys, values, sinks).double() - exact(query, keys, values, sinks)).abs().max()
    )
    assert difference < 0.02
