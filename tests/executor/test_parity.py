"""The load-time self-check passes every supported model and catches attention that is broken in any one way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from batchllm.errors import ModelError
from batchllm.executor import attention_cpu, attention_own, attention_plan
from batchllm.executor.attention_math import scores
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.parity import check_parity
from tests.executor.tiny_models import configurations, make_model


@cache
def runner_of(architecture: str) -> ModelRunner:
    return prepare_model(make_model(configurations()[architecture]))


@pytest.mark.parametrize("architecture", sorted(configurations()))
def test_supported_models_pass(architecture: str) -> None:
    check_parity(runner_of(architecture))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass(dtype: torch.dtype) -> None:
    check_parity(prepare_model(make_model(configurations()["llama"]).to(dtype)))


def refuses(runner: ModelRunner) -> None:
    with pytest.raises(ModelError, match=f"model type {runner.model_type} .*differ from transformers' own"):
        check_parity(runner)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_attention_that_ignores_masks_is_caught(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_hidden(hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros(hidden.shape, dtype=dtype).unsqueeze(1)

    for module in (attention_own, attention_plan):
        monkeypatch.setattr(module, "additive_mask", nothing_hidden)
    refuses(runner_of(architecture))


def test_attention_that_scales_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(query: Tensor, keys: Tensor, cells: Tensor) -> None:
        scores(query * 1.1, keys, cells)

    monkeypatch.setattr(attention_cpu, "scores", unscaled)
    refuses(runner_of("llama"))


def test_values_of_a_shared_node_that_are_forgotten_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "add_product", lambda *args: None)
    refuses(runner_of("llama"))


def test_cells_without_a_key_that_are_counted_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu._LayerJob, "_hide", lambda *args: None)
    refuses(runner_of("llama"))


def test_sinks_that_are_ignored_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention_cpu.CpuStepAttention.attend

    def without_sinks(self: Any, *args: Any, sinks: Tensor | None, **options: Any) -> Tensor:
        return attend(self, *args, sinks=None, **options)

    monkeypatch.setattr(attention_cpu.CpuStepAttention, "attend", without_sinks)
    refuses(runner_of("gpt_oss"))


def test_a_window_that_is_ignored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_reads = attention_plan.plan_reads
    monkeypatch.setattr(
        attention_cpu,
        "plan_reads",
        lambda chunks, reads, _, *others: plan_reads(chunks, reads, None, *others),
    )
    refuses(runner_of("mistral"))


def test_a_model_with_broken_weights_is_refused() -> None:
    model = make_model(configurations()["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError):
        check_parity(prepare_model(model))


def test_the_check_leaves_our_attention_in_place() -> None:
    runner = runner_of("llama")
    check_parity(runner)
    assert runner.config._attn_implementation == "batchllm"
