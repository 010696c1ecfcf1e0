"""One run at a time in an output folder, from before the first row is read until the last one is written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchllm.dataset.folder import Folder, check_output
from batchllm.durable import make_folder, writing
from batchllm.file_lock import FileLock


@dataclass(frozen=True)
class Claim:
    """Proof that this run, and no other, may write the folder."""

    folder: Folder
    work_dir: Path  # empty at first; for files that only this run needs, removed with the claim
    replaces: bool  # the folder holds another job's results, which the run may remove


@contextlib.contextmanager
def claim_output(path: Path, identity: str, overwrite: bool = False) -> Iterator[Claim]:
    """Raises what `check_output` raises, and OutputError while another process has the claim.

    Nothing is taken over or removed yet. A run that ends without having written anything leaves no trace.
    """
    check_output(path, identity, overwrite)
    folder = Folder(path)
    work_dir = folder.run / "work"
    made = [p for p in (folder.run, path, *path.parents) if not p.exists()]
    make_folder(folder.run)
    lock = FileLock(folder.lock, _refusal(path))
    try:
        replaces = check_output(path, identity, overwrite)  # again: another run may have ended in between
        with writing(work_dir):
            shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
            work_dir.mkdir()
        yield Claim(folder, work_dir, replaces)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        if not folder.manifest.exists() and folder.run in made:
            folder.lock.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # the first that is not empty
            for made_folder in made:
                made_folder.rmdir()


def _refusal(path: Path) -> str:
    return (
        f"{path}: another run (process {{}}) is writing this folder; "
        "wait until it has ended or choose another output.path"
    )
