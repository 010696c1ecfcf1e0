"""`SamplingParams` as vLLM's users write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchllm import core
from batchllm.job import check_params


def SamplingParams(
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    max_tokens: int | None = 16,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | bool | None = None,
    prompt_logprobs: int | bool | None = None,
    best_of: int | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    bad_words: Sequence[str] | None = None,
    allowed_token_ids: Sequence[int] | None = None,
    min_tokens: int = 0,
    include_stop_str_in_output: bool = False,
    skip_special_tokens: bool = True,
    choice: Sequence[str] | None = None,
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    grammar: str | None = None,
) -> core.SamplingParams:
    """How tokens are chosen, with vLLM's names and defaults (temperature 1.0, 16 tokens). Raises JobError.

    `top_k` 0 or -1: no limit. `logprobs`: anything but None or False gives the log-probability of each token, and a
    number above 0 those of so many most probable tokens beside it; `prompt_logprobs` the same for the tokens of the
    prompt. At most one of `choice`, `regex`, `json_schema` and `grammar` says which texts the answer may be.
    """
    return check_params(
        core.SamplingParams(
            max_tokens=16 if max_tokens is None else max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, top_k),
            min_p=min_p,
            n=n,
            seed=0 if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            stop_token_ids=tuple(stop_token_ids or ()),
            ignore_eos=ignore_eos,
            logprobs=logprobs is not None and logprobs is not False,
            top_logprobs=0 if logprobs is None else int(logprobs) if logprobs is not True else 0,
            prompt_logprobs=prompt_logprobs,
            best_of=best_of or 0,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            logit_bias=dict(logit_bias or {}),  # type: ignore[arg-type]
            bad_words=tuple(bad_words or ()),
            allowed_token_ids=tuple(allowed_token_ids or ()),
            min_tokens=min_tokens,
            include_stop=include_stop_str_in_output,
            skip_special_tokens=skip_special_tokens,
            choice=tuple(choice or ()),
            regex=regex or "",
            json_schema="" if json_schema is None else json_schema,  # type: ignore[arg-type]
            grammar=grammar or "",
        )
    )
