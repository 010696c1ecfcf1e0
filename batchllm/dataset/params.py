"""The sampling parameters of each row, where the job takes them from columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal

import pyarrow as pa

from batchllm.core import SamplingParams
from batchllm.dataset.messages import without_nulls
from batchllm.dataset.rows import RowFault
from batchllm.dataset.values import python_values
from batchllm.job import GenerateSpec, InvalidParam

_WHOLE = frozenset(
    {"max_tokens", "top_k", "n", "seed", "top_logprobs", "prompt_logprobs", "best_of", "min_tokens"}
)
_TEXT = frozenset({"stop", "regex", "json_schema", "grammar"})
_NULLABLE = frozenset(
    "prompt_logprobs stop logit_bias bad_words allowed_token_ids choice regex json_schema grammar".split()
)  # null: none


class RowParams:
    """Gathers the distinct parameters of a job. `params[0]` has the job's own values, defaults for columns."""

    def __init__(self, generate: GenerateSpec) -> None:
        self._generate = generate
        self._names = tuple(generate.columns)
        self.columns = tuple(generate.columns.values())
        defaults = GenerateSpec()
        base = generate.params({name: getattr(defaults, name) for name in self._names}, check=False)
        self._index_of: dict[SamplingParams, int] = {base: 0}
        self._seen: dict[str, int | RowFault] = {}

    @property
    def params(self) -> tuple[SamplingParams, ...]:
        return tuple(self._index_of)

    def of(self, batch: pa.RecordBatch) -> list[int | RowFault]:
        """For each row the index of its parameters, or what is wrong with them."""
        if not self.columns:
            return [0] * batch.num_rows
        columns = self._generate.columns.items()
        values = [python_values(batch.column(name), name, key in _NULLABLE) for key, name in columns]
        return [self._index(row) for row in zip(*values)]

    def _index(self, row: tuple[object, ...]) -> int | RowFault:
        key = repr(row)  # whatever is in the columns, lists and structs too, has one
        if key not in self._seen:
            self._seen[key] = self._find(row)
        return self._seen[key]

    def _find(self, row: tuple[object, ...]) -> int | RowFault:
        fault = next((value for value in row if isinstance(value, RowFault)), None)
        if fault is not None:
            return fault
        try:
            values = {name: _plain(name, value) for name, value in zip(self._names, row)}
            params = self._generate.params(values)
        except InvalidParam as error:
            column = self._generate.columns.get(error.parameter.partition("[")[0])
            return RowFault(f"column `{column}`: {error}" if column else f"generate.{error}")
        return self._index_of.setdefault(params, len(self._index_of))


def _plain(parameter: str, value: object) -> object:
    """Values as they are meant: numbers that columns hold as fractions, decimals or, in a CSV file, as text; mappings
    without the fields that only other rows have."""
    if isinstance(value, Mapping):
        return without_nulls(value)
    if parameter in _TEXT or value is None:
        return value
    if isinstance(value, str):
        value = _from_json(value)
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and parameter in _WHOLE and value.is_integer():
        return int(value)
    return value


def _from_json(text: str) -> object:
    """What the text is as JSON, or the text itself."""
    try:
        value: object = json.loads(text)
        if r"\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError):
        return text
