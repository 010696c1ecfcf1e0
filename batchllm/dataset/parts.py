"""A part: one Parquet file of answers that says itself whose answers it holds.

Its footer carries, beside the columns, in key-value entries that other readers ignore:

    batchllm.part     JSON: format, job (digest of its identity), layout (digest of schema and kept values)
    batchllm.keys     base64 of the 128-bit request keys of its rows, big-endian, in the order of the rows
    batchllm.errors   base64 of the positions (int32, little-endian) of the rows that hold an error

So the manifest can be lost without losing an answer, and rows are found again by what they are.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_hexdigest

from batchllm.core import IntArray
from batchllm.dataset.columns import Columns, RowReader
from batchllm.dataset.keys import KeyArray
from batchllm.durable import replace_durably, writing

PART_FORMAT = 1
SLICE_ROWS = 1024  # put together at a time
_GROUP_ROWS = 65_536
_GROUP_BYTES = 64 << 20
_FINAL_NAME = re.compile(r"part-(\d{5,})\.parquet")
_LIVE_NAME = re.compile(r"part-live-(\d{5,})\.parquet")


class TornPart(Exception):
    """A file with the name of a part that cannot be read."""


class ForeignFile(Exception):
    """A Parquet file that BatchLLM did not write."""


@dataclass(frozen=True)
class PartHeader:
    """What a part says about itself."""

    path: Path
    job: str
    layout: str
    keys: KeyArray  # [rows, 2]
    is_error: NDArray[np.bool_]  # [rows]


def live_name(number: int) -> str:
    return f"part-live-{number:05d}.parquet"


def final_names(count: int) -> list[str]:
    """Of so many final parts. By name they stand in the order of their rows."""
    digits = max(5, len(str(count - 1)))
    return [f"part-{number:0{digits}d}.parquet" for number in range(count)]


def live_number(name: str) -> int | None:
    found = _LIVE_NAME.fullmatch(name)
    return int(found[1]) if found else None


def final_number(name: str) -> int | None:
    found = _FINAL_NAME.fullmatch(name)
    return int(found[1]) if found else None


def has_part_name(path: Path) -> bool:
    return live_number(path.name) is not None or final_number(path.name) is not None


def parquet_files(folder: Path) -> list[Path]:
    """Every file that `OUT/*.parquet` reads, by name."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def job_digest(identity: str) -> str:
    return xxh3_64_hexdigest(identity.encode(errors="replace"))


def read_mark(path: Path) -> dict[str, Any]:
    """The first footer entry. Raises TornPart or ForeignFile."""
    return _mark(path, _footer(path))


def read_header(path: Path) -> PartHeader:
    """Raises TornPart or ForeignFile. Reads the footer only."""
    footer = _footer(path)
    mark = _mark(path, footer)
    try:
        keys = np.frombuffer(base64.b64decode(footer[b"batchllm.keys"]), dtype=">u8")
        errors = np.frombuffer(base64.b64decode(footer[b"batchllm.errors"]), dtype="<i4")
        is_error = np.zeros(len(keys) // 2, dtype=bool)
        is_error[errors] = True
        return PartHeader(
            path, str(mark["job"]), str(mark["layout"]), keys.astype(np.uint64).reshape(-1, 2), is_error
        )
    except (KeyError, ValueError, IndexError) as error:
        raise TornPart(f"{path}: {error}") from error


def read_answers(path: Path, columns: Columns) -> Iterator[pa.Table]:
    """The answer columns of a part, piece by piece. Raises TornPart when a page is damaged."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in columns.answers.names if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=4 * SLICE_ROWS, columns=names):
                yield columns.stored_answers(pa.Table.from_batches([batch]))
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TornPart(f"{path}: {error}") from error


def layout_digest(columns: Columns, requests: IntArray) -> str:
    """What `write_part` writes into the footer of a part with these requests in this order."""
    digest = xxh3_64(columns.schema.serialize())
    for start in range(0, len(requests), SLICE_ROWS):
        _digest_values(digest, columns.kept_values(requests[start : start + SLICE_ROWS]))
    return digest.hexdigest()


def write_part(
    path: Path,
    scratch: Path,
    columns: Columns,
    job: str,
    requests: IntArray,
    answers: RowReader,
    rows: IntArray,
) -> None:
    """`write_rows`, atomically. `scratch` is a folder on the same file system for the unfinished file."""
    temporary = scratch / f"{path.name}.tmp"
    try:
        with writing(path):
            write_rows(temporary, columns, job, requests, answers, rows)
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(
    path: Path, columns: Columns, job: str, requests: IntArray, answers: RowReader, rows: IntArray
) -> None:
    """A part where nobody looks yet: answer `rows[i]` of `answers` belongs to `requests[i]`.

    Memory: one row group. The file is not brought to the disk.
    """
    digest = xxh3_64(columns.schema.serialize())
    is_error = np.zeros(len(requests), dtype=bool)
    group: list[pa.Table] = []
    with pq.ParquetWriter(path, columns.schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(requests), SLICE_ROWS):
            end = start + SLICE_ROWS
            kept = columns.kept_values(requests[start:end])
            _digest_values(digest, kept)
            taken = answers.take(rows[start:end])
            is_error[start:end] = np.array(taken.column("finish_reason").to_pylist()) == "error"
            group.append(columns.joined(kept, taken))
            if sum(t.num_rows for t in group) >= _GROUP_ROWS or sum(t.nbytes for t in group) >= _GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group = []
        if group:
            writer.write_table(pa.concat_tables(group))
        mark = {"format": PART_FORMAT, "job": job, "layout": digest.hexdigest()}
        writer.add_key_value_metadata(
            {
                "batchllm.part": json.dumps(mark),
                "batchllm.keys": _base64(columns.requests.key[requests].astype(">u8")),
                "batchllm.errors": _base64(np.flatnonzero(is_error).astype("<i4")),
            }
        )


def _digest_values(digest: xxh3_64, values: pa.Table) -> None:
    for batch in values.to_batches():
        digest.update(batch.serialize())


def _footer(path: Path) -> dict[bytes, bytes]:
    try:
        return dict(pq.read_metadata(path).metadata or {})
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, PermissionError):
            raise
        raise TornPart(f"{path}: {error}") from error


def _mark(path: Path, footer: dict[bytes, bytes]) -> dict[str, Any]:
    if b"batchllm.part" not in footer:
        raise ForeignFile(str(path))
    try:
        mark = json.loads(footer[b"batchllm.part"])
    except ValueError as error:
        raise TornPart(f"{path}: {error}") from error
    if not isinstance(mark, dict) or not {"format", "job", "layout"} <= mark.keys():
        raise TornPart(f"{path}: {os.fspath(path.name)} has a damaged footer")
    return mark


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
