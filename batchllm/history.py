"""How long the answers of an earlier run were, so that a plan need not assume that each is as long as it may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchllm.core import IntArray, SamplingParams
from batchllm.errors import JobError
from batchllm.planner.lengths import KEPT_LENGTHS, LengthEstimator


def seeded_estimator(
    history: Path | None, params: tuple[SamplingParams, ...], source: str
) -> LengthEstimator:
    """An estimator that knows the lengths of the answers in `history`, an output folder. Raises JobError.

    The earlier run's answers stand for every parameter set of this job. An answer that was cut off at its limit is
    taken to go on to the new one, if that is larger.
    """
    estimator = LengthEstimator()
    if history is None:
        return estimator
    lengths, cut = _answers(history, source)
    chosen = np.linspace(0, len(lengths) - 1, min(KEPT_LENGTHS, len(lengths))).astype(np.int64)
    for index, one in enumerate(params):
        going_on = cut[chosen] & (lengths[chosen] < one.max_tokens)
        for length in np.where(going_on, one.max_tokens, lengths[chosen]).tolist():
            estimator.observe(index, min(length, one.max_tokens))
    return estimator


def _answers(history: Path, source: str) -> tuple[IntArray, np.ndarray]:
    """Output tokens of every answer, sorted, and whether it ended because of its limit."""
    where = f"{source}: plan.history: {history}"
    lengths, cut = [], []
    try:
        for part in sorted(history.glob("*.parquet")):
            table = pq.read_table(part, columns=["output_tokens", "finish_reason"])
            answered = table.filter(pc.not_equal(table["finish_reason"], "error"))
            lengths.append(pc.list_value_length(answered["output_tokens"]).to_numpy())
            cut.append(pc.equal(answered["finish_reason"], "length").to_numpy())
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(
            f"{where} does not hold the answers of an earlier run ({reason}); give its output.path"
        ) from None
    if not sum(map(len, lengths)):
        raise JobError(f"{where} holds no answers; give the output.path of a run that has finished")
    order = np.argsort(np.concatenate(lengths), kind="stable")
    return np.concatenate(lengths)[order].astype(np.int64), np.concatenate(cut)[order].astype(bool)
