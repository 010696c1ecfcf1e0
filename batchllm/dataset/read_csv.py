"""CSV files as a stream of batches. A row with too many or too few cells is a faulty row.

A CSV has no types, so a column is text exactly as it is in the file, except that a column of nothing but
whole numbers, written the plain way, is int64. An empty cell is null; an empty cell in quotes is empty text.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from batchllm.dataset.files import InputFiles, first_line
from batchllm.dataset.rows import RowBatch, RowFault, no_columns
from batchllm.errors import InputError

_BLOCK_BYTES = 16 << 20  # no row can be longer
Report = Callable[[csv.InvalidRow], str]

_WHOLE_NUMBER = r"^(0|-?[1-9]\d{0,17})$"


class CsvReader:
    """Opening it reads all rows once, to find out which columns hold only whole numbers."""

    def __init__(self, files: InputFiles, limit: int | None) -> None:
        self._files = files
        self.num_rows: int | None = 0
        is_number: dict[str, bool | None] = {}  # None: only nulls so far
        for batch in self._all_text(None):
            part = batch if limit is None else batch.rows(0, min(limit - self.num_rows, batch.num_rows))
            self.num_rows += part.num_rows
            for name, column in zip(part.data.schema.names, part.data.columns):
                is_number[name] = _and(is_number.get(name), _whole_numbers(column))
            if self.num_rows == limit:
                break
        self.schema = pa.schema(
            [(name, pa.int64() if number else pa.string()) for name, number in is_number.items()]
        )

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        types = [self.schema.field(name).type for name in columns]
        for batch in self._all_text(list(columns)):
            data = batch.data
            if columns:
                arrays = [column.cast(type_) for column, type_ in zip(data.columns, types)]
                data = pa.record_batch(arrays, names=list(columns))
            yield from RowBatch(data, batch.faults).pieces(batch_rows)

    def _all_text(self, columns: list[str] | None) -> Iterator[RowBatch]:
        """The rows of all files, every cell as text; `columns` that a file does not have are null."""
        for path in self._files.paths:
            with _csv_errors(path):
                yield from _with_faults(self._files, path, columns)


def _with_faults(files: InputFiles, path: str, columns: list[str] | None) -> Iterator[RowBatch]:
    """The rows of one file. Arrow drops the bad ones and tells their numbers; they are put back as nulls."""
    bad: dict[int, RowFault] = {}

    def report(row: csv.InvalidRow) -> str:
        cells = f"{row.actual_columns} cells instead of {row.expected_columns}"
        bad[row.number] = RowFault(f"{posixpath.basename(path)}, row {row.number} has {cells}")
        return "skip"

    names = _header(files, path)
    number = 2  # of the next row; the header is row 1
    for batch in _open(files, path, names, columns, report):
        taken: list[int | None] = []
        faults: dict[int, RowFault] = {}
        for row in range(batch.num_rows):
            while number in bad:
                faults[len(taken)] = bad.pop(number)
                taken.append(None)
                number += 1
            taken.append(row)
            number += 1
        yield RowBatch(_take(batch, taken) if faults else batch, faults)
    if bad:
        empty = pa.record_batch([pa.nulls(len(bad), pa.string())] * len(names), names=names)
        yield RowBatch(empty if columns is None else _select(empty, columns), dict(enumerate(bad.values())))


def _take(batch: pa.RecordBatch, rows: list[int | None]) -> pa.RecordBatch:
    return batch.take(pa.array(rows, pa.int64())) if batch.num_columns else no_columns(len(rows))


def _select(empty: pa.RecordBatch, columns: list[str]) -> pa.RecordBatch:
    if not columns:
        return no_columns(empty.num_rows)
    return pa.record_batch([pa.nulls(empty.num_rows, pa.string())] * len(columns), names=columns)


def _header(files: InputFiles, path: str) -> list[str]:
    """The column names of a file, none when it is empty."""
    with files.filesystem.open_input_stream(path) as stream:
        try:
            options = csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
            names: list[str] = csv.open_csv(stream, options, _parse_options(lambda row: "skip")).schema.names
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                return []
            raise
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise InputError(f"input.path: `{path}` has two columns named `{twice}`; rename one of them")
    return names


def _open(
    files: InputFiles, path: str, names: list[str], columns: list[str] | None, report: Report
) -> Iterator[pa.RecordBatch]:
    if not names:
        return
    convert = csv.ConvertOptions(
        check_utf8=False,  # found later, row by row
        column_types=dict.fromkeys([*names, *(columns or [])], pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        include_columns=columns,
        include_missing_columns=True,
    )
    read = csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    with files.filesystem.open_input_stream(path) as stream:
        yield from csv.open_csv(stream, read, _parse_options(report), convert)


def _parse_options(report: Report) -> csv.ParseOptions:
    return csv.ParseOptions(newlines_in_values=True, invalid_row_handler=report)


@contextmanager
def _csv_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input.path: `{path}` cannot be read as CSV: {first_line(error)}") from None


def _whole_numbers(column: pa.Array) -> bool | None:
    if column.null_count == len(column):
        return None
    return bool(pc.all(pc.match_substring_regex(column.cast(pa.binary()), _WHOLE_NUMBER)).as_py())


def _and(known: bool | None, found: bool | None) -> bool | None:
    if known is None or found is None:
        return found if known is None else known
    return known and found
