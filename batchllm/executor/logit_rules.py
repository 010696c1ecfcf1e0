"""What sampling parameters do to logits before a token is chosen: penalties, biases, and tokens ruled out.

All rows of a step at once, in the order that `SamplingParams` names. Penalties are those of CTRL (Keskar et al.,
arXiv 1909.05858: repetition, here over prompt and output) and of OpenAI's API (frequency and presence, over output).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import Plan, PromptTable, SamplingParams
from batchllm.executor.running import Running

_FORBIDDEN = float("-inf")
_KEPT = 8192  # sets of parameters that are known at a time: more than rows run together


def has_rules(params: SamplingParams) -> bool:
    """Whether logits are changed for a row with these parameters; structure is another's business."""
    return (
        _has_penalties(params)
        or bool(params.logit_bias or params.bad_words or params.allowed_token_ids)
        or params.min_tokens > 0
    )


class LogitRules:
    """The rules of every sequence of one plan. Sequences are remembered from their first token to `forget`."""

    def __init__(self, plan: Plan, prompts: PromptTable, eos_ids: frozenset[int], tokenizer: Any) -> None:
        self._plan, self._prompts = plan, prompts
        self._eos_ids, self._tokenizer = eos_ids, tokenizer
        self._active = any(has_rules(params) for params in prompts.params)
        self._histories: dict[int, _History] = {}
        self._fixed_of = lru_cache(_KEPT)(self._make_fixed)

    def apply(self, logits: Tensor, runs: Sequence[Running]) -> Tensor:
        """logits [n, V] of these sequences, as their rules want them; a copy unless nothing changes."""
        rows = [row for row, run in enumerate(runs) if has_rules(run.params)] if self._active else []
        if not rows:
            return logits
        changed = logits.clone()
        for row in rows:
            if _has_penalties(runs[row].params):
                self._history(runs[row]).read(runs[row].output)
        self._penalise_repetition(changed, runs, rows)
        self._penalise_output(changed, runs, rows)
        fixed = [(row, self._fixed_of(runs[row].params, logits.shape[1])) for row in rows]
        biased = [(row, rules) for row, rules in fixed if len(rules.bias_tokens)]
        if biased:
            tokens = torch.cat([rules.bias_tokens for _, rules in biased])
            values = torch.cat([rules.bias for _, rules in biased])
            places = _places([row for row, _ in biased], [len(rules.bias) for _, rules in biased])
            changed[places, tokens] += values
        for row, rules in fixed:
            if rules.allowed is not None:
                kept = changed[row, rules.allowed]
                changed[row] = _FORBIDDEN
                changed[row, rules.allowed] = kept
        self._forbid_now(changed, runs, fixed)
        return changed

    def forget(self, sequence: int) -> None:
        self._histories.pop(sequence, None)

    def _penalise_repetition(self, logits: Tensor, runs: Sequence[Running], rows: Sequence[int]) -> None:
        rows = [row for row in rows if runs[row].params.repetition_penalty != 1.0]
        if not rows:
            return
        seen = [self._histories[runs[row].sequence].seen() for row in rows]
        places, tokens = _places(rows, list(map(len, seen))), torch.from_numpy(np.concatenate(seen))
        factors = torch.tensor([runs[row].params.repetition_penalty for row in rows])
        factor = factors.repeat_interleave(torch.tensor(list(map(len, seen))))
        values = logits[places, tokens]
        logits[places, tokens] = torch.where(values > 0, values / factor, values * factor)

    def _penalise_output(self, logits: Tensor, runs: Sequence[Running], rows: Sequence[int]) -> None:
        rows = [row for row in rows if _penalises_output(runs[row].params) and runs[row].output]
        if not rows:
            return
        counts = [self._histories[runs[row].sequence].counts for row in rows]
        lengths = list(map(len, counts))
        tokens = torch.tensor([token for count in counts for token in count])
        times = torch.tensor([time for count in counts for time in count.values()], dtype=torch.float32)
        frequency = torch.tensor([runs[row].params.frequency_penalty for row in rows])
        presence = torch.tensor([runs[row].params.presence_penalty for row in rows])
        repeats = torch.tensor(lengths)
        penalty = frequency.repeat_interleave(repeats) * times + presence.repeat_interleave(repeats)
        logits[_places(rows, lengths), tokens] -= penalty

    def _forbid_now(self, logits: Tensor, runs: Sequence[Running], fixed: list[tuple[int, _Fixed]]) -> None:
        """Tokens of bad words, the last ones where the output has those before; ends that are too early."""
        places: list[int] = []
        tokens: list[int] = []
        for row, rules in fixed:
            output = runs[row].output
            found = list(rules.never)
            if len(output) < runs[row].params.min_tokens:
                found += rules.ends
            found += [word[-1] for word in rules.words if tuple(output[1 - len(word) :]) == word[:-1]]
            places += [row] * len(found)
            tokens += found
        if tokens:
            logits[torch.tensor(places), torch.tensor(tokens)] = _FORBIDDEN

    def _history(self, run: Running) -> _History:
        if run.sequence not in self._histories:
            node = self._plan.sequence_node[run.sequence]
            start = int(self._prompts.offsets[self._plan.node_row[node]])
            prompt = self._prompts.tokens[start : start + run.prompt_length]
            needed = run.params.repetition_penalty != 1.0
            unique = np.unique(prompt).astype(np.int64) if needed else np.zeros(0, dtype=np.int64)
            self._histories[run.sequence] = _History(unique)
        return self._histories[run.sequence]

    def _make_fixed(self, params: SamplingParams, vocabulary: int) -> _Fixed:
        """A token that the model does not have never comes, so it needs no ban, nor does a word that it is in."""
        words = bad_word_tokens(params.bad_words, self._tokenizer)
        words = [word for word in words if max(word) < vocabulary]
        ends = {*(() if params.ignore_eos else self._eos_ids), *params.stop_token_ids}
        allowed = params.allowed_token_ids
        return _Fixed(
            bias_tokens=torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64),
            bias=torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float32),
            allowed=torch.tensor(allowed, dtype=torch.int64) if allowed else None,
            never=[word[0] for word in words if len(word) == 1],
            words=[word for word in words if len(word) > 1],
            ends=sorted(token for token in ends if token < vocabulary),
        )


@dataclass(frozen=True)
class _Fixed:
    """What one set of parameters comes to, whatever has been written. No larger than what the parameters name."""

    bias_tokens: Tensor  # [m]
    bias: Tensor  # [m]
    allowed: Tensor | None  # [k] the only tokens that may come
    never: list[int]  # tokens that never come
    words: list[tuple[int, ...]]  # sequences of two tokens or more that never come
    ends: list[int]  # tokens that end an answer


@dataclass
class _History:
    """The tokens of one sequence."""

    prompt: NDArray[np.int64]  # distinct tokens, sorted; empty unless they matter
    counts: dict[int, int] = field(default_factory=dict)  # output token → how often
    _read: int = 0

    def read(self, output: Sequence[int]) -> None:
        for token in output[self._read :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._read = len(output)

    def seen(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        return np.union1d(self.prompt, np.fromiter(self.counts, dtype=np.int64, count=len(self.counts)))


def bad_word_tokens(words: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """The token sequences that write these words, each as it begins a text and as it follows a space."""
    if not words:
        return []
    found = []
    for word in words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
            if tokens and tokens not in found:
                found.append(tokens)
    return found


def _places(rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Row numbers, each as often as its length says."""
    return torch.tensor(rows).repeat_interleave(torch.tensor(lengths))


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or _penalises_output(params)


def _penalises_output(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
