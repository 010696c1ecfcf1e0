"""CSV files as a stream of batches. A row with too many or too few cells is a faulty row.

A CSV has no types, so a column is text exactly as it is in the file, except that a column of nothing but
whole numbers, written the plain way, is int64. An empty cell is null; an empty cell in quotes is empty text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from itertools import count

import pyarrow as pa

from batchllm.dataset.csv_rows import Cell, split_rows
from batchllm.dataset.files import InputFiles
from batchllm.dataset.lines import read_lines
from batchllm.dataset.rows import RowBatch, RowFault, cut, no_columns
from batchllm.errors import InputError

_WHOLE_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,17}")


class CsvReader:
    """Opening it reads all rows once, to find out which columns hold only whole numbers."""

    def __init__(self, files: InputFiles, limit: int | None) -> None:
        self._files = files
        self._limit = limit
        self.num_rows: int | None = 0
        seen: set[str] = set()  # columns that have values
        texts: set[str] = set()  # columns that have a value that is no whole number
        names: dict[str, None] = {}
        for header, rows in self._open_all():
            names |= dict.fromkeys(header)
            for row in rows:
                self.num_rows += 1
                if not isinstance(row, RowFault):
                    _note_values(header, row, seen, texts)
        numbers = seen - texts
        self.schema = pa.schema([(name, pa.int64() if name in numbers else pa.string()) for name in names])

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        fields = [self.schema.field(name) for name in columns]
        for header, rows in self._open_all():
            places = [header.index(name) if name in header else None for name in columns]
            for chunk in cut(((row, _num_bytes(row)) for row in rows), batch_rows):
                yield _to_batch(chunk, fields, places)

    def _open_all(self) -> Iterator[tuple[list[str], Iterator[list[Cell] | RowFault]]]:
        """The header and the rows of each file, up to the limit."""
        tickets = count() if self._limit is None else iter(range(self._limit))
        for path in self._files.paths:
            header, rows = self._open(path)
            yield header, (row for row, _ in zip(rows, tickets))

    def _open(self, path: str) -> tuple[list[str], Iterator[list[Cell] | RowFault]]:
        """The column names of a file, none when it is empty, and its rows."""
        rows = split_rows(read_lines(self._files, path))
        first = next(rows, [])
        if isinstance(first, str):
            raise InputError(f"input.path: `{path}`: the header {first}")
        try:
            header = [(cell or b"").decode() for cell in first]
        except UnicodeDecodeError:
            raise InputError(
                f"input.path: `{path}`: the header is not UTF-8 text; is it a CSV file?"
            ) from None
        if any("\r" in name.replace("\r\n", "") for name in header):
            raise InputError(f"input.path: `{path}`: its lines end in CR; convert them to end in LF")
        twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
        if twice is not None:
            raise InputError(f"input.path: `{path}` has two columns named `{twice}`; rename one of them")
        return header, _checked(rows, len(header), posixpath.basename(path))


def _checked(rows: Iterator[list[Cell] | str], cells: int, name: str) -> Iterator[list[Cell] | RowFault]:
    for number, row in enumerate(rows, start=2):  # the header is row 1
        if isinstance(row, str):
            yield RowFault(f"{name}, row {number} {row}")
        elif len(row) != cells:
            yield RowFault(f"{name}, row {number} has {len(row)} cells instead of {cells}")
        else:
            yield row


def _note_values(header: list[str], row: list[Cell], seen: set[str], texts: set[str]) -> None:
    for name, cell in zip(header, row):
        if cell is not None and name not in texts:
            seen.add(name)
            if not _WHOLE_NUMBER.fullmatch(cell):
                texts.add(name)


def _num_bytes(row: list[Cell] | RowFault) -> int:
    return 0 if isinstance(row, RowFault) else sum(map(len, filter(None, row)))


def _to_batch(
    rows: list[list[Cell] | RowFault], fields: Sequence[pa.Field], places: Sequence[int | None]
) -> RowBatch:
    faults = {number: row for number, row in enumerate(rows) if isinstance(row, RowFault)}
    if not fields:
        return RowBatch(no_columns(len(rows)), faults)
    columns = []
    for field, place in zip(fields, places):
        cells = [None if place is None or isinstance(row, RowFault) else row[place] for row in rows]
        if pa.types.is_int64(field.type):
            columns.append(pa.array([None if cell is None else int(cell) for cell in cells], pa.int64()))
        else:
            # A view, because a cast would refuse bytes that are not UTF-8; they are found row by row.
            columns.append(pa.array(cells, pa.binary()).view(pa.string()))
    return RowBatch(pa.record_batch(columns, schema=pa.schema(fields)), faults)
