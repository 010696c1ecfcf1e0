"""One process at a time: a lock on a file that is gone with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO

from batchllm.durable import writing
from batchllm.errors import OutputError

try:
    import fcntl
except ImportError:  # no such locks here: two processes are then not told apart
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """Held from its making until `release`. The file stays; it holds the number of the last process that had it.

    Raises OutputError while another process has it; `refusal` says so, with `{}` where that process's number goes.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self._refusal = refusal
        with writing(path):
            self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held, not used)
        try:
            self._acquire(path)
        except BaseException:
            self._file.close()
            raise
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number in it
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()

    def release(self) -> None:
        self._file.close()

    def _acquire(self, path: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise OutputError(self._refusal.format(self._file.read().strip() or "unknown")) from None
        except OSError:
            return  # a file system without locks
        # A process that left no trace may have removed the file between our opening and our locking it.
        if not path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            raise OutputError(self._refusal.format("unknown"))
