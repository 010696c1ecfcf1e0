"""How long sequences may be: faults for prompts beyond the model, and the longest sequence of a job."""

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


def longest_sequence(prompts: PromptTable) -> int:
    """Most tokens (prompt and max_tokens) that any row without a fault can come to; 0 when there is none."""
    if not prompts.num_rows:
        return 0
    outputs = np.array([params.max_tokens for params in prompts.params], dtype=np.int64)[prompts.params_of]
    totals = np.diff(prompts.offsets) + outputs
    totals[list(prompts.faults)] = 0
    return int(totals.max())
