"""Tiny random models of many architectures, and transformers' own greedy output as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
EOS = 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
WIDE = {**COMMON, "head_dim": 16}
_MOE = {"num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def configurations() -> dict[str, Any]:
    """By model type."""
    return {
        "llama": hf.LlamaConfig(**COMMON),
        "qwen2": hf.Qwen2Config(**COMMON),
        "qwen3": hf.Qwen3Config(**WIDE),
        "qwen3_moe": hf.Qwen3MoeConfig(**WIDE, **_MOE, num_experts=4, moe_intermediate_size=32),
        "mistral": hf.MistralConfig(**COMMON, sliding_window=16),
        "gemma2": hf.Gemma2Config(**WIDE, sliding_window=16, query_pre_attn_scalar=16),
        "gemma3_text": hf.Gemma3TextConfig(
            **WIDE, sliding_window=16, query_pre_attn_scalar=16, layer_types=[_SLIDING, _SLIDING, _FULL]
        ),
        "phi3": hf.Phi3Config(**COMMON),
        "gpt2": hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=512,
            bos_token_id=None,
            eos_token_id=EOS,
        ),
        "gpt_oss": hf.GptOssConfig(
            **WIDE, **_MOE, sliding_window=16, num_local_experts=4, layer_types=[_SLIDING, _FULL, _SLIDING]
        ),
        "olmo2": hf.Olmo2Config(**COMMON),
        "deepseek_v3": hf.DeepseekV3Config(**{**COMMON, "num_key_value_heads": 4}, **_MOE, **_MLA),
    }


def make_model(config: Any, seed: int = 0) -> Any:
    """A float32 model whose random weights are large enough that logits differ clearly and attention matters."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            if "sinks" in name:
                parameter.normal_()
    return model


def generate_alone(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """transformers' own greedy generate for one request: the oracle."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    return output[0, ids.shape[1] :].tolist()
