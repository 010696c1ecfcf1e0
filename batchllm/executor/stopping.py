"""When a sequence ends, and the text it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchllm.core import FinishReason, SamplingParams


class StopRules:
    """End-of-sequence ids, stop ids, stop strings and the token limit, for every sequence of a job."""

    def __init__(self, eos_ids: frozenset[int], tokenizer: Any | None):
        self._eos_ids = eos_ids
        self._tokenizer = tokenizer

    def finish_reason(self, tokens: Sequence[int], limit: int, params: SamplingParams) -> FinishReason | None:
        """Why a sequence that has just received its last token ends, or None while it goes on."""
        last = tokens[-1]
        if (last in self._eos_ids and not params.ignore_eos) or last in params.stop_token_ids:
            return "stop"
        if params.stop and len(tokens) >= params.min_tokens and self._has_stop(tokens, params):
            return "stop"
        return "length" if len(tokens) >= limit else None

    def text(self, tokens: Sequence[int], params: SamplingParams) -> str:
        """The output as a person reads it: cut at the stop string that ended it, which stays with `include_stop`.

        A stop string that was complete before `min_tokens` did not end it and stays in the text.
        """
        text = self.decode(tokens, params)
        found = self._found_stop(tokens, params, text)
        if found is None:
            return text
        start, end = found
        return text[: end if params.include_stop else start]

    def stop_reason(self, tokens: Sequence[int], params: SamplingParams) -> int | str | None:
        """Of an output that has ended with `stop`: the stop token or the stop string; None where it was an
        end-of-sequence token, or the structure that `params` ask for was complete."""
        last = tokens[-1]
        if last in self._eos_ids and not params.ignore_eos:
            return None
        if last in params.stop_token_ids:
            return last
        text = self.decode(tokens, params) if params.stop else ""
        found = self._found_stop(tokens, params, text)
        return None if found is None else text[slice(*found)]

    def _found_stop(self, tokens: Sequence[int], params: SamplingParams, text: str) -> tuple[int, int] | None:
        """(start, end) in `text`, which is that of `tokens`, of the stop string that ended it."""
        if not params.stop:
            return None
        early = self._whole(tokens[: params.min_tokens - 1], params) if params.min_tokens > 1 else 0
        return self._find_stop(text, params.stop, early)

    def was_cut(self, tokens: Sequence[int], params: SamplingParams, text: str) -> bool:
        """Whether `text`, of these tokens, lacks the end that they have."""
        return bool(params.stop) and text != self.decode(tokens, params)

    def decode(self, tokens: Sequence[int], params: SamplingParams) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=params.skip_special_tokens)
        return text

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @property
    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def _has_stop(self, tokens: Sequence[int], params: SamplingParams) -> bool:
        tail = self._tail(tokens, params)
        text = self.decode(tail, params)
        if params.min_tokens <= 1:
            return self._find_stop(text, params.stop, 0) is not None
        earlier = tail[: max(0, len(tail) - 1 - (len(tokens) - params.min_tokens))]
        early = self._whole(earlier, params)
        return self._find_stop(text, params.stop, early) is not None

    def _whole(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Characters of these tokens, without one that has only begun: its bytes are U+FFFD, one or several."""
        return len(self.decode(tokens, params).rstrip("\ufffd"))

    @staticmethod
    def _find_stop(text: str, stops: Sequence[str], early: int) -> tuple[int, int] | None:
        """(start, end) of the first stop string that ends behind `early` characters."""
        found = []
        for stop in stops:
            start = text.find(stop, max(0, early - len(stop) + 1))
            if start >= 0:
                found.append((start, start + len(stop)))
        return min(found, default=None)

    @staticmethod
    def _tail(tokens: Sequence[int], params: SamplingParams) -> Sequence[int]:
        """The tokens that a stop string ending in the newest token can reach back to.

        A token is at least one byte unless it prints as nothing, so twice the longest stop string in bytes, and a
        few more, is ample.
        """
        longest = max(len(stop.encode()) for stop in params.stop)
        return tokens[-(2 * longest + 8) :]


def end_of_sequence_ids(generation_config: Any, tokenizer: Any | None) -> frozenset[int]:
    """What transformers' generate stops at: the generation config's ids; the tokenizer's if it names none."""
    stated = getattr(generation_config, "eos_token_id", None)
    if stated is None and tokenizer is not None:
        stated = tokenizer.eos_token_id
    if stated is None:
        return frozenset()
    return frozenset([stated] if isinstance(stated, int) else stated)
