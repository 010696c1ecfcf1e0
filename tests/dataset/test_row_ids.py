"""What the id of a row is: the same whatever type its column has, and something for every value."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from batchllm.dataset.row_ids import plain_ids


def test_whole_numbers_are_the_same_in_every_type() -> None:
    numbers = [0, 1, -20, 10**17, None]
    assert plain_ids(pa.array(numbers)) == numbers
    assert plain_ids(pa.array(numbers).cast(pa.string())) == numbers
    assert plain_ids(pa.array(numbers).cast(pa.string()).dictionary_encode()) == numbers
    assert plain_ids(pa.array([0, 1, -20, None], pa.float64())) == [0, 1, -20, None]
    assert all(isinstance(value, int) for value in plain_ids(pa.array([0.0, -0.0, 2.0**52])))


@pytest.mark.parametrize(
    "value",
    [
        *("", "-0", "00", "007", "+1", "1.0", " 1", "1\n", "-", "٣", "1e3", "9" * 19, "A7"),
        *(1.5, float(2**53), 1e300, float("inf"), b"1", True, Decimal("1"), [1], {"a": 1}),
    ],
)
def test_other_values_stay_as_they_are(value: Any) -> None:
    (found,) = plain_ids(pa.array([value]))
    assert repr(found) == repr(value)


MOMENT = datetime(2024, 2, 29, 12, 30, 15, 250_000)


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_times_are_the_same_in_every_unit(unit: str) -> None:
    values: list[tuple[Any, pa.DataType]] = [
        (MOMENT, pa.timestamp(unit)),
        (datetime(1905, 1, 1, 0, 0, 1), pa.timestamp(unit)),
        (MOMENT.time(), pa.time32(unit) if unit == "ms" else pa.time64(unit)),
        (timedelta(days=-3, milliseconds=4), pa.duration(unit)),
    ]
    for value, type_ in values:
        (found, nothing) = plain_ids(pa.array([value, None], type_))
        assert repr(found) == repr(value), "the keys of earlier runs are made from it"
        assert nothing is None
    assert plain_ids(pa.array([MOMENT], pa.timestamp(unit, "UTC"))) == ["1709209815250000000 ns UTC"]


def test_dates() -> None:
    for type_ in (pa.date32(), pa.date64()):
        assert plain_ids(pa.array([date(2024, 2, 29), date(1, 1, 1)], type_)) == [
            date(2024, 2, 29),
            date(1, 1, 1),
        ]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 2**63 - 1, -(2**63) + 1], pa.timestamp("ns")),
        pa.array([2**63 - 1, 2**63 - 2, 0], pa.timestamp("s")),
        pa.array([2**31 - 1, -(2**31), 0], pa.int32()).cast(pa.date32()),
        pa.array([2**62, 1, 2], pa.duration("s")),
        pa.array([time(1), time(2)], pa.time64("ns")),
        pa.array([1, 2, 1001], pa.time64("ns")),
        pa.array([2**31 - 1, 5], pa.time32("ms")),
    ],
)
def test_every_time_has_an_id(values: pa.Array) -> None:
    chunks = pa.chunked_array([values, values.slice(1)])
    found = plain_ids(chunks)
    assert found == [*plain_ids(values), *plain_ids(values.slice(1))]
    assert len({repr(value) for value in found}) == len(values)
