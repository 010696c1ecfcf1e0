"""How long earlier answers were, so that a plan need not assume that each is as long as it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchllm.core import IntArray, SamplingParams
from batchllm.errors import JobError, first_line
from batchllm.planner.length_groups import NO_GROUP
from batchllm.planner.lengths import LengthEstimator

_MOST_ANSWERS = 65_536  # more would not change what is expected
_GOLDEN = 0.6180339887498949
_COLUMNS = ["output_tokens", "finish_reason"]


@dataclass(frozen=True)
class PastLengths:
    """The lengths of answers."""

    tokens: IntArray  # [answers]
    cut: NDArray[np.bool_]  # [answers] ended because of their limit
    row: IntArray  # [answers] the row of this job that was answered, -1: not known


def past_lengths(
    history: Path | None, source: str, id_column: str | None = None, ids: pa.ChunkedArray | None = None
) -> PastLengths | None:
    """The lengths of the answers in `history`, an output folder; None when there is no such folder. Raises JobError.

    An answer whose id is among `ids`, the id column of this job's rows, is known to be of that row.
    """
    if history is None:
        return None
    where = f"{source}: plan.history: {history}"
    try:
        found = [_read(path, id_column, ids) for path in sorted(history.glob("*.parquet"))]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise JobError(
            f"{where} does not hold the answers of an earlier run ({first_line(error)}); give its output.path"
        ) from None
    if not sum(len(part.tokens) for part in found):
        raise JobError(f"{where} holds no answers; give the output.path of a run that has finished")
    return _joined(found)


def own_lengths(folder: Path, parts: Mapping[str, IntArray], row_of_request: IntArray) -> PastLengths | None:
    """The lengths of the answers that this job has already: `parts` names its files in `folder` and the request of
    each of their rows. None when there are none, or they cannot be read now."""
    found: list[PastLengths] = []
    try:
        for name, requests in parts.items():
            found.append(_read(folder / name, rows=row_of_request[requests]))
            if sum(len(part.tokens) for part in found) >= _MOST_ANSWERS:
                break
    except (OSError, KeyError, pa.ArrowException):
        return None
    return _joined(found) if sum(len(part.tokens) for part in found) else None


def teach(
    estimator: LengthEstimator,
    past: PastLengths | None,
    params: tuple[SamplingParams, ...],
    row_group: NDArray[np.int32],
    params_of: NDArray[np.int32] | None = None,
) -> None:
    """Lets the estimator know these lengths. `row_group`: the group of each row of this job.

    With `params_of` (this job's own rows) an answer stands for the parameters of its row, else for those of every kind.
    An answer that was cut off at its limit is taken to go on to the new one, if that is larger.
    """
    if past is None:
        return
    group = np.where(past.row >= 0, row_group[past.row], NO_GROUP)
    most = np.array([one.max_tokens for one in params], dtype=np.int64)
    if params_of is not None:
        own = params_of[past.row]
        estimator.observe_all(own, _under(past, most[own]), group)
        return
    kind = estimator.kinds(np.arange(len(params)))
    by_limit = np.lexsort((most, kind))
    for index in by_limit[np.flatnonzero(np.diff(kind[by_limit], append=-1))].tolist():
        estimator.observe(index, _under(past, most[index]), group)


def _under(past: PastLengths, most: IntArray) -> IntArray:
    """The lengths [answers], were these the limits."""
    going_on = past.cut & (past.tokens < most)
    return np.where(going_on, most, np.minimum(past.tokens, most))


def _read(
    path: Path,
    id_column: str | None = None,
    ids: pa.ChunkedArray | None = None,
    rows: IntArray | None = None,
) -> PastLengths:
    """The answers of one file. Their rows are given, or found by id."""
    with_ids = id_column is not None and ids is not None and id_column in pq.read_schema(path).names
    table = pq.read_table(path, columns=[*_COLUMNS, *([id_column] if with_ids else [])])
    if rows is None:
        rows = np.full(len(table), -1, dtype=np.int64)
        if with_ids:
            rows = _rows_of(table[id_column], ids)
    answered = pc.not_equal(table["finish_reason"], "error").to_numpy()
    tokens = pc.list_value_length(table["output_tokens"]).fill_null(0).to_numpy().astype(np.int64)
    cut = pc.equal(table["finish_reason"], "length").to_numpy().astype(bool)
    return PastLengths(tokens[answered], cut[answered], rows[answered])


def _rows_of(known: pa.ChunkedArray, ids: pa.ChunkedArray) -> IntArray:
    """-1 for an id that this job does not have, and for all when theirs are of another type."""
    try:
        found = pc.index_in(known, value_set=ids.combine_chunks())
    except pa.ArrowException:
        return np.full(len(known), -1, dtype=np.int64)
    rows: IntArray = found.fill_null(-1).to_numpy().astype(np.int64)
    return rows


def _joined(parts: Iterable[PastLengths]) -> PastLengths:
    """In an order in which any stretch has short and long answers as the whole does: estimators forget the oldest."""
    columns = zip(*((part.tokens, part.cut, part.row) for part in parts))
    tokens, cut, row = (np.concatenate(column) for column in columns)
    by_length = np.argsort(tokens, kind="stable")
    chosen = by_length[np.linspace(0, len(tokens) - 1, min(_MOST_ANSWERS, len(tokens))).astype(np.int64)]
    # Neighbours by the fractional parts of multiples of the golden ratio lie evenly over the whole range.
    spread = chosen[np.argsort((np.arange(len(chosen)) * _GOLDEN) % 1.0, kind="stable")]
    return PastLengths(tokens[spread], cut[spread], row[spread])
