"""What a step computes lies in its slots of the pool, by torch and by the kernel in C, however it came."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from batchllm.executor.attention_native import NativeWriter
from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.kv_pool import KvPool, KvWriter
from batchllm.executor.native import native_kernels
from batchllm.executor.step import StepBatch
from tests.native import needs_kernels

BF16 = torch.bfloat16
TOKENS, HEADS, CAPACITY = 23, 3, 64


def part_of_product(dim: int) -> Tensor:
    """[heads, T, dim] as a joined product of queries, keys and values holds it."""
    return (
        torch.randn(TOKENS, 2 * HEADS * dim + 2)
        .to(BF16)[:, : HEADS * dim]
        .view(TOKENS, HEADS, dim)
        .transpose(0, 1)
    )


def head_by_head(dim: int) -> Tensor:
    return torch.randn(HEADS, TOKENS, dim).to(BF16)


def batch_of(random: np.random.Generator) -> StepBatch:
    slots = random.permutation(CAPACITY)
    empty = np.zeros(0, dtype=np.int64)
    return StepBatch(
        *(np.arange(TOKENS), np.arange(TOKENS), slots[:TOKENS], slots[:5], slots[-5:]),
        *([], [], empty, [], [], TOKENS, 0),
    )


@needs_kernels
@pytest.mark.parametrize("layout", [part_of_product, head_by_head])
@pytest.mark.parametrize("dims", [(64, 64), (6, 6), (6, 4)])
def test_kernel_and_torch_store_the_same(layout: Callable[[int], Tensor], dims: tuple[int, int]) -> None:
    kernels = native_kernels(BF16)
    assert kernels is not None
    torch.manual_seed(0)
    batch = batch_of(np.random.default_rng(0))
    key, value = layout(dims[0]), layout(dims[1])
    layer = LayerKv(HEADS, *dims)
    stored = []
    for by_kernel in (False, True):
        pool = KvPool(KvBuffers.empty((layer, layer), CAPACITY, BF16))
        writer = NativeWriter(kernels, pool, batch) if by_kernel else KvWriter(pool, batch)
        writer.write(1, key, value)
        assert not pool.keys[0].any() and not pool.values[0].any()
        stored.append((pool.keys[1], pool.values[1]))
    for plain, native in zip(*stored):
        assert torch.equal(plain, native)
    slots = torch.from_numpy(batch.slots)
    assert torch.equal(stored[1][0][slots], key.transpose(0, 1))
    assert torch.equal(stored[1][1][slots][..., : dims[1]], value.transpose(0, 1))
    assert torch.equal(stored[1][0][batch.copy_to], stored[1][0][batch.copy_from])
