from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batchllm.dataset.rows import RowFault
from batchllm.dataset.values import python_values, with_valid_text

NOT_TEXT = RowFault("column `x` is not valid UTF-8 text")


def strings(*values: bytes | None) -> pa.Array:
    """A string column of whatever bytes, as a careless writer makes it."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_python_values_of_odd_columns() -> None:
    null = RowFault("column `x` is null")
    assert python_values(strings(b"ok", b"\xff", None), "x") == ["ok", NOT_TEXT, null]
    assert python_values(strings(b"ok", None), "x", nullable=True) == ["ok", None]
    assert python_values(pa.array([b"ok", b"\xff", None]), "x") == ["ok", NOT_TEXT, null]
    nested = pa.ListArray.from_arrays([0, 1, 2], strings(b"ok", b"\xff"))
    assert python_values(nested, "x") == [["ok"], NOT_TEXT]
    assert python_values(pa.array([1, None]), "x") == [1, null]


def test_values_that_python_does_not_have() -> None:
    far = python_values(pa.array([0, 10**9], pa.int32()).cast(pa.date32()), "x")
    assert far[0] == datetime.date(1970, 1, 1)
    assert isinstance(far[1], RowFault)
    assert far[1].reason.startswith("column `x` holds a value that cannot be read: ")


def bad_columns() -> list[tuple[pa.Array, list[Any]]]:
    bad = strings(b"ok", b"a\xff\xfeb", None)
    fixed = ["ok", "a��b", None]
    raw = pa.array([b"\xff", None, b"x"])
    entries = pa.array(["k1", "k2", "k3"])
    large = pa.array([b"ok", b"a\xff\xfeb", None], pa.large_binary()).view(pa.large_string())
    return [
        (bad, fixed),
        (bad.slice(1, 2), fixed[1:]),
        (large, fixed),
        (pa.ListArray.from_arrays([0, 2, 3], bad), [fixed[:2], fixed[2:]]),
        (pa.LargeListArray.from_arrays([0, 2, 3], bad), [fixed[:2], fixed[2:]]),
        (
            pa.StructArray.from_arrays([bad, raw], names=["s", "b"]),
            [{"s": fixed[0], "b": b"\xff"}, {"s": fixed[1], "b": None}, {"s": None, "b": b"x"}],
        ),
        (
            pa.MapArray.from_arrays([0, 2, 3], entries, bad),
            [[("k1", "ok"), ("k2", fixed[1])], [("k3", None)]],
        ),
        (pa.FixedSizeListArray.from_arrays(strings(b"a", b"\xff"), 1), [["a"], None]),
    ]


@pytest.mark.parametrize("number", range(8))
def test_bad_bytes_are_replaced_at_any_depth(number: int) -> None:
    column, values = bad_columns()[number]
    repaired = with_valid_text(column)
    repaired.validate(full=True)
    assert repaired.type == column.type
    assert repaired.to_pylist() == values


def test_good_columns_are_not_copied() -> None:
    for column in (pa.array(["a", None]), pa.array([b"\xff"]), pa.array([[1]]), pa.array(np.arange(3))):
        assert with_valid_text(column) is column
