"""Refuses architectures that would run on a flat ragged batch without an error and give wrong results.

A flat batch puts many sequences one after another. Attention knows whose keys are whose; anything else that looks
along the sequence (convolutions, linear attention, state-space layers) silently mixes neighbours. What is refused
here was measured on transformers 5.23 by comparing logits with one sequence at a time. `parity` repeats that
comparison for the very model at load time; this gate catches what short sequences cannot show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchllm.errors import ModelError

_STATE = (
    "its linear-attention, convolution or state-space layers carry state along the batch, across sequences"
)
_LOOPED = (
    "its layers call attention more than once per token, so their keys and values would overwrite each other"
)
_NO_HOOK = "transformers does not let its attention be replaced"
_NOT_DECODER = "it is not a decoder-only language model"
_BIAS = "its attention takes a bias or an index that depends on more than positions"

_REFUSED_FAMILIES = {
    _STATE: """qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text falcon_h1 nemotron_h olmo_hybrid minimax
        recurrent_gemma lfm2 lfm2_moe lfm3 jamba mamba mamba2 falcon_mamba xlstm bamba zamba zamba2 rwkv
        granitemoehybrid kimi_linear""",
    _LOOPED: "diffllama zaya hrm_text",
    _BIAS: "deepseek_v4 inkling2_text",
    _NO_HOOK: "mpt bloom gptj codegen xglm cpmant openai-gpt gpt_neox_japanese big_bird",
    _NOT_DECODER: "bert roberta bart t5 mbart prophetnet whisper",
}
_REFUSED = {name: reason for reason, names in _REFUSED_FAMILIES.items() for name in names.split()}

_EXACT_ROPE = {"default", "linear", "llama3", "yarn"}
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """Sequences (prompt and output together) up to `tokens` are exact; longer ones are refused, for `reason`."""

    tokens: int
    reason: str


def check_config(config: Any) -> LengthLimit | None:
    """Raises ModelError for an architecture that cannot be exact; returns the length it is exact up to, if limited."""
    text = config.get_text_config()
    for name in (config.model_type, text.model_type):
        if name in _REFUSED:
            raise refused(name, _REFUSED[name])
    if getattr(config, "is_encoder_decoder", False):
        raise refused(config.model_type, _NOT_DECODER)
    limits = [limit for limit in (_check_layers(text), _check_rope(text)) if limit]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def refused(model_type: str, reason: str) -> ModelError:
    return ModelError(f"model type {model_type} cannot run exactly on batches of many sequences: {reason}.")


def beyond(limit: LengthLimit, model_type: str) -> str:
    """The part of a sentence that says why longer sequences are refused."""
    return f"model type {model_type} is exact only up to {limit.tokens:,} tokens here, because {limit.reason}"


def check_lengths(limit: LengthLimit | None, longest: int, model_type: str) -> None:
    """Refuses a job whose longest sequence (prompt + max_tokens) exceeds what the architecture is exact for."""
    if limit is not None and longest > limit.tokens:
        raise ModelError(
            f"{beyond(limit, model_type)}; this job needs up to {longest:,} (prompt + generate.max_tokens): shorten "
            f"the prompts or lower generate.max_tokens."
        )


def _check_layers(text: Any) -> LengthLimit | None:
    kinds = set(getattr(text, "layer_types", None) or ())
    chunk = getattr(text, "attention_chunk_size", None)
    if "chunked_attention" in kinds or (chunk and text.model_type.startswith("llama4")):
        kinds.discard("chunked_attention")
        if not chunk:
            raise refused(text.model_type, "its chunked attention states no chunk size")
        return LengthLimit(int(chunk), "its chunked attention is not passed on to the attention function")
    unknown = sorted(kinds - _ATTENTION_LAYERS)
    if unknown:
        raise refused(text.model_type, f"it has layers of type {', '.join(unknown)}")
    return None


def _check_rope(text: Any) -> LengthLimit | None:
    """`dynamic` and `longrope` choose their frequencies from the longest sequence in the batch."""
    for parameters in _rope_parameters(text):
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind in _EXACT_ROPE or kind == "proportional":
            continue
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = int(original or text.max_position_embeddings)
            return LengthLimit(
                limit, f"its {kind} RoPE changes every sequence once one of the batch is longer"
            )
        raise refused(text.model_type, f"its RoPE type {kind} is not known to be exact")
    return None


def _rope_parameters(text: Any) -> list[dict[str, Any]]:
    """One dict per kind of layer: transformers nests them when layer types differ (Gemma 3)."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
