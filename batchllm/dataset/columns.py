"""The columns of a part: the kept ones, read from the input by row number, and those that a run adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from batchllm.core import IntArray, RequestResult, RequestTable, SamplingParams, TopLogprobs
from batchllm.dataset.prompt_columns import PROMPT_LOGPROBS, TOKEN, prompt_logprob_arrays
from batchllm.errors import JobError

_ANSWER_FIELDS = (
    pa.field("output", pa.string()),
    pa.field("output_tokens", pa.list_(pa.int32())),
    pa.field("finish_reason", pa.string()),
    pa.field("error", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("shared_tokens", pa.int32()),
)
_LOGPROBS = pa.field("logprobs", pa.list_(pa.float32()))
_SCORES = (pa.field("logprob", pa.float64()), pa.field("is_greedy", pa.bool_()))
_TOP_LOGPROBS = pa.field("top_logprobs", pa.list_(pa.list_(TOKEN)))
_SAMPLE = pa.field("sample", pa.int32())


class Logprobs(NamedTuple):
    """Which columns of log-probabilities a run adds."""

    of_tokens: bool = False
    of_others: bool = False  # of the most probable tokens beside each
    of_prompts: bool = False

    @classmethod
    def asked_for(cls, params: Iterable[SamplingParams]) -> Logprobs:
        """What any of these asks for."""
        every = list(params)
        return cls(
            any(one.logprobs for one in every),
            any(one.top_logprobs for one in every),
            any(one.prompt_logprobs is not None for one in every),
        )


NO_LOGPROBS = Logprobs()


def check_kept_names(
    names: Iterable[str],
    has_samples: bool,
    logprobs: Logprobs,
    has_scores: bool = False,
    id_column: str | None = None,
) -> None:
    """Refuses kept columns that would stand beside a column of ours with the same name."""
    ours = {field.name for field in _added_fields(has_samples, logprobs, has_scores)}
    seen: set[str] = set()
    for name in names:
        if name in ours and name == id_column:
            raise JobError(
                f"input.id: the column {name!r}, which is copied to the output, has the name of a column that the run "
                "adds; rename it in the input"
            )
        if name in ours:
            raise JobError(
                f"output.keep: the input column {name!r} has the name of a column that the run adds; "
                "rename it in the input or leave it out of output.keep"
            )
        if name in seen:
            raise JobError(f"output.keep: the column {name!r} is named twice; name every kept column once")
        seen.add(name)


class RowReader:
    """Rows of a table in any order, without joining its chunks: a memory-mapped table stays on disk."""

    def __init__(self, table: pa.Table, schema: pa.Schema | None = None) -> None:
        """`schema`: the types in which rows are wanted, if not those in which they are stored."""
        self.schema: pa.Schema = table.schema if schema is None else schema
        self._as_stored = self.schema.equals(table.schema)
        self._batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def take(self, rows: IntArray) -> pa.Table:
        """These rows, in one chunk unless they hold more than 2 GiB of text."""
        if not len(self.schema) or not len(rows):
            return self.schema.empty_table()
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        chunk = np.searchsorted(self._ends, ordered, side="right")
        cuts = [0, *(np.flatnonzero(np.diff(chunk)) + 1), len(rows)]
        pieces = []
        for start, end in pairwise(cuts):
            batch = self._batches[chunk[start]]
            first_row = self._ends[chunk[start]] - batch.num_rows
            piece = batch.take(pa.array(ordered[start:end] - first_row))
            pieces.append(piece if self._as_stored else piece.cast(self.schema))
        joined = pa.Table.from_batches(pieces).combine_chunks()
        if (order[1:] > order[:-1]).all():
            return joined
        place = np.empty(len(rows), dtype=np.int64)
        place[order] = np.arange(len(rows))
        return joined.take(pa.array(place))


class Columns:
    """What the parts of one run look like, and where the values of the kept columns come from."""

    def __init__(
        self, requests: RequestTable, kept: pa.Table, logprobs: Logprobs, scores: bool = False
    ) -> None:
        self.requests = requests
        self.has_samples = bool(len(requests) and requests.sample.max() > 0)
        check_kept_names(kept.column_names, self.has_samples, logprobs, scores)
        self._kept = RowReader(kept, _plain(kept.schema))
        added = _added_fields(self.has_samples, logprobs, scores)
        self.schema: pa.Schema = pa.schema([*self._kept.schema, *added])
        self.answers: pa.Schema = pa.schema([field for field in added if field.name != _SAMPLE.name])

    def kept_values(self, requests: IntArray) -> pa.Table:
        """The kept columns of these requests, and the sample number where there is one."""
        kept = self._kept.take(self.requests.row[requests])
        if not self.has_samples:
            return kept
        samples = pa.array(self.requests.sample[requests])
        return pa.Table.from_arrays([*kept.columns, samples], schema=pa.schema([*self._kept.schema, _SAMPLE]))

    def joined(self, kept: pa.Table, answers: pa.Table) -> pa.Table:
        return pa.Table.from_arrays([*kept.columns, *answers.columns], schema=self.schema)

    def answer_table(self, results: Sequence[RequestResult]) -> pa.Table:
        values = {
            "output": _texts([r.output for r in results]),
            "output_tokens": [r.output_tokens for r in results],
            "finish_reason": [r.finish_reason for r in results],
            "error": _texts([r.error for r in results]),
            "prompt_tokens": [r.prompt_tokens for r in results],
            "shared_tokens": [r.shared_tokens for r in results],
            "logprobs": [r.logprobs for r in results],
            "logprob": [r.logprob for r in results],
            "is_greedy": [r.is_greedy for r in results],
            "top_logprobs": [_top_values(r.top_logprobs) for r in results],
        }
        arrays = [pa.array(values[field.name], field.type) for field in self.answers if field.name in values]
        if PROMPT_LOGPROBS[0] in self.answers:
            arrays += prompt_logprob_arrays([r.prompt_logprobs for r in results])
        return pa.table(arrays, schema=self.answers)

    def stored_answers(self, table: pa.Table) -> pa.Table:
        """The answer columns of an earlier part; one that it lacks is null."""
        missing = [field for field in self.answers if field.name not in table.column_names]
        for field in missing:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        return table.select(self.answers.names).cast(self.answers)


def _added_fields(has_samples: bool, logprobs: Logprobs, has_scores: bool = False) -> list[pa.Field]:
    shown = [*([_LOGPROBS] if logprobs.of_tokens else []), *([_TOP_LOGPROBS] if logprobs.of_others else [])]
    last = PROMPT_LOGPROBS if logprobs.of_prompts else ()  # see Columns.answer_table
    scores = _SCORES if has_scores else ()
    return [*([_SAMPLE] if has_samples else []), *_ANSWER_FIELDS, *shown, *scores, *last]


def _top_values(top: TopLogprobs | None) -> list[list[dict[str, float]]] | None:
    if top is None:
        return None
    return [[{"token": token, "logprob": value} for token, value in beside] for beside in top]


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without metadata of other programs, and without dictionaries, which may differ from part to part."""
    fields = []
    for field in schema:
        value_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, value_type, field.nullable))
    return pa.schema(fields)


def _texts(values: list[str | None]) -> list[str | None]:
    """Half a surrogate pair has no UTF-8: it becomes a question mark, rather than the end of the job."""
    return [v if v is None or v.isascii() else v.encode(errors="replace").decode() for v in values]
