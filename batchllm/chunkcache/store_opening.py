"""A chunk store is opened: what is in it is read, and what a process left that did not get to the end is put right."""

from __future__ import annotations

from pathlib import Path

from batchllm.chunkcache.store_contents import StoreContents
from batchllm.chunkcache.store_errors import StoreError, writing
from batchllm.chunkcache.store_folder import StoreFolder, remove_file
from batchllm.chunkcache.store_index import DamagedIndex
from batchllm.file_lock import FileLock


def check_store(path: Path) -> None:
    """Raises StoreError when there is no chunk store here."""
    if not StoreFolder(path).is_store():
        raise StoreError(f"{path}: is not a chunk store; `batchllm precompute` makes one")


def open_to_read(folder: StoreFolder, contents: StoreContents) -> list[str]:
    """Fills `contents`; returns what is wrong with the index. Raises StoreError."""
    check_store(folder.path)
    try:
        contents.read()
    except (FileNotFoundError, DamagedIndex) as error:
        contents.catalog.take(folder.entries_of(lambda name: False))
        return [f"{error}; the chunk files were read one by one instead"]
    except OSError as error:
        raise StoreError(f"{folder.index}: cannot be read ({error.strerror})") from error
    return []


def claim(folder: StoreFolder) -> FileLock:
    """Makes the folder a store if it is none yet, and this process the one that writes. Raises StoreError."""
    path = folder.path
    if path.exists() and not folder.is_store() and _holds_anything(path):
        raise StoreError(
            f"{path}: is not a chunk store and not empty; choose another folder for chunks.store"
        )
    with writing(path):
        folder.chunks.mkdir(parents=True, exist_ok=True)
        folder.lock.touch()
    return FileLock(
        folder.lock,
        f"{path}: another process ({{}}) is writing this chunk store; wait until it has ended",
    )


def open_to_write(folder: StoreFolder, contents: StoreContents) -> list[str]:
    """The same as `open_to_read` for the process that has claimed the store. Raises StoreWriteFailed."""
    problems = []
    with writing(folder.path):
        clean = not folder.unclean.exists()
        folder.unclean.touch()
        try:
            contents.read()
        except FileNotFoundError:
            clean = False
        except DamagedIndex as error:
            problems.append(f"{error}; it was made anew from the chunk files")
            clean = False
        if not clean:
            _recover(folder, contents)
    return problems


def _recover(folder: StoreFolder, contents: StoreContents) -> None:
    """After a process that did not get to the end: makes index and files agree."""
    folder.remove_unfinished()
    catalog, there = contents.catalog, set(folder.names())
    for chunk in list(catalog):
        if chunk.name not in there:
            catalog.forget(chunk.name)
    catalog.take(folder.entries_of(lambda name: catalog.get(name) is not None))
    for name in there:
        if catalog.get(name) is None:  # damaged
            remove_file(folder.chunk(name))
    contents.rewrite()


def _holds_anything(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())
