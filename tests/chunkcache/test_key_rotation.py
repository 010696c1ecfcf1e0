"""Keys turned by our tables equal those of transformers, for every architecture and every RoPE scaling that may run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers as hf

from batchllm.chunkcache.key_rotation import find_rotation
from batchllm.errors import ModelError
from batchllm.executor.forward_context import attention_of
from batchllm.executor.gate import check_config
from batchllm.executor.model import ModelRunner, prepare_model
from tests.executor.tiny_models import COMMON, WIDE, configurations, make_model

POSITIONS = torch.tensor([0, 1, 2, 7, 31, 77, 200])
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(4)],
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 512,
    "rope_theta": 1e4,
}


def more_configurations() -> dict[str, Any]:
    small = {**COMMON, "head_dim": 16}
    return {
        "llama linear": hf.LlamaConfig(
            **COMMON, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
        ),
        "llama llama3": hf.LlamaConfig(**COMMON, rope_parameters=_LLAMA3),
        "llama yarn": hf.LlamaConfig(**COMMON, rope_parameters=_YARN),
        "llama dynamic": hf.LlamaConfig(
            **COMMON, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "phi3 longrope": hf.Phi3Config(**COMMON, rope_parameters=_LONG),
        "phi3 part": hf.Phi3Config(
            **COMMON,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        "glm4": hf.Glm4Config(**{**small, "pad_token_id": 0}),
        "cohere": hf.CohereConfig(**COMMON),
        "stablelm": hf.StableLmConfig(**COMMON),
        "gpt_neox": hf.GPTNeoXConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
        "smollm3 (layers without positions)": hf.SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 0]),
        "ernie4_5": hf.Ernie4_5Config(**COMMON),
    }


def every_configuration() -> dict[str, Any]:
    return {
        name: config for name, config in configurations().items() if name != "gpt2"
    } | more_configurations()


class _Recorder:
    """Attention that only notes the keys."""

    logit_rows = None

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        self.keys.append(key.transpose(0, 1).clone())
        return value.transpose(0, 1).repeat_interleave(query.shape[0] // value.shape[0], dim=1)


def keys_at(model: ModelRunner, positions: torch.Tensor) -> list[torch.Tensor]:
    """K of one token alone at each position, as the model computes it."""
    recorder = _Recorder()
    with attention_of(recorder), torch.inference_mode():
        model.model(
            input_ids=torch.full((1, len(positions)), 42), position_ids=positions[None], use_cache=False
        )
    return recorder.keys


@pytest.mark.parametrize("name", every_configuration())
def test_keys_equal_those_of_the_model(name: str):
    config = every_configuration()[name]
    check_config(config)
    model = prepare_model(make_model(config))
    rotation = find_rotation(model)
    wanted = keys_at(model, POSITIONS)
    at_zero = keys_at(model, torch.zeros(1, dtype=torch.long))
    home, there = rotation.at(torch.zeros(1, dtype=torch.long)), rotation.at(POSITIONS)
    assert len(rotation.layouts) == len(wanted)
    for layer, key in enumerate(wanted):
        unturned = home.undo(layer, at_zero[layer])
        found = there.apply(layer, unturned.expand(len(POSITIONS), -1, -1))
        torch.testing.assert_close(found, key, rtol=1e-4, atol=1e-4 * float(key.abs().max()))
        back = there.undo(layer, key)
        torch.testing.assert_close(
            back, unturned.expand_as(back), rtol=1e-4, atol=1e-4 * float(key.abs().max())
        )


def test_what_was_found_is_what_the_architecture_does():
    """Not only something that fits: the layouts that are known from the modelling code."""
    every = every_configuration()

    def layout(name: str) -> Any:
        return find_rotation(prepare_model(make_model(every[name]))).layouts[0]

    llama, cohere, glm, half = layout("llama"), layout("cohere"), layout("glm4"), layout("phi3 part")
    assert (llama.frequencies, llama.neighbours, llama.first) == (4, False, 0)
    assert cohere.neighbours and cohere.columns == "even"
    assert glm.neighbours and glm.frequencies == 4
    assert half.frequencies == 2 and half.first == 0
    assert layout("deepseek_v3").first == 16
    assert (
        find_rotation(prepare_model(make_model(every["smollm3 (layers without positions)"]))).layouts[2]
        is None
    )
    gemma = find_rotation(prepare_model(make_model(every["gemma3_text"])))
    assert gemma.layouts[0] == gemma.layouts[1] != gemma.layouts[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype):
    model = prepare_model(make_model(hf.Qwen3Config(**WIDE)).to(dtype))
    rotation = find_rotation(model)
    wanted = keys_at(model, POSITIONS)
    home = rotation.at(POSITIONS)
    for layer, key in enumerate(wanted):
        assert key.dtype == dtype
        again = home.apply(layer, home.undo(layer, key))
        assert float((again.float() - key.float()).abs().max() / key.float().abs().max()) < 0.01


def test_learned_positions_are_refused():
    model = prepare_model(make_model(configurations()["gpt2"]))
    with pytest.raises(ModelError, match=r"model type gpt2.*cannot be moved.*chunks\.reuse"):
        find_rotation(model)


def test_an_unknown_way_of_turning_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = prepare_model(make_model(configurations()["llama"]))
    modeling = sys.modules["transformers.models.llama.modeling_llama"]

    def every_third(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        turned = k * cos.unsqueeze(1) + k.roll(3, -1) * sin.unsqueeze(1)
        return q, turned

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", every_third)
    with pytest.raises(ModelError, match="how it turns them is not known"):
        find_rotation(model)
