"""Where a run keeps files that it maps into memory: a folder of its own beside the results."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from batchllm.durable import make_folder, writing

try:
    import fcntl
except ImportError:  # no such locks here: what a killed run left stays
    fcntl = None  # type: ignore[assignment]


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A new folder in OUT/_run, removed afterwards together with the folders made for it that are still empty.

    No two processes share one, because truncating a file that another has mapped kills the other. Folders that
    killed runs left are removed first.
    """
    run = output / "_run"
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    make_folder(run)
    _remove_abandoned(run)
    with writing(run):
        work, lock = _make_locked(run)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _make_locked(run: Path) -> tuple[Path, IO[str]]:
    """The folder gets its name when it is locked, so it never looks abandoned."""
    unnamed = Path(tempfile.mkdtemp(prefix=".work-", dir=run))
    lock = (unnamed / "lock").open("w", encoding="utf-8")
    _try_lock(lock)
    work = unnamed.with_name(unnamed.name.removeprefix("."))
    os.rename(unnamed, work)
    return work, lock


def _remove_abandoned(run: Path) -> None:
    for folder in run.glob("work-*"):
        try:
            with (folder / "lock").open("a", encoding="utf-8") as lock:
                if _try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _try_lock(file: IO[str]) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    return True
