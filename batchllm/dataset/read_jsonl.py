"""JSON lines as a stream of batches. A line that cannot be read is a faulty row; blank lines are no rows."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import pyarrow as pa

from batchllm.dataset.files import InputFiles
from batchllm.dataset.lines import read_lines
from batchllm.dataset.rows import RowBatch, RowFault, cut, no_columns
from batchllm.errors import InputError

Record = Mapping[str, object]

_SCAN_ROWS = 1024
_MOST_LEVELS = 32  # of lists and objects in a column's type; Arrow files can hold 64
_OTHER_FILES = {
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
    b"\x1f\x8b": "is compressed with gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; let its name end in .zst",
    b"PAR1": "is Parquet; set input.format to parquet",
}  # by their first bytes
_OPENS_ONLY = re.compile(rb"[\[{]|\[.*,")  # the first line of an array or object over several lines
_UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)


class JsonLinesReader:
    """Opening it reads all lines once, because only then the columns and their types are known.

    Values of a column that have no common type become text: strings as they are, other values as JSON.
    """

    def __init__(self, files: InputFiles, limit: int | None) -> None:
        self._files = files
        self._limit = limit
        types: dict[str, pa.DataType] = {}
        self.num_rows: int | None = 0
        for records in self._record_batches(_SCAN_ROWS):
            self.num_rows += len(records)
            _widen(types, [record for record in records if not isinstance(record, RowFault)])
        self.schema = pa.schema([(name, _storable(type_)) for name, type_ in types.items()])

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        fields = [self.schema.field(name) for name in columns]
        for records in self._record_batches(batch_rows):
            yield _to_batch(records, fields)

    def _record_batches(self, batch_rows: int) -> Iterator[list[Record | RowFault]]:
        """Every record once, in order, not more than `batch_rows` at a time and the limit in all."""
        lines = islice(self._lines(), self._limit)
        return cut(((_parse(line, where), len(line)) for where, line in lines), batch_rows)

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        """Every line that is not blank, and what to call it."""
        for path in self._files.paths:
            seen = False
            for number, line in enumerate(read_lines(self._files, path), start=1):
                text = line.strip()
                if not text:
                    continue
                if not seen:
                    _refuse_other_files(text, path)
                    seen = True
                yield f"{posixpath.basename(path)}, line {number}", text


def _refuse_other_files(first_line: bytes, path: str) -> None:
    """Raises InputError where it would be the same complaint about every line."""
    what = next((what for start, what in _OTHER_FILES.items() if first_line.startswith(start)), None)
    if what is None and _OPENS_ONLY.fullmatch(first_line):
        what = "is JSON over several lines; write every row as an object on one line"
    if what is not None:
        raise InputError(f"input.path: `{path}` {what}")


def _parse(line: bytes, where: str) -> Record | RowFault:
    try:
        record = json.loads(line.decode())
        if rb"\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except json.JSONDecodeError as error:
        return RowFault(f"{where} is not valid JSON: {error.msg} (column {error.colno})")
    except UnicodeError:
        return RowFault(f"{where} is not valid UTF-8 text")
    except (ValueError, RecursionError) as error:
        return RowFault(f"{where} is not valid JSON: {error}")
    if not isinstance(record, dict):
        return RowFault(f"{where} is not a JSON object")
    return record


def _widen(types: dict[str, pa.DataType], records: Sequence[Record]) -> None:
    """Make `types` wide enough for these records too. Columns keep the order in which they first appear."""
    names = dict.fromkeys(name for record in records for name in record)
    for name in names:
        try:
            found = pa.array([record.get(name) for record in records]).type
            known = types.get(name, pa.null())
            schemas = [pa.schema([("x", known)]), pa.schema([("x", found)])]
            types[name] = pa.unify_schemas(schemas, promote_options="permissive").field("x").type
        except _UNFIT:
            types[name] = pa.string()


def _storable(type_: pa.DataType) -> pa.DataType:
    """Text for a column with objects without keys, which Parquet cannot store, or with very many levels."""
    return pa.string() if _is_deep(type_) or "struct<>" in str(type_) else type_


def _is_deep(type_: pa.DataType) -> bool:
    level = [type_]
    for _ in range(_MOST_LEVELS + 1):
        level = [outer.field(number).type for outer in level for number in range(outer.num_fields)]
    return bool(level)


def _to_batch(records: Sequence[Record | RowFault], fields: Sequence[pa.Field]) -> RowBatch:
    faults = {row: record for row, record in enumerate(records) if isinstance(record, RowFault)}
    columns = []
    for field in fields:
        values = [None if isinstance(record, RowFault) else record.get(field.name) for record in records]
        if pa.types.is_string(field.type):
            values = [_text(value) for value in values]
        columns.append(_array(values, field, faults))
    if not fields:
        return RowBatch(no_columns(len(records)), faults)
    return RowBatch(pa.record_batch(columns, schema=pa.schema(fields)), faults)


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _array(values: list[object], field: pa.Field, faults: dict[int, RowFault]) -> pa.Array:
    """The values as Arrow. One that does not fit (2^60 among fractions) becomes a null and a fault."""
    try:
        return pa.array(values, type=field.type)
    except _UNFIT:
        pass
    fitting = list(values)
    for row, value in enumerate(values):
        try:
            pa.scalar(value, type=field.type)
        except _UNFIT:
            fitting[row] = None
            faults[row] = RowFault(f"column `{field.name}` holds a value that is no {field.type}")
    return pa.array(fitting, type=field.type)
