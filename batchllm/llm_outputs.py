"""What `LLM` returns, in vLLM's shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from batchllm.core import PromptLogprobs, PromptTable, RequestResult, RequestTable
from batchllm.executor.stopping import StopRules


class Logprob(NamedTuple):
    """One token among those that were possible in its place."""

    logprob: float
    rank: int | None = None  # 1: the most probable; None where it is not among those asked for
    decoded_token: str | None = None  # None: the LLM has no tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # of all tokens together; this and the next when asked for
    logprobs: list[dict[int, Logprob]] | None = None  # of each token, first, and of the most probable ones
    finish_reason: str | None = None  # stop, length or error
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    lora_request: None = None
    error: str | None = None  # why there is no answer

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """Everything for one prompt, in the order prompts were given."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # when asked for; None for the first token
    num_cached_tokens: int = 0  # of the prompt, taken from the work for others by each of its answers
    metrics: None = None
    lora_request: None = None


class OutputMaker:
    """Makes outputs of answers. Texts of single tokens are made when a log-probability is shown, once each."""

    def __init__(self, rules: StopRules) -> None:
        self._rules = rules
        tokenizer = rules.tokenizer

        def text_of(token: int) -> str | None:
            return None if tokenizer is None else str(tokenizer.decode([token]))

        self._text_of: Callable[[int], str | None] = cache(text_of)

    def outputs(
        self,
        many: list[Any],
        prompts: PromptTable,
        requests: RequestTable,
        answers: Sequence[RequestResult | None],
    ) -> list[RequestOutput]:
        """For each of the prompts as they were given, its answers."""
        made = [
            RequestOutput(
                request_id=str(row),
                prompt=text_of(prompt),
                prompt_token_ids=prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist(),
                outputs=[],
            )
            for row, prompt in enumerate(many)
        ]
        for answer in answers:
            assert answer is not None, "a request was not answered"
            row = int(requests.row[answer.request])
            output, params = made[row], prompts.params[prompts.params_of[row]]
            stopped = answer.finish_reason == "stop" and (params.stop or params.stop_token_ids)
            reason = self._rules.stop_reason(answer.output_tokens, params) if stopped else None
            sample = self.completion(answer, int(requests.sample[answer.request]), reason)
            cached = answer.shared_tokens
            output.num_cached_tokens = min(cached, output.num_cached_tokens) if output.outputs else cached
            output.outputs.append(sample)
            if answer.prompt_logprobs is not None:
                output.prompt_logprobs = self._of_prompt(answer.prompt_logprobs)
        return made

    def completion(
        self, answer: RequestResult, index: int, stop_reason: int | str | None = None
    ) -> CompletionOutput:
        """Sample `index` of its prompt."""
        return CompletionOutput(
            index=index,
            text=answer.output or "",
            token_ids=list(answer.output_tokens),
            cumulative_logprob=None if answer.logprobs is None else float(sum(answer.logprobs)),
            logprobs=self._of_output(answer),
            finish_reason=answer.finish_reason,
            stop_reason=stop_reason,
            error=answer.error,
        )

    def _of_output(self, answer: RequestResult) -> list[dict[int, Logprob]] | None:
        if answer.logprobs is None:
            return None
        tops = answer.top_logprobs or ((),) * len(answer.logprobs)
        each = zip(answer.output_tokens, answer.logprobs, tops, strict=True)
        return [self._of_token(token, value, top) for token, value, top in each]

    def _of_prompt(self, found: PromptLogprobs) -> list[dict[int, Logprob] | None]:
        rows = zip(found.tokens.tolist(), found.logprobs.tolist(), found.top_tokens, found.top_logprobs)
        shown: list[dict[int, Logprob] | None] = [None]
        for token, value, others, values in islice(rows, 1, None):
            shown.append(self._of_token(token, value, list(zip(others.tolist(), values.tolist()))))
        return shown

    def _of_token(self, token: int, value: float, top: Sequence[tuple[int, float]]) -> dict[int, Logprob]:
        """The token itself, and the most probable ones by rank."""
        found = {token: Logprob(value, None, self._text_of(token))}
        for rank, (other, logprob) in enumerate(top, start=1):
            found[other] = Logprob(logprob, rank, self._text_of(other))
        return found


def text_of(prompt: Any) -> str | None:
    """Of a prompt as it was given; None where it is token ids."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def warn_of_errors(outputs: Sequence[RequestOutput]) -> None:
    """Once for a call of which prompts have no answer: nobody looks at `error` of every output."""
    failed = [
        (number, sample.error)
        for number, output in enumerate(outputs)
        for sample in output.outputs
        if sample.error is not None
    ]
    if failed:
        count, (first, error) = len(dict(failed)), failed[0]
        warnings.warn(
            f"{count:,} of {len(outputs):,} prompts were not answered; the first is prompt {first}: {error}",
            stacklevel=3,
        )
