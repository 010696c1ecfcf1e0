"""The token store: all prompts of a job in one flat file of int32, and where each begins. Read memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np

from batchllm.core import IntArray, TokenArray
from batchllm.durable import writing

_OFFSETS = ".offsets.npy"


class TokenStoreWriter:
    """Appends prompts in row order. The store can be opened once the writer is closed. Raises WriteFailed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("wb")
        self._lengths: list[np.ndarray] = []

    def append(self, prompts: Sequence[Sequence[int]]) -> None:
        """Add one prompt after the other; an empty one stands for a row without a prompt."""
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        self._lengths.append(lengths)
        tokens = np.fromiter(chain.from_iterable(prompts), np.int32, int(lengths.sum()))
        with writing(self._path):
            self._file.write(tokens.data)

    def close(self) -> None:
        """Write the offsets. Closing twice is allowed."""
        if self._file.closed:
            return
        with writing(self._path):
            self._file.close()
            offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]))
            np.save(_offsets_path(self._path), offsets)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DamagedStore(ValueError):
    """What is on disk is not what a writer has closed. The message names the file."""


def open_tokens(path: Path) -> tuple[TokenArray, IntArray]:
    """(tokens [total], offsets [rows + 1]) of a closed store; the tokens are memory-mapped, read-only.

    Raises DamagedStore where the two files cannot belong together. Tokens are not looked at: the planner refuses
    negative ones, and `limits` those that the model does not know.
    """
    offsets = _read_offsets(_offsets_path(path))
    try:
        stored = path.stat().st_size
    except OSError as error:
        raise DamagedStore(f"{path}: the token store cannot be read: {error.strerror}") from None
    wanted = int(offsets[-1]) * np.dtype(np.int32).itemsize
    if stored != wanted:
        raise DamagedStore(
            f"{path}: the token store is damaged: it has {stored:,} bytes instead of {wanted:,}"
        )
    if not wanted:  # an empty file cannot be mapped
        return np.empty(0, np.int32), offsets
    return np.memmap(path, np.int32, mode="r"), offsets


def _read_offsets(path: Path) -> IntArray:
    try:
        offsets = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedStore(
            f"{path}: the token store is damaged: its offsets cannot be read: {error}"
        ) from None
    whole = (
        isinstance(offsets, np.ndarray) and offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets)
    )
    if not whole or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise DamagedStore(f"{path}: the token store is damaged: its offsets do not ascend from 0")
    found: IntArray = offsets
    return found


def _offsets_path(path: Path) -> Path:
    return path.with_name(path.name + _OFFSETS)
