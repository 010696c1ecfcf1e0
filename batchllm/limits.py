"""What a model can take: faults for rows beyond it, the same ones however rows are run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, PromptTable
from batchllm.executor.gate import LengthLimit, beyond, check_lengths
from batchllm.executor.grammars import refuse_impossible_structures, with_faults
from batchllm.executor.stopping import end_of_sequence_ids
from batchllm.planner.output_limits import output_limits


@dataclass(frozen=True)
class ModelLimits:
    """From a model's configuration."""

    model_type: str
    max_length: int | None  # most tokens of a sequence (prompt and output)
    vocabulary: int | None
    exact: LengthLimit | None  # where the architecture is exact up to some length only
    eos_ids: frozenset[int]

    @classmethod
    def of(
        cls, config: Any, exact: LengthLimit | None, generation_config: Any, tokenizer: Any | None
    ) -> ModelLimits:
        text = config.get_text_config()
        return cls(
            str(config.model_type),
            getattr(text, "max_position_embeddings", None) or None,
            getattr(text, "vocab_size", None),
            exact,
            end_of_sequence_ids(generation_config, tokenizer),
        )


def usable(
    prompts: PromptTable,
    limits: ModelLimits,
    tokenizer: Any | None,
    scored: NDArray[np.bool_] | None = None,
) -> PromptTable:
    """Adds a fault for every row that the model cannot answer, or not exactly.

    `scored` [rows]: those of which the prompt is scored; it may fill the model's whole length. Without a tokenizer no
    row may ask for structure. Raises ModelError when the model gives no structure at all, or is exact for no row.
    """
    scored = np.zeros(prompts.num_rows, dtype=np.bool_) if scored is None else scored
    prompts = _refuse_long_prompts(prompts, limits.max_length, scored)
    prompts = _refuse_unknown_tokens(prompts, limits.vocabulary)
    prompts = _refuse_unknown_params(prompts, limits.vocabulary)
    if tokenizer is not None:
        ends = sorted(limits.eos_ids)
        prompts = refuse_impossible_structures(prompts, tokenizer, limits.vocabulary or 0, ends)
    return _refuse_inexact_lengths(prompts, limits, scored)


def _refuse_long_prompts(
    prompts: PromptTable, max_length: int | None, scored: NDArray[np.bool_]
) -> PromptTable:
    """Of those that leave no room for one output token within `max_length` tokens."""
    if not max_length:
        return prompts
    lengths = np.diff(prompts.offsets)
    most = np.where(scored, max_length, max_length - 1)
    faults = {
        int(row): f"the prompt has {lengths[row]:,} tokens; the model reads at most {most[row]:,}"
        for row in np.flatnonzero(lengths > most)
    }
    return replace(prompts, faults={**prompts.faults, **faults}) if faults else prompts


def _refuse_unknown_tokens(prompts: PromptTable, vocabulary: int | None) -> PromptTable:
    """Of prompts with a token id that a model of `vocabulary` tokens has no embedding for.

    A tokenizer may know more tokens than the model beside it, and ids may be given directly.
    """
    if not vocabulary or not len(prompts.tokens) or int(prompts.tokens.max()) < vocabulary:
        return prompts
    places = np.flatnonzero(prompts.tokens >= vocabulary)
    rows = np.searchsorted(prompts.offsets, places, side="right") - 1
    faults = {
        int(
            row
        ): f"the prompt has the token id {prompts.tokens[place]:,}; the model knows {vocabulary:,} tokens"
        for row, place in zip(rows, places)
    }
    return replace(prompts, faults={**faults, **prompts.faults})


def _refuse_unknown_params(prompts: PromptTable, vocabulary: int | None) -> PromptTable:
    """Of rows whose parameters name a token id that the model does not have, other than to end or forbid something."""
    if not vocabulary:
        return prompts
    reasons: dict[int, str] = {}  # by set of parameters
    for index, params in enumerate(prompts.params):
        named = {"logit_bias": [token for token, _ in params.logit_bias]}
        named["allowed_token_ids"] = list(params.allowed_token_ids)
        for key, tokens in named.items():
            if max(tokens, default=-1) >= vocabulary:
                reasons[index] = (
                    f"generate.{key} names token {max(tokens):,}; the model knows {vocabulary:,} tokens"
                )
    return with_faults(prompts, reasons)


def _refuse_inexact_lengths(
    prompts: PromptTable, limits: ModelLimits, scored: NDArray[np.bool_]
) -> PromptTable:
    """Of rows that may come to more tokens than the architecture is exact for. ModelError if no row is left."""
    exact = limits.exact
    if exact is None:
        return prompts
    total = _sequence_lengths(prompts, limits.max_length, scored)
    over = np.flatnonzero(total > exact.tokens)
    if len(over) and len(over) + len(prompts.faults) == prompts.num_rows:
        check_lengths(exact, int(total.max()), limits.model_type)
    reason = beyond(exact, limits.model_type)
    faults = {
        int(
            row
        ): f"prompt and max_tokens come to {total[row]:,} tokens; {reason}; shorten the prompt or lower "
        "generate.max_tokens"
        for row in over
    }
    return replace(prompts, faults={**prompts.faults, **faults}) if faults else prompts


def _sequence_lengths(prompts: PromptTable, max_length: int | None, scored: NDArray[np.bool_]) -> IntArray:
    """[rows] most tokens (prompt and output) that each can come to; 0 for rows with a fault."""
    lengths = np.diff(prompts.offsets)
    outputs = output_limits(prompts, prompts.params_of, lengths, max_length)
    total: IntArray = lengths + np.where(scored, 0, outputs)
    total[list(prompts.faults)] = 0
    return total
