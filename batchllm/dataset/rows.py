"""Rows on their way in: a record batch, and what is wrong with single rows of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

Item = TypeVar("Item")

BATCH_BYTES = 64 << 20  # far below the 2 GiB of text that an Arrow array can hold


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why a row cannot be answered: one sentence without a full stop, for `error` in the results."""

    reason: str


EMPTY_PROMPT = RowFault("the prompt is empty")


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of the input. A row in `faults` is there, with nulls: rows keep their numbers."""

    data: pa.RecordBatch
    faults: Mapping[int, RowFault] = field(default_factory=dict)  # row of this batch → fault

    @property
    def num_rows(self) -> int:
        return int(self.data.num_rows)

    def rows(self, start: int, stop: int) -> RowBatch:
        """Some rows of this batch, sharing its memory."""
        faults = {row - start: fault for row, fault in self.faults.items() if start <= row < stop}
        return RowBatch(self.data.slice(start, stop - start), faults)


def no_columns(rows: int) -> pa.RecordBatch:
    """A batch that has rows and no columns."""
    return pa.record_batch([pa.nulls(rows)], names=["none"]).select([])


def cut(rows: Iterable[tuple[Item, int]], most_rows: int) -> Iterator[list[Item]]:
    """Consecutive rows together, in order. They come with their bytes, of which BATCH_BYTES end a batch as well."""
    batch: list[Item] = []
    size = 0
    for row, row_bytes in rows:
        batch.append(row)
        size += row_bytes
        if len(batch) == most_rows or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
