"""What can be wrong with the folder of a chunk store as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from batchllm.durable import WriteFailed, cannot_be_written
from batchllm.errors import OutputError


class StoreError(OutputError):
    """The folder is not a chunk store, or another process is writing it."""


class StoreWriteFailed(StoreError, WriteFailed):
    """The disk is full or refuses to be written. What is in the store stays as it is."""


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises StoreWriteFailed, which names `path`, for an OSError inside."""
    try:
        yield
    except OSError as error:
        kept = "chunks already in the store stay"
        raise StoreWriteFailed(cannot_be_written(path, error, kept)) from error
