"""A pool's memory goes to the next pool of the same model, and never to two at once."""

from __future__ import annotations

import pytest
import torch

from batchllm.executor.kv_buffers import KeptBuffers, LayerKv

LAYERS = (LayerKv(heads=2, key_dim=6, value_dim=4), LayerKv(heads=1, key_dim=4, value_dim=4))


def test_memory_is_kept_once_its_borrower_is_gone() -> None:
    kept = KeptBuffers()
    first = kept.lend(LAYERS, 64, torch.float32)
    address = first.keys[1].data_ptr()
    del first
    second = kept.lend(LAYERS, 20, torch.float32)
    assert second.keys[1].data_ptr() == address
    assert [tuple(keys.shape) for keys in second.keys] == [(20, 2, 6), (20, 1, 4)]
    assert second.capacity == 20


def test_two_borrowers_at_once_have_memory_of_their_own() -> None:
    kept = KeptBuffers()
    first, second = (kept.lend(LAYERS, 8, torch.float32) for _ in range(2))
    first.keys[0].fill_(1.0)
    assert not second.keys[0].any()


@pytest.mark.parametrize(
    "other", [(LAYERS, 65, torch.float32), (LAYERS[:1], 64, torch.float32), (LAYERS, 64, torch.bfloat16)]
)
def test_memory_of_another_shape_is_new(other: tuple[tuple[LayerKv, ...], int, torch.dtype]) -> None:
    kept = KeptBuffers()
    first = kept.lend(LAYERS, 64, torch.float32)
    first.values[0].fill_(1.0)
    del first
    fresh = kept.lend(*other)
    assert (fresh.layers, fresh.capacity, fresh.dtype) == other
    assert not any(buffer.any() for buffer in (*fresh.keys, *fresh.values))


def test_released_memory_is_new_and_counts_as_free() -> None:
    kept = KeptBuffers()
    first = kept.lend(LAYERS, 64, torch.float32)
    first.keys[0].fill_(1.0)
    del first
    kept.release()
    assert not kept.lend(LAYERS, 64, torch.float32).keys[0].any()
