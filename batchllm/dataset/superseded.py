"""`_run/superseded`: answers that the job has no use for now. When it wants them again, they are taken back.

    superseded/NNNNN/            a generation: what one set of wanted requests had no use for. Larger numbers are newer
        generation               a digest of those requests
        part-live-NNNNN.parquet  whole parts, also the rows that were still wanted

A generation goes when the folder's parts and older generations hold all its answers, or when a newer one has at least
as many. So what a whole run has computed outlasts any number of trials with fewer rows, and of whole runs that replaced
each other the last but one stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from batchllm.core import RequestTable
from batchllm.dataset.folder import Folder
from batchllm.dataset.keys import match_keys, rank_among_equals
from batchllm.dataset.parts import ForeignFile, PartHeader, TornPart, parquet_files, read_header
from batchllm.durable import make_folder, sync_folder, write_bytes, writing


class Superseded:
    """What of it one run sees and adds. Needs the lock of the folder."""

    def __init__(self, folder: Folder, requests: RequestTable) -> None:
        self._path, self._requests = folder.superseded, requests
        self._label = xxh3_64_hexdigest(requests.key.tobytes()).encode()
        self._own: Path | None = None  # the generation that this run adds to

    def move(self, path: Path, name: str) -> None:
        target = self._opened() / name
        with writing(target):
            # It may be a link to this very file, and then a rename would leave both names.
            target.unlink(missing_ok=True)
            os.replace(path, target)

    def copy(self, path: Path) -> None:
        """The whole part, also the rows still wanted. The file is never written to again: a link will do."""
        copy = self._opened() / path.name
        with writing(copy):
            copy.unlink(missing_ok=True)  # of a run that was killed here
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
            sync_folder(copy.parent)

    def headers(self) -> list[PartHeader]:
        """Of all parts that can be read, those of the newest generation first."""
        return [header for generation in reversed(self._generations()) for header in _headers(generation)]

    def drop_outlived(self, done: NDArray[np.bool_]) -> None:
        """Removes generations that need not be kept. `done`: which requests the folder's parts answer, for good."""
        generations = self._generations()
        parts = [_headers(generation) for generation in generations]
        most = -1
        for generation, headers, count in reversed(list(zip(generations, parts, self._count(parts, done)))):
            is_readable = len(headers) == len(parquet_files(generation))  # a person may look at what is not
            if count <= most or (not count and is_readable):
                shutil.rmtree(generation, ignore_errors=True)
            else:
                most = max(most, count)

    def _count(self, parts: Sequence[Sequence[PartHeader]], done: NDArray[np.bool_]) -> list[int]:
        """The answers in each generation, oldest first, that are neither in the folder's parts nor in an older one."""
        generation_of = [number for number, headers in enumerate(parts) for _ in headers]
        headers = [header for headers in parts for header in headers]
        if not headers:
            return [0] * len(parts)
        good = ~np.concatenate([header.is_error for header in headers])
        keys = np.concatenate([header.keys for header in headers])[good]
        generation = np.repeat(generation_of, [len(header.keys) for header in headers])[good]
        request = match_keys(self._requests.key, keys)
        is_live = np.append(done, False)[request]  # -1: no request
        counted = ~is_live & (rank_among_equals(keys) == 0)
        counts: list[int] = np.bincount(generation[counted], minlength=len(parts)).tolist()
        return counts

    def _generations(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self._path.glob("*") if path.name.isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name))

    def _opened(self) -> Path:
        """The run's own generation. After a crash in the midst of setting aside it is the one begun then."""
        if self._own is None:
            newest = next(reversed(self._generations()), None)
            if newest is None or not _is_labelled(newest, self._label):
                number = 0 if newest is None else int(newest.name) + 1
                newest = self._path / f"{number:05d}"
                make_folder(newest)
                write_bytes(newest / "generation", self._label)
            self._own = newest
        return self._own


def _headers(generation: Path) -> list[PartHeader]:
    headers = []
    for path in parquet_files(generation):
        try:
            headers.append(read_header(path))
        except (TornPart, ForeignFile, PermissionError):
            continue
    return headers


def _is_labelled(generation: Path, label: bytes) -> bool:
    file = generation / "generation"
    return file.exists() and file.read_bytes() == label
