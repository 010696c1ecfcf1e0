"""The columns of `prompt_logprobs`: one entry a token of the prompt, so that they can be read without the prompt.

prompt_logprobs       list of {token, logprob}; the first token's log-probability is null
prompt_top_logprobs   list of lists of the same, the most probable first; an empty list for the first token
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.core import PromptLogprobs

TOKEN = pa.struct([pa.field("token", pa.int32()), pa.field("logprob", pa.float32())])
PROMPT_LOGPROBS = (
    pa.field("prompt_logprobs", pa.list_(TOKEN)),
    pa.field("prompt_top_logprobs", pa.list_(pa.list_(TOKEN))),
)


def prompt_logprob_arrays(values: Sequence[PromptLogprobs | None]) -> list[pa.Array]:
    """The two columns; null where a row has none. Arrays of numbers, for there may be thousands of tokens a row."""
    found = [value for value in values if value is not None]
    lengths = [None if value is None else len(value.tokens) for value in values]
    first = _joined([np.arange(len(value.tokens)) == 0 for value in found], np.bool_)
    tokens = _joined([value.tokens for value in found], np.int32)
    chosen = pa.StructArray.from_arrays(
        [
            pa.array(tokens),
            pa.array(_joined([value.logprobs for value in found], np.float32), mask=first),
        ],
        fields=list(TOKEN),
    )
    counts = np.where(
        first, 0, _joined([np.full(len(v.tokens), v.top_tokens.shape[1]) for v in found], np.int64)
    )
    beside = pa.StructArray.from_arrays(
        [
            pa.array(_joined([value.top_tokens[1:].ravel() for value in found], np.int32)),
            pa.array(_joined([value.top_logprobs[1:].ravel() for value in found], np.float32)),
        ],
        fields=list(TOKEN),
    )
    by_token = pa.ListArray.from_arrays(
        pa.array(np.concatenate(([0], np.cumsum(counts))), pa.int32()), beside
    )
    offsets = _offsets(lengths)
    return [pa.ListArray.from_arrays(offsets, chosen), pa.ListArray.from_arrays(offsets, by_token)]


def prompt_logprobs_of(row: Mapping[str, Any]) -> PromptLogprobs | None:
    """The same from a row of these columns."""
    if row.get("prompt_logprobs") is None:
        return None
    chosen, beside = row["prompt_logprobs"], row["prompt_top_logprobs"]
    width = max((len(top) for top in beside), default=0)
    nothing = [(-1, np.nan)] * width
    pairs = [[(item["token"], item["logprob"]) for item in top] or nothing for top in beside]
    top = np.array(pairs, dtype=np.float64).reshape(len(chosen), width, 2)
    return PromptLogprobs(
        np.array([item["token"] for item in chosen], np.int32),
        np.array([np.nan if item["logprob"] is None else item["logprob"] for item in chosen], np.float32),
        top[..., 0].astype(np.int32),
        top[..., 1].astype(np.float32),
    )


def _offsets(lengths: Sequence[int | None]) -> pa.Array:
    """Where each list begins; null at a list that is null."""
    ends = np.cumsum([0, *(length or 0 for length in lengths)])
    return pa.array(ends, pa.int32(), mask=np.array([*(length is None for length in lengths), False]))


def _joined(parts: Iterable[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
