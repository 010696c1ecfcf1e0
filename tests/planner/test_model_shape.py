"""Work and memory per token, against the parameters and the KV of real (tiny) models."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from batchllm.executor.kv_pool import bytes_per_token
from batchllm.executor.model import prepare_model
from batchllm.planner.model_shape import model_shape
from tests.executor.tiny_models import COMMON, configurations

CONFIGURATIONS = {
    **configurations(),
    "tied": hf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "phi": hf.PhiConfig(**COMMON),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_parameters_and_kv_are_those_of_the_model(name):
    config = CONFIGURATIONS[name]
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shape = model_shape(config)
    matrices = {
        parameter for key, parameter in model.named_parameters() if parameter.ndim >= 2 and "bias" not in key
    }
    assert shape.parameters == sum(parameter.numel() for parameter in matrices)
    assert shape.weight_bytes(2) == 2 * shape.parameters
    runner = prepare_model(model)
    assert shape.kv_bytes_per_token(4) == bytes_per_token(runner.layers, torch.float32)
    assert [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in shape.layers] == [
        (layer.heads, layer.key_dim, layer.value_dim) for layer in runner.layers
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_flops_of_a_token_are_those_that_torch_counts(name):
    """One token alone: every layer's projections and the logits, with the experts that are used."""
    from torch.utils.flop_counter import FlopCounterMode

    config = CONFIGURATIONS[name]
    model = hf.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    shape = model_shape(config)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    counted = counter.get_total_flops()
    expected = shape.flops_per_token + shape.flops_per_logit_row + shape.flops_per_pair
    assert counted == pytest.approx(expected, rel=0.03)  # rotary angles, a few masks


def test_sliding_windows_are_known_by_layer():
    shapes = {name: model_shape(config) for name, config in configurations().items()}
    assert [layer.window for layer in shapes["mistral"].layers] == [16, 16, 16]
    assert [layer.window for layer in shapes["gemma2"].layers] == [16, None, 16]
    assert [layer.window for layer in shapes["llama"].layers] == [None, None, None]
    with_window_off = hf.Qwen2Config(**COMMON, sliding_window=16, use_sliding_window=False)
    assert [layer.window for layer in model_shape(with_window_off).layers] == [None, None, None]


def test_a_step_reads_only_the_experts_its_tokens_are_sent_to():
    layer = model_shape(configurations()["qwen3_moe"]).layers[0]
    always = layer.attention_parameters + layer.dense_parameters
    assert layer.read_parameters(1) == pytest.approx(always + 2 * layer.expert_parameters)
    assert layer.read_parameters(1000) == pytest.approx(layer.stored_parameters)
    assert layer.read_parameters(2) == pytest.approx(always + 3 * layer.expert_parameters)  # 4 * (1 - 1/4)


def test_a_published_size():
    """Llama 3.1 8B: 8.03 billion parameters, 128 KiB of bfloat16 KV for a token."""
    config = hf.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    shape = model_shape(config)
    assert shape.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert shape.kv_bytes_per_token(2) == 131_072
