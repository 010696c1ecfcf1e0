"""Which sets of sampling parameters are told apart when lengths are learned."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from batchllm.core import IntArray, SamplingParams

MOST_KINDS = 256  # what is learned of one takes some KiB; all others together are one more

# What else there is decides which tokens come, or what is told of them, but not how many there are likely to be.
_DECISIVE = attrgetter(
    *"max_tokens min_tokens temperature top_p top_k min_p stop stop_token_ids ignore_eos repetition_penalty "
    "frequency_penalty presence_penalty logit_bias bad_words allowed_token_ids choice regex json_schema "
    "grammar".split()
)


def length_kinds(params: Sequence[SamplingParams]) -> IntArray:
    """[sets] a number from 0 to MOST_KINDS: sets with one number count as the same. The first kinds have their own."""
    numbers: dict[object, int] = {}
    return np.array(
        [min(numbers.setdefault(_DECISIVE(one), len(numbers)), MOST_KINDS) for one in params], dtype=np.int64
    )
