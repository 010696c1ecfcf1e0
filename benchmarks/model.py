"""The models of the benchmarks: Llama's shape, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.workloads import VOCABULARY

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Name → configuration, dtype, and what weights are multiplied with: larger ones decide more clearly between tokens.
_MODELS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "llama-168m": (
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
        },
        torch.bfloat16,
        1.0,
    ),
    "tiny-float32": (
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
        },
        torch.float32,
        3.0,
    ),
}


def make_model(folder: Path, name: str = "llama-168m", seed: int = 0) -> Path:
    """Writes the model to `folder` unless it is there already."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed)
        shape, dtype, scale = _MODELS[name]
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **_TOKENS), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and scale != 1.0:
                    parameter.mul_(scale)
        model.save_pretrained(folder)
    return folder


def kv_bytes_per_token(name: str) -> int:
    shape, dtype, _ = _MODELS[name]
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return 2 * int(shape["num_hidden_layers"] * shape["num_key_value_heads"] * head) * dtype.itemsize
