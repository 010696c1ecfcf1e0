"""What `LLM` returns, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from batchllm.core import PromptLogprobs, PromptTable, RequestResult, RequestTable, TopLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # stop, length or error
    logprobs: tuple[float, ...] | None = None  # of each token, when asked for
    top_logprobs: TopLogprobs | None = None  # of the most probable tokens beside each
    error: str | None = None


class Logprob(NamedTuple):
    """One token of a prompt, as vLLM gives it."""

    logprob: float
    rank: int | None = None  # 1: the most probable; None where it is not among those asked for


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything for one prompt, in the order prompts were given."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # when asked for; None for the first token


def outputs_of(
    many: list[Any], prompts: PromptTable, requests: RequestTable, answers: Sequence[RequestResult | None]
) -> list[RequestOutput]:
    """For each of the prompts as they were given, its answers."""
    outputs: list[list[CompletionOutput]] = [[] for _ in many]
    of_prompt: dict[int, PromptLogprobs] = {}
    for answer in answers:
        assert answer is not None, "a request was not answered"
        if answer.prompt_logprobs is not None:
            of_prompt[int(requests.row[answer.request])] = answer.prompt_logprobs
        outputs[int(requests.row[answer.request])].append(
            completion_of(answer, int(requests.sample[answer.request]))
        )
    return [
        RequestOutput(
            request_id=str(row),
            prompt=text_of(prompt),
            prompt_token_ids=prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist(),
            outputs=outputs[row],
            prompt_logprobs=_by_token(of_prompt.get(row)),
        )
        for row, prompt in enumerate(many)
    ]


def _by_token(found: PromptLogprobs | None) -> list[dict[int, Logprob] | None] | None:
    if found is None:
        return None
    shown: list[dict[int, Logprob] | None] = [None]
    rows = zip(found.tokens, found.logprobs, found.top_tokens, found.top_logprobs)
    for token, value, others, values in islice(rows, 1, None):
        top = zip(others.tolist(), values.tolist())
        known = {other: Logprob(logprob, rank) for rank, (other, logprob) in enumerate(top, start=1)}
        shown.append({int(token): Logprob(float(value)), **known})
    return shown


def completion_of(answer: RequestResult, index: int) -> CompletionOutput:
    """Sample `index` of its prompt."""
    return CompletionOutput(
        index=index,
        text=answer.output or "",
        token_ids=answer.output_tokens,
        finish_reason=answer.finish_reason,
        logprobs=answer.logprobs,
        top_logprobs=answer.top_logprobs,
        error=answer.error,
    )


def text_of(prompt: Any) -> str | None:
    """Of a prompt as it was given; None where it is token ids."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None
