"""int8 linear layers: the same as torchao's own, in fused layers and in plain ones, alone and in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchllm.core import SamplingParams
from batchllm.errors import ModelError
from batchllm.executor import quantize
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.parity import check_parity
from batchllm.executor.quantize import (
    QUANTIZATIONS,
    Int8DynamicLinear,
    check_quantization,
    quantize_model,
)
from tests.executor.harness import run
from tests.executor.tiny_models import configurations, generate_alone, make_model

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

GREEDY = SamplingParams(max_tokens=6)
PROMPTS = [[5, 6, 7, 8, 9, 10 + i, 11, 12 + i % 3] for i in range(3)] + [[40, 41, 42]]
CONFIGS = {
    "int8_weight_only": torchao.Int8WeightOnlyConfig(),
    "int8_dynamic": torchao.Int8DynamicActivationInt8WeightConfig(),
}


def quantized(model_type: str, quantization: str) -> ModelRunner:
    runner = prepare_model(make_model(configurations()[model_type]))
    check_parity(runner)
    quantize_model(runner, quantization)
    return runner


def oracle(model_type: str, quantization: str) -> Any:
    """transformers' own model, its linear layers quantised by torchao alone."""
    model = make_model(configurations()[model_type])
    torchao.quantize_(
        model, CONFIGS[quantization], lambda module, name: type(module) is nn.Linear and "lm_head" not in name
    )
    return model


def assert_same(model: Any, prompt: list[int], ours: list[int], theirs: list[int], exact: bool) -> None:
    """Token for token; unless `exact`, two tokens that are as good as equally likely may be taken for each other.

    Where inputs are rounded to integers, a last bit of a float decides now and then which integer it is.
    """
    if ours == theirs:
        return
    assert not exact
    first = next(i for i, (left, right) in enumerate(zip(ours, theirs, strict=False)) if left != right)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *theirs[:first]]])).logits[0, -1]
    gap = logits[theirs[first]] - logits[ours[first]]
    assert gap < 0.02 * (logits.max() - logits.min())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])  # two with fused layers, one without
def test_greedy_tokens_are_those_of_the_quantised_transformers_model(
    model_type: str, quantization: str
) -> None:
    runner = quantized(model_type, quantization)
    assert runner.fused == (model_type != "gemma2")
    model = oracle(model_type, quantization)
    expected = [generate_alone(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    fused = run(runner, PROMPTS, GREEDY).results
    runner.unfuse()
    for results in (fused, run(runner, PROMPTS, GREEDY).results):
        for prompt, result, tokens in zip(PROMPTS, results, expected, strict=True):
            assert_same(model, prompt, list(result.tokens), tokens, exact=quantization == "int8_weight_only")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_logits_are_not_those_of_the_plain_model(quantization: str) -> None:
    ids = torch.tensor([PROMPTS[0]])
    plain, ours = make_model(configurations()["llama"]), oracle("llama", quantization)
    with torch.inference_mode():
        error = (plain(ids).logits - ours(ids).logits).abs().max() / plain(ids).logits.abs().max()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nothing_keeps_the_plain_weights_alive(quantization: str) -> None:
    runner = quantized("llama", quantization)
    linears = [
        module
        for name, module in runner.model.named_modules()
        if isinstance(module, nn.Linear | Int8DynamicLinear) and name != "lm_head"
    ]
    assert {linear.weight.qdata.dtype for linear in linears} == {torch.int8}
    memory = {linear.weight.qdata.untyped_storage().data_ptr() for linear in linears}
    assert len(memory) == 4 * len(runner.layers)  # q, k, v and gate, up are rows of the fused weights


def test_routers_and_output_projection_stay() -> None:
    runner = quantized("llama", "int8_weight_only")
    assert type(runner.model.lm_head.weight) is nn.Parameter
    model = nn.ModuleDict({"gate": nn.Linear(4, 2), "gate_proj": nn.Linear(4, 4)})
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    assert list(quantize._linears(model)) == ["gate_proj"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 600])  # 600: more than one block
def test_dynamic_linear_is_torchaos(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(96, 40, bias=bias)
    torchao.quantize_(linear, CONFIGS["int8_dynamic"])
    inputs = torch.randn(1, rows, 96) * torch.rand(rows, 1) * 9
    inputs[0, 0] = 0
    with torch.inference_mode():
        assert torch.equal(Int8DynamicLinear(linear)(inputs), linear(inputs))


def test_dynamic_linear_in_a_reduced_range() -> None:
    linear = nn.Linear(96, 40)
    torchao.quantize_(linear, torchao.Int8DynamicActivationInt8WeightConfig(reduce_range=True))
    inputs = torch.randn(5, 96)
    with torch.inference_mode():
        assert torch.equal(Int8DynamicLinear(linear)(inputs), linear(inputs))


def test_a_token_does_not_depend_on_what_is_beside_it() -> None:
    linear = nn.Linear(96, 40)
    torchao.quantize_(linear, CONFIGS["int8_dynamic"])
    fast = Int8DynamicLinear(linear)
    inputs = torch.randn(300, 96)
    with torch.inference_mode():
        together = fast(inputs)
        assert all(torch.equal(fast(inputs[i : i + 1])[0], together[i]) for i in range(0, 300, 37))


def test_bfloat16() -> None:
    linear = nn.Linear(96, 40, dtype=torch.bfloat16)
    torchao.quantize_(linear, CONFIGS["int8_dynamic"])
    inputs = torch.randn(9, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        ours, theirs = Int8DynamicLinear(linear)(inputs), linear(inputs)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # torchao rounds twice


def test_a_model_without_linear_layers_is_refused() -> None:
    runner = prepare_model(make_model(configurations()["gpt2"]))
    with pytest.raises(ModelError, match="model type gpt2 has no linear layers"):
        quantize_model(runner, "int8_dynamic")


def test_unknown_quantisation() -> None:
    with pytest.raises(ModelError, match="must be int8_weight_only or int8_dynamic, found 'int4'"):
        check_quantization("int4")


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install torchao"):
        check_quantization("int8_dynamic")
