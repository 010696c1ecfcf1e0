"""What a model's folder says about generation (generation_config.json): what is taken from it, and what is not."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

# What transformers' greedy generate applies, beside the ends of text; the parameter that does the same here, if any.
_APPLIED = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "",
    "min_length": "",
    "min_new_tokens": "min_tokens",
    "bad_words_ids": "bad_words",
    "suppress_tokens": "logit_bias",
    "begin_suppress_tokens": "",
    "sequence_bias": "logit_bias",
    "forced_bos_token_id": "",
    "forced_eos_token_id": "",
    "exponential_decay_length_penalty": "",
    "guidance_scale": "",
    "stop_strings": "stop",
}
_NEUTRAL = {"repetition_penalty": 1.0, "guidance_scale": 1.0}  # of the others nothing, 0 or an empty list is
_IDS = frozenset({"forced_bos_token_id", "forced_eos_token_id"})  # of which 0 and 1 are as good as others


def load_generation_config(path: str, config: Any) -> Any:
    """As a model loaded from there has it: of the file of that name, else what the model's configuration says."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(config)


def generation_notes(
    generation_config: Any, given: Container[str] = (), section: str = "generate"
) -> list[str]:
    """A sentence for each thing that transformers' generate would apply and nothing here does.

    `given`: the parameters that the user has set; they know better. `section` is where a user sets them.
    """
    notes = []
    for name, parameter in _APPLIED.items():
        value = getattr(generation_config, name, None)
        changes = value is not None if name in _IDS else bool(value) and value != _NEUTRAL.get(name)
        if not changes or parameter in given:
            continue
        shown = f" {value}" if isinstance(value, int | float | str) else ""
        remedy = f"{section}.{parameter} sets it" if parameter else "there is no parameter for it"
        notes.append(
            f"The model's generation_config.json states {name}{shown}, which transformers' generate applies and "
            f"BatchLLM does not; {remedy}."
        )
    return notes
