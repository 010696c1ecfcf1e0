"""The ids of rows as what they mean, whatever type their column has.

One added row changes the type of an id column: whole numbers become text beside `A7` and fractions beside `1.5`; a
file with finer times makes all times finer. Answers of earlier runs are to be found all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta

import pyarrow as pa

_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as in a CSV file's column of whole numbers
_EXACT_BELOW = float(2**53)
_EPOCH = datetime(1970, 1, 1)
_NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}


def plain_ids(ids: pa.Array | pa.ChunkedArray) -> list[object]:
    """One Python value a row. A whole number is an int, also where the column holds text or fractions."""
    time_of = _reader_of_times(ids.type)
    if time_of is not None:
        numbers = ids.cast(pa.int32() if ids.type.bit_width == 32 else pa.int64()).to_pylist()
        return [None if number is None else time_of(number) for number in numbers]
    values: list[object] = ids.to_pylist()
    return values if pa.types.is_integer(ids.type) else [_plain(value) for value in values]


def _plain(value: object) -> object:
    if isinstance(value, str):
        return int(value) if _WHOLE_NUMBER.fullmatch(value) else value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_BELOW:
        return int(value)
    return value


def _reader_of_times(type_: pa.DataType) -> Callable[[int], object] | None:
    """From the number that a time is stored as to its id; None for types that are no times.

    That is Python's value, where there is one and it is the same everywhere: Python has none for nanoseconds and for
    far years, and what it has for a time zone depends on which libraries are installed.
    """
    value: Callable[[timedelta], object]
    if pa.types.is_date(type_):
        tick = 86_400 * _NANOSECONDS["s"] if pa.types.is_date32(type_) else _NANOSECONDS["ms"]
        value = lambda since: (_EPOCH + since).date()  # noqa: E731
    elif pa.types.is_timestamp(type_):
        tick, value = _NANOSECONDS[type_.unit], lambda since: _EPOCH + since
    elif pa.types.is_time(type_):
        tick, value = _NANOSECONDS[type_.unit], lambda since: (_EPOCH + since).time()
    elif pa.types.is_duration(type_):
        tick, value = _NANOSECONDS[type_.unit], lambda since: since
    else:
        return None
    zone = type_.tz if pa.types.is_timestamp(type_) else None
    if zone is not None:
        return lambda number: f"{number * tick} ns {zone}"
    return lambda number: _time(number * tick, value)


def _time(nanoseconds: int, value: Callable[[timedelta], object]) -> object:
    microseconds, finer = divmod(nanoseconds, _NANOSECONDS["us"])
    if not finer:
        try:
            return value(timedelta(microseconds=microseconds))
        except OverflowError:
            pass
    return f"{nanoseconds} ns"
