"""Layers that are one call give the numbers of the same layers part by part, and stay out where they do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchllm_kernels.cpu.decoder_layer import DecoderLayer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from batchllm.executor.attention_native import NativeStepAttention
from batchllm.executor.fused_layer import FusedDecoderLayer
from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.native import native_kernels
from batchllm.executor.parity import _run_flat
from batchllm.executor.step import StepBatch
from tests.executor.tiny_models import COMMON, make_model
from tests.native import needs_kernels

pytestmark = needs_kernels
LAYERS = COMMON["num_hidden_layers"]
SEQUENCES = [np.arange(length) + 3 for length in (33, 21, 5)]


def runner(config: Any, **options: Any) -> ModelRunner:
    model = make_model(config(**{**COMMON, **options})).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    found = prepare_model(model)
    assert found.fuse(packed=True)
    return found


def fused(model: ModelRunner) -> list[FusedDecoderLayer]:
    return [layer for layer in model.model.modules() if isinstance(layer, FusedDecoderLayer)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every layer that was one call."""
    found: list[int] = []
    run = DecoderLayer.run

    def counting(self: DecoderLayer, step: Any, *arguments: Any) -> None:
        found.append(step.step.rows)
        run(self, step, *arguments)

    monkeypatch.setattr(DecoderLayer, "run", counting)
    return found


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True}),
        (MistralConfig, {"sliding_window": 7}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 16}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ],
)
def test_one_call_is_the_layer_part_by_part(config: Any, options: dict[str, Any], calls: list[int]) -> None:
    model = runner(config, **options)
    found = _run_flat(model, SEQUENCES)
    assert (
        len(calls) >= 4 * (LAYERS - 1) and max(calls) > 20
    )  # four steps; the last layer where all logits are read
    for layer in fused(model):
        layer.whole = None
    calls.clear()
    for whole, by_parts in zip(found, _run_flat(model, SEQUENCES)):
        assert torch.equal(whole, by_parts)
    assert not calls


def test_layers_with_parts_of_their_own_are_not_one_call() -> None:
    assert all(layer.whole is None for layer in fused(runner(LlamaConfig, mlp_bias=True)))


def test_unpacked_layers_are_no_longer_one_call() -> None:
    model = runner(LlamaConfig)
    layers = fused(model)
    assert all(layer.whole is not None for layer in layers)
    model.unfuse()
    assert all(layer.whole is None for layer in layers)


def step_over(layer: LayerKv, copies: int) -> NativeStepAttention:
    kernels = native_kernels(torch.bfloat16)
    assert kernels is not None
    pool = KvPool(KvBuffers.empty((layer,), 16, torch.bfloat16))
    numbers, none = np.arange(2), np.zeros(0, dtype=np.int64)
    copied = np.arange(copies)
    batch = StepBatch(numbers, numbers, numbers, copied, copied + 8, [], [], none, [], [], 2, 0)
    return NativeStepAttention(kernels, pool, batch)


def test_only_steps_that_write_whole_slots_and_nothing_else_are_for_it() -> None:
    assert step_over(LayerKv(2, 8, 8), copies=0).plain_pool(0, 2, 8) is not None
    assert step_over(LayerKv(2, 8, 8), copies=3).plain_pool(0, 2, 8) is None
    assert step_over(LayerKv(2, 8, 6), copies=0).plain_pool(0, 2, 6) is None
