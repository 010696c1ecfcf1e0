"""The largest few logits by the kernel in C: what a stable sort of all would give."""

from __future__ import annotations

import pytest
import torch
from batchllm_kernels.cpu.largest import take_largest
from torch import Tensor

from batchllm.executor.native import native_kernels
from batchllm.executor.sampler import largest_logits
from tests.native import needs_kernels

pytestmark = needs_kernels
SIZES = [
    (1, 1),
    (5, 5),
    (16, 3),
    (17, 17),
    (100, 30),
    (1000, 1),
    (1003, 20),
    (1200, 257),
    (4999, 257),
    (300, 299),
]


def normal(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def assert_sorted(logits: Tensor, count: int) -> None:
    kernels = native_kernels(torch.bfloat16)
    assert kernels is not None
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    found, ids = largest_logits(logits, count)
    assert torch.equal(found, values[:, :count]) and torch.equal(ids, tokens[:, :count])
    found, ids = take_largest(kernels, logits, count)
    assert (ids.diff(dim=-1) > 0).all() and torch.equal(found, logits.gather(1, ids))


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_any_numbers(size: int, count: int) -> None:
    logits = normal(40, size)
    assert_sorted(logits, count)
    assert_sorted(logits * 1e30, count)
    assert_sorted(-logits.abs(), count)


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_equal_numbers(size: int, count: int) -> None:
    """As logits in bfloat16 are; of both zeros none is the larger."""
    logits = normal(40, size)
    assert_sorted(logits.round(), count)
    assert_sorted(torch.zeros(40, size).copysign(logits), count)


@pytest.mark.parametrize("allowed", [0, 1, 100, 256, 257, 258, 600])
def test_tokens_ruled_out(allowed: int) -> None:
    logits = normal(30, 2100)
    order = normal(30, 2100, seed=1).argsort(dim=-1)
    assert_sorted(logits.scatter_(1, order[:, allowed:], float("-inf")), 257)


def test_rows_apart_and_none() -> None:
    wide = normal(9, 3000)
    assert_sorted(wide[:, 100:2501], 257)
    assert_sorted(wide[:1].expand(4, -1), 20)
    assert_sorted(wide[:0], 20)


def test_nan_does_no_harm() -> None:
    logits = normal(4, 600)
    logits[0], logits[1] = float("nan"), -torch.tensor(float("nan"))
    logits[2, 5] = float("nan")
    _, tokens = largest_logits(logits, 257)
    assert all(len(set(row)) == 257 and min(row) >= 0 and max(row) < 600 for row in tokens.tolist())
