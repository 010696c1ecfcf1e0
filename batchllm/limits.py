"""What a model can read: faults for prompts beyond it, and the longest sequence of a job."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchllm.core import PromptTable


def refuse_long_prompts(prompts: PromptTable, max_length: int | None) -> PromptTable:
    """Adds a fault for every prompt that leaves no room for one output token within `max_length` tokens."""
    if not max_length:
        return prompts
    lengths = np.diff(prompts.offsets)
    faults = {
        int(row): f"the prompt has {lengths[row]:,} tokens; the model reads at most {max_length - 1:,}"
        for row in np.flatnonzero(lengths >= max_length)
    }
    return replace(prompts, faults={**prompts.faults, **faults}) if faults else prompts


def refuse_unknown_tokens(prompts: PromptTable, vocabulary: int | None) -> PromptTable:
    """Adds a fault for every prompt with a token id that a model of `vocabulary` tokens has no embedding for.

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


def refuse_unknown_params(prompts: PromptTable, vocabulary: int | None) -> PromptTable:
    """Adds a fault for every row whose parameters name a token id that the model does not have."""
    if not vocabulary:
        return prompts
    faults: dict[int, str] = {}
    for index, params in enumerate(prompts.params):
        named = {"logit_bias": [token for token, _ in params.logit_bias]}
        named["allowed_token_ids"] = list(params.allowed_token_ids)
        for key, tokens in named.items():
            if max(tokens, default=-1) >= vocabulary:
                reason = f"generate.{key} names token {max(tokens):,}; the model knows {vocabulary:,} tokens"
                faults |= dict.fromkeys(np.flatnonzero(prompts.params_of == index).tolist(), reason)
    return replace(prompts, faults={**faults, **prompts.faults}) if faults else prompts


def longest_sequence(prompts: PromptTable, max_length: int | None = None) -> int:
    """Most tokens (prompt and max_tokens, together at most `max_length`) that any row without a fault can come to;
    0 when there is none."""
    if not prompts.num_rows:
        return 0
    outputs = np.array([params.max_tokens for params in prompts.params], dtype=np.int64)[prompts.params_of]
    totals = np.diff(prompts.offsets) + outputs
    if max_length:
        totals = np.minimum(totals, max_length)
    totals[list(prompts.faults)] = 0
    return int(totals.max())
