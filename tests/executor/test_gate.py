"""What the gate refuses, and that it says why. The dynamic checks stand behind the list of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from batchllm.core import SamplingParams
from batchllm.errors import ModelError
from batchllm.executor import gate
from batchllm.executor.forward_context import UnsupportedAttention, attention_of, batchllm_attention
from batchllm.executor.gate import check_config, check_lengths
from batchllm.executor.model import prepare_model
from batchllm.executor.parity import check_parity
from tests.executor.harness import run
from tests.executor.tiny_models import COMMON, WIDE, configurations, generate_alone, make_model


def qwen3_next() -> Any:
    return hf.Qwen3NextConfig(
        **{**WIDE, "num_hidden_layers": 2},
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def falcon_h1() -> Any:
    mamba = {"d_ssm": 32, "n_heads": 4, "d_head": 8, "n_groups": 1, "d_state": 8, "chunk_size": 8}
    return hf.FalconH1Config(**COMMON, **{f"mamba_{name}": size for name, size in mamba.items()})


def diffllama() -> Any:
    return hf.DiffLlamaConfig(**COMMON)


def llama4(chunk: int = 48) -> Any:
    return hf.Llama4TextConfig(
        **WIDE,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=chunk,
    )


def longrope(original: int = 48) -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original}
    return hf.Phi3Config(
        **COMMON,
        original_max_position_embeddings=original,
        rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    )


def dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return hf.LlamaConfig(**{**COMMON, "max_position_embeddings": 48}, rope_parameters=rope)


LISTED = {"qwen3_next": qwen3_next, "falcon_h1": falcon_h1, "diffllama": diffllama}
LIMITED = {
    "llama4_text": (llama4, "chunked attention"),
    "phi3": (longrope, "longrope RoPE"),
    "llama": (dynamic_rope, "dynamic RoPE"),
}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "linear-attention"),
        ("falcon_h1", "state-space"),
        ("diffllama", "more than once per token"),
    ],
)
def test_listed_families_are_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"model type {model_type} .*{reason}"):
        check_config(LISTED[model_type]())


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1"])
def test_unknown_kinds_of_layers_are_refused(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gate._REFUSED, model_type)
    with pytest.raises(ModelError, match=f"model type {model_type} .*layers of type"):
        check_config(LISTED[model_type]())


@pytest.mark.parametrize("model_type", LISTED)
def test_what_the_list_misses_is_refused_at_load(model_type: str) -> None:
    """`prepare_model` and `check_parity` do not look at the list."""
    with pytest.raises(ModelError, match=f"model type {model_type} cannot run exactly"):
        check_parity(prepare_model(make_model(LISTED[model_type]())))


@pytest.mark.parametrize("model_type", LIMITED)
def test_a_length_limit_is_stated_with_its_reason(model_type: str) -> None:
    make_config, reason = LIMITED[model_type]
    limit = check_config(make_config())
    assert limit is not None
    assert limit.tokens == 48
    check_lengths(limit, 48, model_type)
    with pytest.raises(ModelError, match=rf"model type {model_type} .*up to 48 tokens.*{reason}.*up to 49"):
        check_lengths(limit, 49, model_type)


@pytest.mark.parametrize("model_type", LIMITED)
def test_within_its_limit_such_a_model_is_exact(model_type: str) -> None:
    model = make_model(LIMITED[model_type][0]())
    shared = torch.randint(4, 97, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [[*shared, 5], [*shared, 9, 11, 60], [*shared, *range(30, 48)], [8], [70, 4, 4]]
    expected = [generate_alone(model, prompt, 10) for prompt in prompts]
    runner = prepare_model(model)
    check_parity(runner)
    outcome = run(runner, prompts, SamplingParams(max_tokens=10), max_step_tokens=17)
    assert [list(result.tokens) for result in outcome.results] == expected


def test_longrope_would_be_wrong_in_mixed_lengths() -> None:
    """The reason for the limit. When this fails, transformers has changed and the limit can go."""
    model = make_model(longrope())
    prompts = [list(range(10, 70)), [8, 30, 12]]
    expected = [generate_alone(model, prompt, 10) for prompt in prompts]
    outcome = run(model, prompts, SamplingParams(max_tokens=10))
    assert [list(result.tokens) for result in outcome.results] != expected


@pytest.mark.parametrize("architecture", sorted(configurations()))
def test_supported_architectures_pass_without_a_limit(architecture: str) -> None:
    assert check_config(configurations()[architecture]) is None


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_rope_types_that_do_not_look_at_the_batch_pass(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type in ("llama3", "yarn"):
        rope |= {"original_max_position_embeddings": 128}
    assert check_config(hf.LlamaConfig(**COMMON, rope_parameters=rope)) is None


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model type t5 .*decoder-only"):
        check_config(hf.T5Config())


def test_a_model_whose_attention_cannot_be_replaced_is_refused() -> None:
    config = hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match=r"model type bloom .*attention be replaced"):
        check_config(config)
    model = hf.BloomForCausalLM(config)
    with pytest.raises(ModelError, match=r"model type bloom .*attention be replaced"):
        prepare_model(model)


class _Module(torch.nn.Module):
    layer_idx = 0
    is_causal = True


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "mask of its own"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(changes: dict[str, Any], complaint: str) -> None:
    states = torch.zeros(1, 1, 2, 4)
    arguments = {"attention_mask": None, **changes}
    with attention_of(None), pytest.raises(UnsupportedAttention, match=complaint):  # type: ignore[arg-type]
        batchllm_attention(_Module(), states, states, states, **arguments)
