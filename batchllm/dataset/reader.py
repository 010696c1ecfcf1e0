"""The input table as a stream: whatever the format, batches of rows in an order that never changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from batchllm.dataset.files import find_files
from batchllm.dataset.read_csv import CsvReader
from batchllm.dataset.read_jsonl import JsonLinesReader
from batchllm.dataset.read_parquet import ParquetReader
from batchllm.dataset.rows import RowBatch
from batchllm.errors import InputError
from batchllm.job import InputSpec

BATCH_ROWS = 1024


class TableReader(Protocol):
    """One format. `num_rows` and `batches` may go beyond `input.limit`; InputData cuts them."""

    schema: pa.Schema
    num_rows: int | None

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]: ...


class InputData:
    """An opened input. `num_rows` is None when counting would mean reading all of it."""

    def __init__(self, reader: TableReader, limit: int | None, source: str) -> None:
        self._reader = reader
        self._source = source
        self._limit = limit
        self.schema = reader.schema
        rows = reader.num_rows
        self.num_rows = rows if rows is None or limit is None else min(rows, limit)

    def batches(
        self, batch_rows: int = BATCH_ROWS, columns: Sequence[str] | None = None
    ) -> Iterator[RowBatch]:
        """All rows in order, only the named columns (default: all). Each call starts from the beginning.

        Rows are never dropped: one that cannot be read has nulls and an entry in `RowBatch.faults`. At most a
        few batches are in memory at a time. Raises InputError when a file turns out to be damaged.
        """
        with _named(self._source):
            yield from self._cut(columns, batch_rows)

    def _cut(self, columns: Sequence[str] | None, batch_rows: int) -> Iterator[RowBatch]:
        left = self._limit
        for batch in self._reader.batches(self.schema.names if columns is None else columns, batch_rows):
            if left is not None and batch.num_rows >= left:
                if left:
                    yield batch.rows(0, left)
                return
            left = None if left is None else left - batch.num_rows
            if batch.num_rows:
                yield batch


def open_input(spec: InputSpec, source: str = "job", without: Collection[Path] = ()) -> InputData:
    """Find the files and learn their columns. Raises InputError, which begins with `source` and says what to do.

    `without`: folders whose Parquet files are the job's own answers and no input, see `find_files`.
    """
    with _named(source):
        reader = _reader(spec, without)
        names = reader.schema.names
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise InputError(f"input.path: `{spec.path}` has two columns named `{twice}`; rename one of them")
    return InputData(reader, spec.limit, source)


def _reader(spec: InputSpec, without: Collection[Path]) -> TableReader:
    files = find_files(spec.path, spec.format, without)
    if files.format == "parquet":
        return ParquetReader(files)
    if files.format == "jsonl":
        return JsonLinesReader(files, spec.limit)
    return CsvReader(files, spec.limit)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Puts the name of the job file before what is wrong with its input."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
