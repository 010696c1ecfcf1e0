"""`SamplingParams` as vLLM's users write it: their names, their defaults, and what they may change later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from batchllm import core
from batchllm.errors import ArgumentError
from batchllm.job_sections import InvalidParam, valid_params

_MOST_TOKENS = 2**31 - 1  # stands for max_tokens=None as long as no model is known
_STRUCTURES = {  # theirs: ours
    "choice": "choice",
    "regex": "regex",
    "json": "json_schema",
    "grammar": "grammar",
    "json_object": "json_schema",
}
_ANY_OBJECT = {"type": "object"}
_SAME = (
    "n temperature top_p min_p ignore_eos min_tokens skip_special_tokens presence_penalty frequency_penalty "
    "repetition_penalty"
).split()
OF_MODEL = (
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty"
).split()  # what vLLM takes from a generation_config.json
_NOT_HERE = (
    "logits_processors logprob_token_ids prompt_logprob_token_ids prompt_logprob_start repetition_detection "
    "thinking_token_budget trace_decode_token_ids truncate_prompt_tokens"
).split()
_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "choice")
_THEIR_NAMES = {"top_logprobs": "logprobs", "include_stop": "include_stop_str_in_output"}


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """Which texts an answer may be: exactly one of the first five. A grammar is in Lark's notation."""

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None  # any JSON object
    # Of vLLM, and only as they are here.
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen, with vLLM's names and defaults (temperature 1.0, 16 tokens). Raises ArgumentError, when
    it is made and again when `LLM` reads it. None stands for the default, except where said otherwise.

    `max_tokens` None: all that the model's length leaves. `seed` None: other samples in every call of an LLM.
    `top_k` 0 or -1: no limit. `logprobs`: None or False gives none, a number the log-probability of each token and
    those of so many most probable tokens; `prompt_logprobs` the same for the tokens of the prompt. At most one of
    `structured_outputs`, `choice`, `regex`, `json_schema` and `grammar` says which texts the answer may be.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | bool | None = None
    prompt_logprobs: int | bool | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Any = None  # StructuredOutputsParams, or another object or mapping with its fields
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    choice: Sequence[str] | None = None
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    grammar: str | None = None
    # Of vLLM, and without effect: there is text in any case, and it comes once, whole.
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: Any = None
    flat_logprobs: bool = False
    extra_args: Mapping[str, Any] | None = None
    guided_decoding: Any = None  # what structured_outputs was called earlier
    # Of vLLM, and only None.
    logits_processors: Any = None
    logprob_token_ids: Any = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: Any = None
    repetition_detection: Any = None
    thinking_token_budget: Any = None
    trace_decode_token_ids: Any = None
    truncate_prompt_tokens: Any = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words"):  # so that a script can add to them
            value = getattr(self, name)
            setattr(self, name, [] if value is None else [value] if isinstance(value, str) else value)
        if self.extra_args:
            warnings.warn("extra_args: without effect in BatchLLM", stacklevel=3)
        self.resolved(seed=0, max_tokens=_MOST_TOKENS)

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)

    def resolved(self, *, seed: int, max_tokens: int) -> core.SamplingParams:
        """What the engine is given; `seed` and `max_tokens` where these are None. Raises ArgumentError."""
        for name in _NOT_HERE:
            if getattr(self, name) is not None:
                raise ArgumentError(f"SamplingParams has no {name} in BatchLLM; leave it out")
        values: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        values = {name: _DEFAULTS[name] if value is None else value for name, value in values.items()}
        values |= {name: _listed(getattr(self, name)) for name in _LISTS}
        values |= {name: getattr(self, name) or "" for name in ("regex", "grammar")}
        values |= {
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
            "seed": seed if self.seed in (None, -1) else self.seed,
            "top_k": 0 if self.top_k in (None, -1) else self.top_k,
            "best_of": self.best_of or 0,
            "logprobs": self.logprobs is not None and self.logprobs is not False,
            "top_logprobs": _count(self.logprobs) or 0,
            "prompt_logprobs": _count(self.prompt_logprobs),
            "logit_bias": () if self.logit_bias is None else self.logit_bias,
            "include_stop": self.include_stop_str_in_output,
            "json_schema": "" if self.json_schema is None else self.json_schema,
        }
        structure = self._structure()
        try:
            return core.SamplingParams(**valid_params(values | structure))
        except InvalidParam as error:
            named, bracket, rest = error.parameter.partition("[")
            theirs = next((name for name, ours in _STRUCTURES.items() if ours == named), named)
            name = f"structured_outputs.{theirs}" if named in structure else _THEIR_NAMES.get(named, named)
            raise ArgumentError(f"SamplingParams: {name}{bracket}{rest} {error.reason}") from None

    def _structure(self) -> dict[str, Any]:
        """What `structured_outputs` asks for, by our names."""
        given = self.guided_decoding if self.structured_outputs is None else self.structured_outputs
        if given is None:
            return {}
        names = [one.name for one in fields(StructuredOutputsParams)]
        asked = {
            name: given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
            for name in names
        }
        asked = {name: value for name, value in asked.items() if value is not None and value is not False}
        unknown = sorted(set(asked) - set(_STRUCTURES))
        if unknown:
            raise ArgumentError(
                f"SamplingParams: structured_outputs has no {unknown[0]} in BatchLLM; leave it out"
            )
        own = [name for name in dict.fromkeys(_STRUCTURES.values()) if getattr(self, name)]
        if len(asked) != 1 or own:
            found = " and ".join([*asked, *own] if asked else ["none of them"])
            raise ArgumentError(
                f"SamplingParams: structured_outputs must have one of choice, regex, json and grammar, found {found}"
            )
        [(name, value)] = asked.items()
        if not value and not isinstance(value, Mapping):
            raise ArgumentError(f"SamplingParams: structured_outputs.{name} must not be empty")
        return {_STRUCTURES[name]: _ANY_OBJECT if name == "json_object" else value}


_DEFAULTS = {one.name: one.default for one in fields(SamplingParams)}


def _count(logprobs: int | bool | None) -> int | None:
    """So many most probable tokens; in vLLM, True is one."""
    if isinstance(logprobs, bool):
        return 1 if logprobs else None
    return logprobs


def _listed(value: Any) -> Any:
    """A set, an array or an iterator as a tuple; anything else is left to the check of the values."""
    if value is None:
        return ()
    given = isinstance(value, str | list | tuple) or not isinstance(value, Iterable)
    return value if given else tuple(value)


def params_of_model(generation_config: Any) -> SamplingParams:
    """vLLM's defaults, but for what transformers' generation config of a model, if given, says of sampling."""
    said = {} if generation_config is None else generation_config.to_diff_dict()
    names = {name: name for name in OF_MODEL} | {"max_new_tokens": "max_tokens"}
    given = {ours: said[name] for name, ours in names.items() if said.get(name) is not None}
    return SamplingParams(**given)
