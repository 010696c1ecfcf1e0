"""Taking over what earlier runs left in the output folder.

Afterwards every part in the folder holds only answers that this job wants, each once, with the kept columns
as they are in the present input; `Inherited.done` says which requests they answer. Answers are matched by key,
also with those set aside earlier. Every step leaves the folder readable and can be repeated after a crash.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.core import IntArray, RequestTable
from batchllm.dataset.columns import Columns, RowReader
from batchllm.dataset.folder import Folder
from batchllm.dataset.keys import match_keys, rank_among_equals
from batchllm.dataset.parts import (
    PartHeader,
    TornPart,
    final_names,
    layout_digest,
    live_name,
    live_number,
    parquet_files,
    read_answers,
    read_header,
    write_part,
)
from batchllm.dataset.superseded import Superseded
from batchllm.durable import sync_folder, writing


@dataclass
class Inherited:
    """What was found and kept."""

    done: NDArray[np.bool_]  # [requests]
    parts: dict[str, IntArray] = field(default_factory=dict)  # name of a part → request of each row
    superseded: int = 0  # answers set aside
    taken_back: int = 0  # answers set aside earlier, wanted again
    retried: int = 0  # rows that failed while they were computed, dropped
    torn: int = 0  # parts that could not be read, set aside
    complete: bool = False  # the folder already is the whole result in input order


@dataclass(frozen=True)
class _Found:
    """A readable part, and what is to become of its rows."""

    header: PartHeader
    requests: IntArray  # [rows] -1: not wanted
    keep: NDArray[np.bool_]  # [rows]
    retry: NDArray[np.bool_]  # [rows]


def take_over(
    folder: Folder, columns: Columns, job: str, fault_rows: Collection[int], part_rows: int
) -> Inherited:
    """Needs the lock, and a folder whose last commit has been completed."""
    inherited = Inherited(np.zeros(len(columns.requests), dtype=bool))
    headers, torn = _read_headers(folder)
    found = _judge(headers, columns, fault_rows)
    if not torn and _is_complete(found, columns, part_rows):
        inherited.complete = True
        for part in found:
            _keep(inherited, part.header.path.name, part.requests)
        return inherited
    aside = Superseded(folder, columns.requests)
    numbers = _free_numbers(folder)
    for path in torn:
        aside.move(path, live_name(next(numbers)))
        inherited.torn += 1
    for part in found:
        path = part.header.path
        if live_number(path.name) is None:  # only a commit makes final parts, and it needs their names
            path = _rename(path, folder.path / live_name(next(numbers)))
        _settle(inherited, part, path, columns, job, folder, aside)
    _take_back(inherited, columns, job, folder, aside, numbers)
    with writing(folder.path):
        sync_folder(folder.path)
    aside.drop_outlived(inherited.done)
    return inherited


def answered_before(folder: Folder, requests: RequestTable) -> NDArray[np.bool_]:
    """[requests] those that some part holds an answer to, also one set aside. Reads footers and changes nothing."""
    headers = [*_read_headers(folder)[0], *Superseded(folder, requests).headers()]
    found = np.zeros(len(requests) + 1, dtype=bool)  # the last: no request
    if headers:
        keys = np.concatenate([header.keys[~header.is_error] for header in headers])
        found[match_keys(requests.key, keys)] = True
    return found[:-1]


def _read_headers(folder: Folder) -> tuple[list[PartHeader], list[Path]]:
    headers, torn = [], []
    for path in parquet_files(folder.path):
        try:
            headers.append(read_header(path))
        except TornPart:
            torn.append(path)
    return headers, torn


def _judge(headers: list[PartHeader], columns: Columns, fault_rows: Collection[int]) -> list[_Found]:
    if not headers:
        return []
    keys = np.concatenate([header.keys for header in headers])
    request = match_keys(columns.requests.key, keys)
    is_error = np.concatenate([header.is_error for header in headers])
    faults = np.fromiter(fault_rows, dtype=np.int64, count=len(fault_rows))
    from_input = np.isin(columns.requests.row[request], faults) if len(columns.requests) else is_error
    retry = (request >= 0) & is_error & ~from_input
    # A second copy of an answer can only be a file that a person copied; an error to be retried is no answer.
    first = np.zeros(len(keys), dtype=bool)
    candidates = np.flatnonzero((request >= 0) & ~retry)
    first[candidates[rank_among_equals(keys[candidates]) == 0]] = True
    request = np.where(first | retry, request, -1)
    cuts = np.cumsum([len(header.keys) for header in headers])[:-1]
    parts = zip(headers, np.split(request, cuts), np.split(first, cuts), np.split(retry, cuts))
    return [_Found(*part) for part in parts]


def _is_complete(found: list[_Found], columns: Columns, part_rows: int) -> bool:
    """The parts are the final ones of exactly these requests, cut as they would be cut now."""
    total = len(columns.requests)
    sizes = [min(part_rows, total - start) for start in range(0, total, part_rows)] or [0]
    if [part.header.path.name for part in found] != final_names(len(sizes)):
        return False
    if [len(part.requests) for part in found] != sizes:
        return False
    return all(
        part.keep.all()
        and (part.requests == i * part_rows + np.arange(len(part.requests))).all()
        and part.header.layout == layout_digest(columns, part.requests)
        for i, part in enumerate(found)
    )


def _settle(
    inherited: Inherited,
    part: _Found,
    path: Path,
    columns: Columns,
    job: str,
    folder: Folder,
    aside: Superseded,
) -> None:
    """Leaves at `path` the wanted rows of the part, in the present layout, or nothing."""
    rows = np.flatnonzero(part.keep)
    requests = part.requests[rows]
    unwanted = int((~part.keep & ~part.retry).sum())
    inherited.superseded += unwanted
    inherited.retried += int(part.retry.sum())
    if len(rows) == len(part.keep) and part.header.layout == layout_digest(columns, requests) and len(rows):
        _keep(inherited, path.name, requests)
        return
    if unwanted:
        aside.copy(path)
    if not len(rows):
        with writing(path):
            path.unlink()
        return
    try:
        answers = RowReader(pa.concat_tables(read_answers(path, columns)))
    except TornPart:
        aside.move(path, path.name)
        inherited.torn += 1
        return
    write_part(path, folder.scratch, columns, job, requests, answers, rows)
    _keep(inherited, path.name, requests)


def _keep(inherited: Inherited, name: str, requests: IntArray) -> None:
    inherited.parts[name] = requests
    inherited.done[requests] = True


def _take_back(
    inherited: Inherited,
    columns: Columns,
    job: str,
    folder: Folder,
    aside: Superseded,
    numbers: Iterator[int],
) -> None:
    """Of the answers set aside, those that are wanted and missing become parts again. They also stay where they are."""
    headers = [] if inherited.done.all() else aside.headers()
    if not headers:
        return
    found = match_keys(columns.requests.key, np.concatenate([header.keys for header in headers]))
    cuts = np.cumsum([len(header.keys) for header in headers])[:-1]
    for header, request in zip(headers, np.split(found, cuts)):
        missing = (request >= 0) & ~header.is_error & ~inherited.done[request]
        requests, first = np.unique(request[missing], return_index=True)
        if not len(requests):
            continue
        try:
            answers = RowReader(pa.concat_tables(read_answers(header.path, columns)))
        except TornPart:
            continue
        path = folder.path / live_name(next(numbers))
        write_part(path, folder.scratch, columns, job, requests, answers, np.flatnonzero(missing)[first])
        _keep(inherited, path.name, requests)
        inherited.taken_back += len(requests)


def _rename(path: Path, to: Path) -> Path:
    with writing(to):
        os.replace(path, to)
    return to


def next_live_number(folder: Folder) -> int:
    """Larger than any number in use, also among the parts set aside: no name is ever taken twice."""
    names = [path.name for path in (*parquet_files(folder.path), *folder.superseded.glob("*/*.parquet"))]
    return 1 + max((n for n in map(live_number, names) if n is not None), default=-1)


def _free_numbers(folder: Folder) -> Iterator[int]:
    return itertools.count(next_live_number(folder))
