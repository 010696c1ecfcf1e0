"""From parts in the order in which answers were finished to parts in input order, without a moment of doubt.

    1. every live part is read once and its rows go to the bucket (a file) that their place in the input names
    2. bucket by bucket, the final parts are written to _run/final/ and brought to the disk
    3. _run/COMMIT is written: from here on the result is the final parts, whatever happens
    4. live parts are removed, final parts renamed into OUT, COMMIT removed

A crash before 3 leaves the live parts as they were; a crash after 3 is completed by `recover` at the
next start. In step 4 a reader sees a part of the rows, never none (if there were any), never one twice.

Memory: one bucket and one piece of a live part. Files open at once: the buckets.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchllm.core import IntArray
from batchllm.dataset.columns import Columns, RowReader
from batchllm.dataset.folder import Folder
from batchllm.dataset.parts import TornPart, final_names, read_answers, write_rows
from batchllm.durable import make_folder, sync_file, sync_folder, write_json, writing

_MAX_BUCKETS = 64
_LUMP_ROWS = 16_384
_LUMP_BYTES = 64 << 20
_REQUEST = pa.field("request", pa.int64())


class DamagedPart(Exception):
    """A part that was written whole cannot be read any more."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def final_parts(total: int, part_rows: int) -> dict[str, IntArray]:
    """The parts of a whole result: name → its requests. At least one, so that no rows are a table as well."""
    starts = range(0, max(total, 1), part_rows)
    requests = [np.arange(start, min(start + part_rows, total), dtype=np.int64) for start in starts]
    return dict(zip(final_names(len(requests)), requests))


def prepare_commit(
    folder: Folder, columns: Columns, job: str, sources: Mapping[str, IntArray], part_rows: int
) -> None:
    """Steps 1 to 3. `sources` are the live parts, name → requests; every request is in exactly one.

    Raises DamagedPart, and then nothing is committed.
    """
    discard_unfinished(folder)
    total = len(columns.requests)
    bucket_rows = part_rows * max(1, -(-total // (part_rows * _MAX_BUCKETS)))
    buckets = _fill_buckets(folder, columns, sources, bucket_rows)
    final = final_parts(total, part_rows)
    parts_of_bucket = bucket_rows // part_rows
    for first in range(0, len(final), parts_of_bucket):
        parts = list(final.items())[first : first + parts_of_bucket]
        _write_bucket(folder, columns, job, buckets.get(first // parts_of_bucket), parts)
    with writing(folder.final):
        sync_folder(folder.final)
    write_json(folder.commit_marker, {"sources": sorted(sources), "final": list(final)})


def recover(folder: Folder) -> None:
    """Brings a folder that a crash left behind to a state from which a run can start. Needs the lock."""
    if folder.commit_marker.exists():
        complete_commit(folder)
    discard_unfinished(folder)


def discard_unfinished(folder: Folder) -> None:
    remove_workspace(folder)
    make_folder(folder.scratch)
    make_folder(folder.final)


def remove_workspace(folder: Folder) -> None:
    for path in (folder.scratch, folder.final):
        shutil.rmtree(path, ignore_errors=True)


def complete_commit(folder: Folder) -> None:
    """Step 4, also from its midst. The first final part takes the place of a live one, so that readers never
    find the folder empty; as long as it lies in _run/final, that live part is still the old one."""
    commit = json.loads(folder.commit_marker.read_text(encoding="utf-8"))
    sources: list[str] = commit["sources"]
    final: list[str] = commit["final"]
    with writing(folder.path):
        for name in sources[1:]:
            (folder.path / name).unlink(missing_ok=True)
        first = folder.final / final[0]
        if sources:
            seat = folder.path / sources[0]
            _replace_if_there(first, seat)
            first = seat
        _replace_if_there(first, folder.path / final[0])
        for name in final[1:]:
            _replace_if_there(folder.final / name, folder.path / name)
        sync_folder(folder.path)
        folder.commit_marker.unlink()
        sync_folder(folder.run)


def _fill_buckets(
    folder: Folder, columns: Columns, sources: Mapping[str, IntArray], bucket_rows: int
) -> dict[int, Path]:
    """Number of a bucket → its file. The rows of a bucket are in no order; `request` says which they are."""
    schema = pa.schema([*columns.answers, _REQUEST])
    paths: dict[int, Path] = {}
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    with writing(folder.scratch), contextlib.ExitStack() as open_files:
        for rows in _in_lumps(_pieces(folder, columns, sources)):
            bucket_of = rows.column(_REQUEST.name).to_numpy() // bucket_rows
            rows = rows.take(pa.array(np.argsort(bucket_of, kind="stable")))
            numbers, counts = np.unique(bucket_of, return_counts=True)
            for number, count, end in zip(numbers.tolist(), counts, np.cumsum(counts)):
                if number not in writers:
                    paths[number] = folder.scratch / f"bucket-{number}.arrow"
                    writers[number] = open_files.enter_context(pa.ipc.new_file(paths[number], schema))
                writers[number].write_table(rows.slice(end - count, count))
    return paths


def _pieces(folder: Folder, columns: Columns, sources: Mapping[str, IntArray]) -> Iterator[pa.Table]:
    """The answers of all live parts piece by piece, each row with its request."""
    for name, requests in sources.items():
        start = 0
        try:
            for answers in read_answers(folder.path / name, columns):
                piece = requests[start : start + answers.num_rows]
                start += len(piece)
                yield answers.append_column(_REQUEST, pa.array(piece))
        except TornPart as error:
            raise DamagedPart(name) from error
        if start != len(requests):
            raise DamagedPart(name)


def _in_lumps(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small pieces together, in one chunk each: many small parts are then as quick as few large ones."""
    lump: list[pa.Table] = []
    num_rows = num_bytes = 0
    for piece in pieces:
        lump.append(piece)
        num_rows += piece.num_rows
        num_bytes += piece.nbytes
        if num_rows >= _LUMP_ROWS or num_bytes >= _LUMP_BYTES:
            yield pa.concat_tables(lump).combine_chunks()
            lump = []
            num_rows = num_bytes = 0
    if lump:
        yield pa.concat_tables(lump).combine_chunks()


def _write_bucket(
    folder: Folder, columns: Columns, job: str, path: Path | None, parts: list[tuple[str, IntArray]]
) -> None:
    """The final parts of one bucket, which holds their rows and no others. Its file is then removed."""
    with contextlib.ExitStack() as stack:
        table = columns.answers.empty_table()
        place = np.zeros(0, dtype=np.int64)
        if path is not None:
            table = pa.ipc.open_file(stack.enter_context(pa.memory_map(str(path)))).read_all()
            place = np.argsort(table.column("request").to_numpy())
        answers = RowReader(table.select(columns.answers.names))
        done = 0
        for name, requests in parts:
            rows = place[done : done + len(requests)]
            done += len(requests)
            with writing(folder.final / name):
                write_rows(folder.final / name, columns, job, requests, answers, rows)
                sync_file(folder.final / name)
    if path is not None:
        path.unlink()


def _replace_if_there(path: Path, to: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, to)
