"""How long outputs may become: `max_tokens`, or what the model's length leaves behind the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, PromptTable


def output_limits(
    prompts: PromptTable,
    params: NDArray[np.integer[Any]],
    prompt_length: NDArray[np.integer[Any]],
    max_length: int | None,
) -> IntArray:
    """Most output tokens [n] of sequences with these parameters and prompts, in a model of `max_length` tokens.

    At least one: a prompt that is scored may fill the model's whole length.
    """
    limits = np.array([one.max_tokens for one in prompts.params], dtype=np.int64)[params]
    if max_length is not None:
        limits = np.minimum(limits, max_length - np.asarray(prompt_length, dtype=np.int64))
    at_least_one: IntArray = np.maximum(limits, 1)
    return at_least_one
