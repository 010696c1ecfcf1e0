"""Files that are wholly there or not there at all, also after kill -9 or a power cut.

A file is written under another name, brought to the disk, and renamed; then the rename is brought to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchllm.errors import OutputError


class WriteFailed(OutputError):
    """The disk is full, refuses to be written or lost what was. What was finished before stays as it was.

    It ends a run that has begun, so the command exits with 1, not with 2.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says into one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteFailed(cannot_be_written(path, error, "what was finished before is kept")) from error


def cannot_be_written(path: Path | str, error: OSError, kept: str) -> str:
    """In one sentence; `kept`: what nothing has happened to."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return (
        f"{path}: cannot be written ({reason}); {kept}, "
        "so free space or fix the permissions and run the same command again"
    )


def make_folder(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def replace_durably(temporary: Path, path: Path) -> None:
    """Moves a complete file to its name; both are on one file system. Afterwards it is there for good."""
    with writing(path):
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Replaces the file at `path` atomically. Two processes must not write the same path at once.

    Not `durable`: faster, and a power cut may leave the file empty or old, which its readers must bear.
    """
    with replacing(path, durable) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """The name to write a file under. Whole, it takes the place of `path`; after an error nothing does."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            if not durable:
                os.replace(temporary, path)
        if durable:
            replace_durably(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raises OutputError where this user may not write into a folder, or make it. Writes nothing."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot be written, because this user may not write to {existing}")


def write_json(path: Path, value: Mapping[str, Any], durable: bool = True) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="replace"), durable)


def sync_file(path: Path) -> None:
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Makes renames and removals inside the folder permanent, where the file system can do that."""
    try:
        _sync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
