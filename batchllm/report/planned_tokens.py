"""How many tokens a run will have computed when it is done: what is left is better told by them than by rows."""

from __future__ import annotations

from collections.abc import Iterable

from batchllm.core import IntArray, SequenceResult


class PlannedTokens:
    """The prompt tokens of a plan, and its output tokens as they are expected.

    Sequences that have ended count as they came, and the others are taken to be off by as much as those were.
    """

    def __init__(self, prompt_tokens: int, expected: IntArray) -> None:
        """`expected`: [sequences] output tokens."""
        self._prompt_tokens, self._expected = prompt_tokens, expected
        self._open = int(expected.sum())  # expected of those that have not ended
        self._ended = self._came = 0  # expected of those that have, and what came

    def end(self, results: Iterable[SequenceResult]) -> None:
        """These have ended."""
        for result in results:
            expected = int(self._expected[result.sequence])
            self._open -= expected
            if result.finish_reason != "error":  # which says nothing about lengths
                self._ended += expected
                self._came += len(result.tokens)

    @property
    def total(self) -> int:
        ratio = self._came / self._ended if self._ended else 1.0
        return self._prompt_tokens + self._came + round(self._open * ratio)
