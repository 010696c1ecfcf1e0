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
        if params.stop and self._find_stop(self.decode(self._tail(tokens, params)), params.stop) is not None:
            return "stop"
        return "length" if len(tokens) >= limit else None

    def text(self, tokens: Sequence[int], params: SamplingParams) -> str:
        """The output as a person reads it: special tokens left out, cut before the first stop string."""
        text = self.decode(tokens)
        end = self._find_stop(text, params.stop) if params.stop else None
        return text if end is None else text[:end]

    def decode(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @staticmethod
    def _find_stop(text: str, stops: Sequence[str]) -> int | None:
        found = [index for index in (text.find(stop) for stop in stops) if index >= 0]
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
