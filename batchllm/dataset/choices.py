"""`score.choices`: every text of a list column becomes a row of its own, beside the other values of its row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from batchllm.dataset.reader import BATCH_ROWS, InputData
from batchllm.dataset.rows import RowBatch, RowFault
from batchllm.dataset.values import python_values
from batchllm.errors import JobError
from batchllm.suggest import column_hint

CHOICE, NUMBER = "choice", "choice_index"


class ChoiceRows:
    """An InputData with one row for each choice. A row whose list is null or empty stays one row, a fault."""

    def __init__(self, data: InputData, column: str, source: str) -> None:
        schema = data.schema
        where = f"{source}: score.choices"
        if column not in schema.names:
            raise JobError(f"{where}: there is no column `{column}`; {column_hint(column, schema.names)}")
        if not _is_list(schema.field(column).type):
            raise JobError(
                f"{where}: `{column}` holds {schema.field(column).type}, and choices are a list of texts"
            )
        taken = next((name for name in (CHOICE, NUMBER) if name in schema.names), None)
        if taken is not None:
            raise JobError(f"{where}: the input has a column `{taken}` already; rename it")
        self._data, self._column = data, column
        self.schema = pa.schema([*schema, pa.field(CHOICE, pa.string()), pa.field(NUMBER, pa.int32())])
        self.num_rows: int | None = None

    def batches(
        self, batch_rows: int = BATCH_ROWS, columns: Sequence[str] | None = None
    ) -> Iterator[RowBatch]:
        wanted = self.schema.names if columns is None else list(columns)
        read = dict.fromkeys([*(name for name in wanted if name not in (CHOICE, NUMBER)), self._column])
        for batch in self._data.batches(batch_rows, list(read)):
            yield self._exploded(batch, wanted)

    def _exploded(self, batch: RowBatch, wanted: Sequence[str]) -> RowBatch:
        rows: list[int] = []
        choices: list[str | None] = []
        numbers: list[int | None] = []
        faults: dict[int, RowFault] = {}
        for row, value in enumerate(python_values(batch.data.column(self._column), self._column)):
            texts = self._texts(value)
            fault = batch.faults.get(row) or (texts if isinstance(texts, RowFault) else None)
            if fault is not None or isinstance(texts, RowFault):
                faults[len(rows)] = fault or RowFault("the choices cannot be read")
                rows.append(row)
                choices.append(None)
                numbers.append(None)
                continue
            rows += [row] * len(texts)
            choices += texts
            numbers += range(len(texts))
        data = batch.data.take(pa.array(rows, pa.int64()))
        columns = {CHOICE: pa.array(choices, pa.string()), NUMBER: pa.array(numbers, pa.int32())}
        arrays = [columns[name] if name in columns else data.column(name) for name in wanted]
        schema = pa.schema([self.schema.field(name) for name in wanted])
        if not wanted:
            return RowBatch(data.select([]), faults)
        return RowBatch(pa.record_batch(arrays, schema=schema), faults)

    def _texts(self, value: object) -> list[str | None] | RowFault:
        if isinstance(value, RowFault):
            return value
        if not isinstance(value, list) or not value:
            return RowFault(f"column `{self._column}` has no choices")
        wrong = next((number for number, text in enumerate(value) if not isinstance(text, str)), None)
        if wrong is not None:
            return RowFault(f"column `{self._column}`: choice {wrong} is no text")
        return value


def _is_list(type_: pa.DataType) -> bool:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    return bool(
        is_list and (pa.types.is_string(type_.value_type) or pa.types.is_large_string(type_.value_type))
    )
