"""int8 layers by the kernel in C: the numbers of torch's operations on torchao's integers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from batchllm.core import SamplingParams
from batchllm.executor import quantize
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.native_byte_linear import NativeByteLinear, byte_kernels
from batchllm.executor.native_linear import NativeLinear
from batchllm.executor.quantize import Int8DynamicLinear, quantize_model
from tests.executor.harness import run
from tests.executor.tiny_models import configurations, make_model
from tests.native import needs_kernels

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

pytestmark = [needs_kernels]


def layers(inputs: int, outputs: int, bias: bool = False) -> tuple[NativeByteLinear, Int8DynamicLinear]:
    kernels = byte_kernels(torch.bfloat16)
    if kernels is None:
        pytest.skip("needs a CPU with AVX-512 VNNI")
    torch.manual_seed(inputs)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    torchao.quantize_(linear, torchao.Int8DynamicActivationInt8WeightConfig())
    return NativeByteLinear.of(kernels, linear), Int8DynamicLinear(linear)


def some_states(rows: int, inputs: int) -> Tensor:
    """Rows of different sizes, the first of zeros."""
    states = torch.randn(rows, inputs) * torch.rand(rows, 1) * 9
    states[:1] = 0
    return states.to(torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(0, 64, 64), (1, 96, 40), (6, 4, 1), (7, 97, 64), (13, 2, 65), (200, 2816, 256), (600, 130, 130)],
)
@torch.inference_mode()
def test_the_same_bit_for_bit(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    fast, plain = layers(inputs, outputs, bias)
    states, total = some_states(rows, inputs), some_states(rows, outputs)
    expected = plain(states)
    assert torch.equal(fast(states), expected)
    assert torch.equal(fast(states.view(1, rows, inputs))[0], expected)
    added = total.clone()
    assert fast.add_to(added, states) is added
    assert torch.equal(added, total + expected)


@torch.inference_mode()
def test_largest_integers_and_rows_apart() -> None:
    fast, plain = layers(130, 64)
    wide = torch.full((9, 200), 3.0, dtype=torch.bfloat16)  # each row's largest number everywhere
    wide[3:6] *= -1
    wide[:, 5] = 0.01
    states = wide[:, 7:137]  # neither contiguous nor aligned
    assert torch.equal(fast(states), plain(states.contiguous()))


@torch.inference_mode()
def test_what_is_no_number_stays_in_its_row() -> None:
    fast, _ = layers(96, 70)
    states = some_states(14, 96)
    expected = fast(states)
    states[2, 95], states[9, 0] = float("nan"), float("inf")
    found = fast(states)
    assert found[2].isnan().all() and not found[9].isfinite().any()
    others = [row for row in range(14) if row not in (2, 9)]
    assert torch.equal(found[others], expected[others])


@torch.inference_mode()
def test_a_layer_of_some_outputs_shares_memory() -> None:
    fast, _ = layers(96, 200)
    states = some_states(5, 96)
    part = fast.rows(slice(64, 150), None)
    assert part is not None and torch.equal(part(states), fast(states)[:, 64:150])
    assert part.panels.bytes.untyped_storage().data_ptr() == fast.panels.bytes.untyped_storage().data_ptr()
    assert fast.rows(slice(32, 96), None) is None


def quantized(model_type: str) -> ModelRunner:
    runner = prepare_model(make_model(configurations()[model_type]).to(torch.bfloat16))
    quantize_model(runner, "int8_dynamic")
    return runner


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])  # two with fused layers; one with biases
def test_a_model_answers_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers(4, 1)  # skips where there are no kernels
    prompts = [[5, 6, 7, 8, 9, 10 + i, 11] for i in range(3)] + [[40, 41, 42]]
    greedy = SamplingParams(max_tokens=6, logprobs=True)
    fast = quantized(model_type)
    kinds = {type(module) for module in fast.model.modules() if hasattr(module, "in_features")}
    assert NativeByteLinear in kinds and not any(
        type(getattr(module, "weight", None)).__name__.startswith("Int8") for module in fast.model.modules()
    ), "torchao's weights are gone"
    monkeypatch.setattr(quantize, "byte_kernels", lambda _dtype: None)
    plain = quantized(model_type)
    assert fast.fused == plain.fused
    for mine, theirs in zip(
        run(fast, prompts, greedy).results, run(plain, prompts, greedy).results, strict=True
    ):
        assert (mine.tokens, mine.logprobs) == (theirs.tokens, theirs.logprobs)


def test_the_output_projection_is_packed_beside_int8_layers() -> None:
    layers(4, 1)  # skips where there are no kernels
    prompts, first = [[5, 6, 7, 8 + i] for i in range(3)], SamplingParams(max_tokens=1, logprobs=True)
    runner = quantized("llama")
    plain = run(runner, prompts, first).results
    runner.pack(projection_only=True)
    assert isinstance(runner.model.lm_head, NativeLinear)
    for mine, theirs in zip(run(runner, prompts, first).results, plain, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=0.02)
    runner.unfuse()
    assert type(runner.model.lm_head) is nn.Linear
