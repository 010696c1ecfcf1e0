"""What a store holds, as one file that is read in a moment: an entry of fixed size for every chunk file.

Entries are only ever appended: one when a chunk was put, one when it was removed. Each has a checksum. An entry that
was cut off by a crash is the last one; it is ignored, and overwritten by the next. The chunk files are what counts: a
lost or damaged index is made anew from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.chunkcache.chunk_file import ChunkHeader
from batchllm.chunkcache.identity import DIGEST_BYTES

ENTRY = np.dtype(
    [
        ("key", "V16"),
        ("variant", "V16"),
        ("model", "V16"),
        ("context", "V16"),  # digest of all tokens before the chunk
        ("disk_bytes", "<u8"),  # what the file takes of the store's limit
        ("num_tokens", "<u4"),
        ("context_tokens", "<u4"),
        ("context_chunks", "<u4"),
        ("outside_mean", "<f4"),
        ("inside_mean", "<f4"),
        ("removed", "<u4"),  # 0 or 1
        ("codec", "S8"),
        ("checksum", "<u8"),
    ]
)
FIELDS = [name for name in ENTRY.names or () if name != "checksum"]
Entries = NDArray[np.void]

_MAGIC = b"BLLMCHUNKINDEX01"
_START_BYTES = len(_MAGIC) + 8  # and a random number: an index that was replaced has another one
_WORDS = ENTRY.itemsize // 8
_ODD = [(number * 0x9E3779B97F4A7C15) % 2**64 | 1 for number in range(1, _WORDS)]
_MULTIPLIERS = np.array(_ODD, dtype=np.uint64)


class DamagedIndex(Exception):
    """The index cannot be believed; it has to be made anew from the chunk files."""


@dataclass(frozen=True)
class IndexState:
    """How far an index file has been read."""

    generation: bytes
    end: int  # bytes of start and whole entries


def make_entry(header: ChunkHeader, disk_bytes: int) -> Entries:
    """An array of one entry: this chunk is there."""
    statistics, context = header.statistics, header.context
    return make_entries(
        [
            (
                header.key,
                header.variant,
                header.model,
                context.digest,
                disk_bytes,
                len(header.tokens),
                context.num_tokens,
                len(context.chunks),
                statistics.outside_mean,
                statistics.inside_mean,
                0,
                header.codec.encode(),
            )
        ]
    )


def make_removal(key: bytes, variant: bytes) -> Entries:
    """An array of one entry: this variant is there no more."""
    return make_entries([(key, variant, b"", b"", 0, 0, 0, 0, 0.0, 0.0, 1, b"")])


def make_entries(rows: Sequence[tuple[Any, ...]]) -> Entries:
    """Entries with these values of all fields but the checksum."""
    entries = np.zeros(len(rows), ENTRY)
    for name, values in zip(FIELDS, zip(*rows)):
        if ENTRY[name].kind == "V":
            raw = b"".join(value.ljust(DIGEST_BYTES, b"\0") for value in values)
            entries[name] = np.frombuffer(raw, f"V{DIGEST_BYTES}")
        else:
            entries[name] = values
    entries["checksum"] = _checksums(entries)
    return entries


def join_entries(parts: Sequence[Entries]) -> Entries:
    return np.concatenate(parts) if parts else np.zeros(0, ENTRY)


def index_bytes(num_entries: int) -> int:
    """Length of an index with so many entries."""
    return _START_BYTES + num_entries * ENTRY.itemsize


def read_index(path: Path, known: IndexState | None = None) -> tuple[Entries, IndexState, bool]:
    """(entries, state, anew): all entries when `anew`, else those appended since `known`.

    Raises FileNotFoundError, and DamagedIndex when anything but the very end is damaged.
    """
    with path.open("rb") as stream:
        start = stream.read(_START_BYTES)
        if len(start) < _START_BYTES or not start.startswith(_MAGIC):
            raise DamagedIndex(f"{path}: is not the index of a chunk store")
        generation = start[len(_MAGIC) :]
        anew = known is None or known.generation != generation
        begin = _START_BYTES if known is None or anew else known.end
        stream.seek(begin)
        raw = stream.read()
    entries = np.frombuffer(raw, ENTRY, len(raw) // ENTRY.itemsize)
    good = _checksums(entries) == entries["checksum"]
    whole = len(entries) if good.all() else int(np.argmin(good))
    if good[whole:].any():
        raise DamagedIndex(f"{path}: entry {whole:,} is damaged")
    return entries[:whole], IndexState(generation, begin + whole * ENTRY.itemsize), anew


def write_index(path: Path, entries: Entries, durable: bool) -> IndexState:
    """Replaces the index as a whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    generation = os.urandom(_START_BYTES - len(_MAGIC))
    with temporary.open("wb") as stream:
        stream.write(_MAGIC + generation)
        stream.write(entries.tobytes())
        if durable:
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, path)
    return IndexState(generation, _START_BYTES + entries.nbytes)


def append_entries(path: Path, entries: Entries, state: IndexState, durable: bool) -> IndexState:
    """Adds entries after the last whole one. Only the process that holds the store's lock may. Raises OSError."""
    with path.open("r+b") as stream:
        stream.seek(state.end)
        stream.write(entries.tobytes())
        stream.truncate()
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    return IndexState(state.generation, state.end + entries.nbytes)


def _checksums(entries: Entries) -> NDArray[np.uint64]:
    """A sum of products with odd numbers: whatever bits of one word change, it changes."""
    words = np.frombuffer(entries.tobytes(), "<u8").reshape(len(entries), _WORDS)[:, :-1]
    mixed = (words ^ (words >> np.uint64(29))) * _MULTIPLIERS
    total: NDArray[np.uint64] = mixed.sum(axis=1, dtype=np.uint64) + np.uint64(_WORDS)
    return total ^ (total >> np.uint64(32))
