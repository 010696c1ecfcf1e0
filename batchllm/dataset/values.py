"""Column values as Python objects, and text that is not text: invalid UTF-8 in a string column.

Parquet files do hold such strings, because writers rarely check. A row that needs one for its prompt is faulty;
where it is only kept, the bad bytes are replaced.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from batchllm.dataset.rows import RowFault
from batchllm.errors import first_line


def is_text(type_: pa.DataType) -> bool:
    """Whether values are strings, or bytes that are read as UTF-8."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(type_) for test in tests) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def python_values(column: pa.Array, name: str, nullable: bool = False) -> list[object]:
    """The value of each row, or the RowFault it causes. Binary columns are text in UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # one value that Python does not have spoils the call: find out which
        values = [_value(scalar, name) for scalar in column]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        values = [_decoded(value, name) for value in values]
    if column.null_count and not nullable:
        fault = RowFault(f"column `{name}` is null")
        values = [fault if value is None else value for value in values]
    return values


def with_valid_text(column: pa.Array) -> pa.Array:
    """The same column with every invalid byte sequence replaced by U+FFFD, at any depth."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        return _repaired(column)


def _value(scalar: pa.Scalar, name: str) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _not_text(name)
    except Exception as error:  # times finer or further away than Python's, for example
        return RowFault(f"column `{name}` holds a value that cannot be read: {first_line(error)}")


def _decoded(value: object, name: str) -> object:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return _not_text(name)


def _not_text(name: str) -> RowFault:
    return RowFault(f"column `{name}` is not valid UTF-8 text")


def _repaired(column: pa.Array) -> pa.Array:
    """Slow, and only for batches that need it: through Python objects, with the strings read as bytes."""
    try:
        raw = column.cast(_as_binary(column.type)).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError):  # a rare type: what cannot be read becomes null
        values = [_value(scalar, "") for scalar in column]
        return pa.array([None if isinstance(value, RowFault) else value for value in values], column.type)
    return pa.array([_with_replacements(value, column.type) for value in raw], column.type)


def _as_binary(type_: pa.DataType) -> pa.DataType:
    """The type with every string in it as bytes."""
    if pa.types.is_string(type_):
        return pa.binary()
    if pa.types.is_large_string(type_):
        return pa.large_binary()
    if pa.types.is_list(type_):
        return pa.list_(_as_binary(type_.value_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_as_binary(type_.value_type))
    if pa.types.is_map(type_):
        return pa.map_(_as_binary(type_.key_type), _as_binary(type_.item_type))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_as_binary(field.type)) for field in type_])
    return type_


def _with_replacements(value: Any, type_: pa.DataType) -> Any:
    """A value read with `_as_binary(type_)`, as it is in `type_`."""
    if value is None:
        return None
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return value.decode(errors="replace")
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return [_with_replacements(item, type_.value_type) for item in value]
    if pa.types.is_map(type_):
        types = (type_.key_type, type_.item_type)
        return [tuple(map(_with_replacements, pair, types)) for pair in value]
    if pa.types.is_struct(type_):
        return {field.name: _with_replacements(value[field.name], field.type) for field in type_}
    return value
