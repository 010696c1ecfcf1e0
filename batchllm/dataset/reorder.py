"""`prompt.reorder`: the part of a prompt whose items the user allows to stand in any order.

Either the elements of one list column (`reorder: passages`), or the values of several columns
(`reorder: [title, genre, plot]`), which the template renders by going through `fields`. The order of every row is
chosen before anything is rendered, from a first pass over the columns concerned. Nothing else is ever moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from batchllm.dataset.reader import InputData
from batchllm.dataset.rows import RowBatch, RowFault
from batchllm.dataset.templates import RowTemplate
from batchllm.dataset.values import python_values
from batchllm.errors import JobError
from batchllm.planner.field_order import FieldOrder, FreeItems, choose_order, intern_items
from batchllm.suggest import column_hint

FIELDS = "fields"  # what a template calls the (name, value) pairs of the columns named by prompt.reorder

Values = Mapping[str, object]


class Fields(list[tuple[str, object]]):
    """(name, value) pairs to loop over; printed as they are, one `name: value` a line."""

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self)


class FreePart:
    """What `prompt.reorder` frees, checked against the input's columns and the templates."""

    def __init__(self, reorder: str | tuple[str, ...], schema: pa.Schema, where: str) -> None:
        self.is_list = isinstance(reorder, str)
        self.columns = (reorder,) if isinstance(reorder, str) else reorder
        self.name = self.columns[0] if self.is_list else FIELDS
        self.lead: tuple[str, ...] = ()  # columns that come into the prompt before the free part
        self._where = where
        for column in self.columns:
            if column not in schema.names:
                hint = column_hint(column, schema.names)
                raise JobError(f"{where}: there is no column `{column}`; {hint}")
        if self.is_list:
            type_ = schema.field(self.name).type
            if not (is_list(type_) or pa.types.is_null(type_)):
                raise JobError(
                    f"{where}: `{self.name}` holds {type_}, and only the elements of a list can be reordered; "
                    "to reorder columns name at least two, as in [title, text]"
                )
        elif FIELDS in schema.names:
            raise JobError(
                f"{where}: the template's `{FIELDS}` would hide the input's column of that name; rename the column"
            )

    def names(self, columns: Sequence[str]) -> list[str]:
        """What a template may use."""
        return [*columns] if self.is_list else [*columns, FIELDS]

    def find_in(self, templates: Sequence[RowTemplate]) -> None:
        """Learns what stands before the free part. Raises JobError when no template renders it."""
        lead: set[str] = set()
        for template in templates:
            before, found = template.used_before(self.name)
            lead |= before
            if found:
                self.lead = tuple(sorted(lead - {self.name}))
                return
        if self.is_list:
            raise JobError(
                f"{self._where}: no template uses `{self.name}`; name the list that the prompt shows"
            )
        raise JobError(
            f"{self._where}: no template uses `{FIELDS}`; show these columns with "
            "{% for name, value in fields %}{{ name }}: {{ value }} {% endfor %}"
        )

    def arranged(self, values: Values, positions: Sequence[int] | None) -> dict[str, object]:
        """The values that a template sees, the free ones in this order (None: as given)."""
        if self.is_list:
            given: Any = values[self.name]
            if positions is None or not isinstance(given, list) or len(positions) != len(given):
                return dict(values)
            return {**values, self.name: [given[position] for position in positions]}
        order = range(len(self.columns)) if positions is None else positions
        names = [self.columns[position] for position in order]
        return {**values, FIELDS: Fields((name, values[name]) for name in names)}


def choose_orders(free: FreePart, data: InputData) -> FieldOrder:
    """The order of every row of the input. Rows with a fault in a free column stay as they are."""
    return choose_order(collect_items(free, data))


def collect_items(free: FreePart, data: InputData, most_rows: int | None = None) -> FreeItems:
    """One pass over the columns concerned, of the first rows or of all. Lengths are characters of text.

    16 bytes an item are kept.
    """
    seen = 0
    wanted = {*free.columns, *free.lead}
    columns = [name for name in data.schema.names if name in wanted]
    hashes, lengths = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    counts, leads = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for batch in data.batches(columns=columns):
        rows = list(_rows(free, batch))
        items = [item for row in rows for item in row]
        hashes.append(np.array([digest for digest, _ in items], np.uint64))
        lengths.append(np.array([length for _, length in items], np.int64))
        counts.append(np.array([len(row) for row in rows], np.int64))
        leads.append(np.array(_leads(free, batch), np.uint64))
        seen += batch.num_rows
        if most_rows is not None and seen >= most_rows:
            break
    ptr = np.append(0, np.cumsum(np.concatenate(counts)))
    lead = np.concatenate(leads)
    all_hashes, all_lengths = np.concatenate(hashes), np.concatenate(lengths)
    return intern_items(all_hashes, all_lengths, ptr, lead, columns=not free.is_list)


def _rows(free: FreePart, batch: RowBatch) -> Iterator[list[tuple[int, int]]]:
    """(hash, length) of each free item of each row. A row with a fault has nothing that could be shared."""
    nothing = [] if free.is_list else [_item("", seed, 0) for seed in range(len(free.columns))]
    columns = [python_values(batch.data.column(name), name) for name in free.columns]
    for number, row in enumerate(zip(*columns)):
        if number in batch.faults or any(isinstance(value, RowFault) for value in row):
            yield nothing
        elif free.is_list:
            yield [_item(value, 0, 1) for value in row[0]] if isinstance(row[0], list) else []
        else:
            yield [_item(value, seed, len(free.columns[seed]) + 1) for seed, value in enumerate(row)]


def _leads(free: FreePart, batch: RowBatch) -> list[int]:
    """A hash of what stands before the free part of each row."""
    if not free.lead:
        return [0] * batch.num_rows
    columns = [python_values(batch.data.column(name), name) for name in free.lead]
    return [xxhash.xxh3_64_intdigest(repr(row).encode(errors="replace")) for row in zip(*columns)]


def _item(value: object, seed: int, around: int) -> tuple[int, int]:
    """Hash, and length with `around` characters for the name or the separator. `seed` tells columns apart."""
    text = value if isinstance(value, str) else repr(value)
    return xxhash.xxh3_64_intdigest(text.encode(errors="replace"), seed), len(text) + around


def is_list(type_: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(type_) for test in tests)
