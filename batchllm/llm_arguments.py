"""The arguments of `LLM` and its methods: ours, those of vLLM that have a counterpart, and those that have none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Required, TypedDict, TypeVar

import numpy as np
from pydantic import ValidationError

from batchllm.errors import ArgumentError
from batchllm.job_errors import complaint, describe, first_error, key_path
from batchllm.job_sections import EngineSpec, ModelSpec, Section
from batchllm.suggest import nearest

# What vLLM's LLM takes and has no meaning here. Named so that a script need not change, and said once.
_WITHOUT_EFFECT = frozenset(
    "additional_config async_scheduling attention_backend attention_config block_size compilation_config "
    "cpu_offload_gb disable_cascade_attn disable_custom_all_reduce disable_log_stats distributed_executor_backend "
    "enable_chunked_prefill enable_prefix_caching enable_sleep_mode enforce_eager gpu_memory_utilization "
    "guided_decoding_backend kernel_config long_prefill_token_threshold max_cpu_loras max_logprobs max_lora_rank "
    "max_loras max_num_partial_prefills max_num_seqs max_seq_len_to_capture model_impl num_gpu_blocks_override "
    "offload_group_size offload_num_in_group offload_params offload_prefetch_step optimization_level "
    "performance_mode preemption_mode profiler_config reasoning_parser safetensors_load_strategy "
    "scheduling_policy served_model_name structured_outputs_config swap_space use_tqdm_on_load".split()
)
_RENAMED = {"max_num_batched_tokens": "max_step_tokens", "kv_cache_memory_bytes": "kv_memory"}
_ONE_DEVICE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_OURS = (
    "model tokenizer dtype device quantize trust_remote_code kv_memory max_step_tokens min_shared_tokens "
    "skip_tokenizer_init max_model_len seed generation_config"
).split()

_OFF: tuple[Any, ...] = (None, False)
_NONE: tuple[Any, ...] = (None, {}, [])
_LORA = "merge the adapter into the model's weights"
_SPECULATION = "answers are the same without it, so leave it out"
_VERSION = "download that version and give its folder as model"
_TEXT_ONLY = "prompts are text"
# The values that ask for nothing, and what to do where another one was meant.
_ABSENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_local_media_path": ((None, ""), _TEXT_ONLY),
    "allowed_media_domains": (_NONE, _TEXT_ONLY),
    "chat_template": ((None,), "give it to chat()"),
    "code_revision": ((None,), _VERSION),
    "config_format": ((None, "auto", "hf"), "give a folder with transformers' config.json"),
    "convert": ((None, "auto", "none"), "it gives answers and scores of texts"),
    "download_dir": ((None,), "set the environment variable HF_HOME"),
    "enable_lora": (_OFF, _LORA),
    "enable_prompt_embeds": (_OFF, _TEXT_ONLY),
    "enable_return_routed_experts": (_OFF, "leave it out"),
    "hf_overrides": (_NONE, "change the model's config.json"),
    "hf_token": ((None, False, True), "set the environment variable HF_TOKEN"),
    "kv_cache_dtype": ((None, "auto"), "keys and values have the dtype of the model"),
    "limit_mm_per_prompt": (_NONE, _TEXT_ONLY),
    "load_format": ((None, "auto", "hf", "safetensors"), "weights are read from safetensors files"),
    "logits_processors": (_NONE, "use logit_bias, bad_words or allowed_token_ids of SamplingParams"),
    "logprobs_mode": ((None, "raw_logprobs"), "log-probabilities are those of the model's own logits"),
    "mm_processor_kwargs": (_NONE, _TEXT_ONLY),
    "override_generation_config": (_NONE, "give SamplingParams to generate() and chat()"),
    "pooler_config": (_NONE, "it gives answers and scores of texts"),
    "quantization": ((None,), "give quantize='int8_weight_only' or 'int8_dynamic'"),
    "quantization_config": (_NONE, "give quantize='int8_weight_only' or 'int8_dynamic'"),
    "return_sampling_mask": (_OFF, "leave it out"),
    "revision": ((None,), _VERSION),
    "runner": ((None, "auto", "generate"), "it gives answers and scores of texts"),
    "spec_method": ((None,), _SPECULATION),
    "spec_model": ((None,), _SPECULATION),
    "spec_tokens": ((None,), _SPECULATION),
    "speculative_config": (_NONE, _SPECULATION),
    "task": ((None, "auto", "generate"), "it gives answers and scores of texts"),
    "tokenizer_mode": ((None, "auto", "hf", "slow"), "the tokenizer is the one transformers loads"),
    "tokenizer_revision": ((None,), "download that version and give its folder as tokenizer"),
}
_ABSENT_IN_CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "chat_template_content_format": (
        (None, "auto", "string"),
        "contents are text, or lists of parts with text",
    ),
    "guided_options_request": ((None,), "give structured_outputs to SamplingParams"),
    "lora_request": (_NONE, _LORA),
    "mm_processor_kwargs": (_NONE, _TEXT_ONLY),
    "prompt_token_ids": ((None,), "give lists of token ids as prompts"),
    "tokenization_kwargs": (_NONE, "tokenise the prompts as you need them and give their token ids"),
}

AnySection = TypeVar("AnySection", bound=Section)


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids."""

    prompt_token_ids: Required[Sequence[int]]
    prompt: str  # shown in the output


