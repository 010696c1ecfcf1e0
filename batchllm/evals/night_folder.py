"""The folder of one evaluation: what may be written there is known before anything is computed, and written whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from batchllm.durable import check_writable, make_folder, sync_folder, write_bytes, writing
from batchllm.errors import OutputError

_LAST = "scores.parquet"  # an evaluation without it is not finished
_FILES = ("changes.parquet", "flips.parquet", "samples.parquet", "report.txt", "run.json", _LAST)
_SIGNS = ("run.json", _LAST)  # one of them is there even while an evaluation is replaced


def check_night(path: Path, overwrite: bool) -> None:
    """Raises OutputError when no evaluation may be, or can be, written to `path`. Writes nothing."""
    for folder in {path, path.parent}:  # new files lie beside it first
        check_writable(folder)
    if not path.exists():
        return
    names = {entry.name for entry in path.iterdir()}
    if _LAST in names and not overwrite:
        raise OutputError(f"{path} holds an evaluation already; set another output.path or give --overwrite")
    if names and names.isdisjoint(_SIGNS):
        raise OutputError(
            f"{path} holds files that are no evaluation ({min(names)}); set another output.path"
        )


def write_night(path: Path, files: Mapping[str, bytes]) -> None:
    """The files of an evaluation, by name, in place of those of an earlier one; other files in the folder stay.

    A new folder has all of them or is not there. Raises WriteFailed.
    """
    assert _LAST in files and set(files) <= set(_FILES)
    scratch = path.parent / f".{path.name}.tmp"
    try:
        with writing(path):
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            make_folder(scratch)
            for name, data in files.items():
                write_bytes(scratch / name, data)
            if path.exists() and any(path.iterdir()):
                _replace(path, scratch, files)
            else:
                os.replace(scratch, path)
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _replace(path: Path, scratch: Path, files: Mapping[str, bytes]) -> None:
    (path / _LAST).unlink(missing_ok=True)
    for name in _FILES:
        if name in files:
            os.replace(scratch / name, path / name)
        else:
            (path / name).unlink(missing_ok=True)
    sync_folder(path)
    scratch.rmdir()
