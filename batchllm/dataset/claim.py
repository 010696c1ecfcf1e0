"""One run at a time in an output folder, from before the first row is read until the last one is written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchllm.dataset.folder import Folder, check_output
from batchllm.durable import make_folder, writing
from batchllm.errors import OutputError

try:
    import fcntl
except ImportError:  # no such locks here: two runs into one folder are then not told apart
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Claim:
    """Proof that this run, and no other, may write the folder."""

    folder: Folder
    work_dir: Path  # empty at first; for files that only this run needs, removed with the claim


@contextlib.contextmanager
def claim_output(path: Path, identity: str, overwrite: bool = False) -> Iterator[Claim]:
    """Raises what `check_output` raises, and OutputError while another process has the claim.

    Nothing is taken over or removed yet. A run that ends without having written anything leaves no trace.
    """
    check_output(path, identity, overwrite)
    folder = Folder(path)
    work_dir = folder.run / "work"
    made = [p for p in (folder.run, path, *path.parents) if not p.exists()]
    lock = _FolderLock(folder)
    try:
        check_output(path, identity, overwrite)  # again: another run may have ended in between
        with writing(work_dir):
            shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
            work_dir.mkdir()
        yield Claim(folder, work_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        if not folder.manifest.exists() and folder.run in made:
            folder.lock.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # the first that is not empty
            for made_folder in made:
                made_folder.rmdir()


class _FolderLock:
    """Held by the one process that writes an output folder; gone with the process, however it ends."""

    def __init__(self, folder: Folder) -> None:
        self._refusal = (
            f"{folder.path}: another run (process {{}}) is writing this folder; "
            "wait until it has ended or choose another output.path"
        )
        make_folder(folder.run)
        with writing(folder.lock):
            self._file: IO[str] = open(folder.lock, "a+", encoding="utf-8")  # noqa: SIM115 (held, not used)
        try:
            self._acquire(folder.lock)
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
        # A run that left no trace may have removed the file between our opening and our locking it.
        if not path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            raise OutputError(self._refusal.format("unknown"))