def our_arguments(ours: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`ours` with what `others`, vLLM's, say in their words. Raises TypeError for those that have no counterpart."""
    found = dict(ours)
    without_effect = []
    for name, value in others.items():
        if name in _RENAMED:
            if value is not None and found[_RENAMED[name]] not in (None, "auto"):
                raise ArgumentError(f"LLM: {name} and {_RENAMED[name]} say the same; give one of them")
            found |= {} if value is None else {_RENAMED[name]: value}
        elif name in _ONE_DEVICE:
            if value not in (None, 1):
                raise ArgumentError(f"LLM: {name} must be 1: this version runs on one device")
        elif name in _WITHOUT_EFFECT:
            without_effect += [name] if value else []
        else:
            _refuse("LLM()", name, value, _ABSENT, nearest(name, _OURS))
    if without_effect:
        warnings.warn(f"{', '.join(sorted(without_effect))}: without effect in BatchLLM", stacklevel=3)
    return found


def check_call(function: str, others: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument of a method that is not there. A priority changes no answer."""
    for name, value in others.items():
        if name != "priority":
            _refuse(function, name, value, _ABSENT_IN_CALLS, None)


def _refuse(
    function: str,
    name: str,
    value: Any,
    absent: Mapping[str, tuple[tuple[Any, ...], str]],
    similar: str | None,
) -> None:
    """Raises TypeError unless the value asks for nothing."""
    nothing, remedy = absent.get(name, ((), f"did you mean {similar!r}?" if similar else "leave it out"))
    if not any(type(value) is type(one) and value == one for one in nothing):
        raise TypeError(f"{function} has no {name!r} in BatchLLM; {remedy}")


def prompt_list(prompts: str | Iterable[Any]) -> list[Any]:
    """One prompt alone, or many in whatever holds them."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    many = list(prompts)
    return [many] if many and all(isinstance(token, int | np.integer) for token in many) else many


def sections_of(arguments: Mapping[str, Any]) -> tuple[ModelSpec, EngineSpec]:
    """The sections `model` and `engine` that a job with these arguments would have. Raises ArgumentError."""
    dtype = arguments["dtype"]
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    model = {key: arguments[key] for key in ("quantize", "trust_remote_code")}
    model |= {
        "path": arguments["model"],
        "dtype": {"half": "float16", "float": "float32"}.get(name or "", name),
    }
    engine = ("device", "kv_memory", "max_step_tokens", "min_shared_tokens")
    return _section(ModelSpec, model), _section(EngineSpec, {key: arguments[key] for key in engine})


def _section(kind: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    try:
        return kind.model_validate(values)
    except ValidationError as failure:
        error = first_error(failure.errors(include_url=False))
        name = key_path(error["loc"]).replace("path", "model")
        raise ArgumentError(f"LLM: {name} {complaint(error)}") from None


def readable_length(stated: int | None, max_model_len: int | None) -> int | None:
    """Most tokens of a sequence, prompt and output: as the model states, or fewer. None: neither says."""
    if max_model_len in (None, -1):
        return stated
    if not isinstance(max_model_len, int) or isinstance(max_model_len, bool) or max_model_len < 1:
        raise ArgumentError(f"LLM: max_model_len must be a number of tokens, found {describe(max_model_len)}")
    if stated is not None and max_model_len > stated:
        raise ArgumentError(
            f"LLM: max_model_len is {max_model_len:,} and the model reads at most {stated:,} tokens; lower it"
        )
    return max_model_len


def uses_defaults_of_model(generation_config: str | None) -> bool:
    """Whether calls without parameters take what the model says of sampling. vLLM takes a folder, too."""
    if generation_config not in (None, "auto", "vllm"):
        raise ArgumentError("LLM: generation_config must be auto or vllm; give SamplingParams to generate()")
    return generation_config != "vllm"


def seed_of(seed: int | None) -> int:
    """The seed of an LLM. vLLM's None is 0."""
    if not isinstance(seed, int | None) or isinstance(seed, bool):
        raise ArgumentError(f"LLM: seed must be a whole number, found {describe(seed)}")
    return seed or 0


def drawn_seed(llm_seed: int, call: int) -> int:
    """For the answers of a call whose parameters name no seed."""
    digest = blake2b(f"{llm_seed} {call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # seeds have 63 bits
