"""Loads the tokenizer that lies beside a model."""

from __future__ import annotations

from typing import Any

from batchllm.errors import ModelError, first_line


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a model folder or hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"model.path: {path} has no tokenizer that can be loaded ({first_line(error)}); "
            "save the model's tokenizer into it with tokenizer.save_pretrained."
        ) from None
