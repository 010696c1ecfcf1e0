"""The chunk store: a folder that holds the KV of chunks, found by content. See `store_folder` for what lies where.

Any number of processes may read while one writes. A chunk's file is written under another name and renamed, then
entered in the index: whatever happens in between, at most that chunk is lost. A chunk is believed only after its
tokens have been compared and its checksums have been seen to be right; else it counts as not there, is named in
`problems`, and is to be computed again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from batchllm.chunkcache.catalog import Catalog, ChunkName, StoredChunk
from batchllm.chunkcache.chunk_file import (
    ChunkFile,
    ChunkHeader,
    DamagedChunk,
    EncodedLayer,
    check_whole_file,
    file_bytes,
    write_chunk_file,
)
from batchllm.chunkcache.identity import chunk_key
from batchllm.chunkcache.store_folder import BLOCK_BYTES, StoreFolder, last_use, unfinished, whole_blocks
from batchllm.chunkcache.store_index import (
    DamagedIndex,
    IndexState,
    append_entries,
    index_bytes,
    make_entry,
    make_removal,
    read_index,
    write_index,
)
from batchllm.core import TokenArray
from batchllm.durable import WriteFailed, sync_folder
from batchllm.errors import OutputError
from batchllm.file_lock import FileLock

_SMALL_FILES = 4 * BLOCK_BYTES  # lock and notes
_FEW_ENTRIES = 1024  # an index with more, of which most are outdated, is written anew


class StoreError(OutputError):
    """The folder is not a chunk store, or another process is writing it."""


class StoreWriteFailed(StoreError, WriteFailed):
    """The disk is full or refuses to be written. What is in the store stays as it is."""


def check_store(path: Path) -> None:
    """Raises StoreError when there is no chunk store here."""
    if not StoreFolder(path).is_store():
        raise StoreError(f"{path}: is not a chunk store; `batchllm precompute` makes one")


class ChunkStore:
    """See the module. `model` is the identity of the model whose chunks are found and put.

    With `limit`, the files of the store never take more bytes than that, in blocks of 4 KiB (folders not counted);
    what was there before and is too much leaves at once, the least recently used first.
    """

    def __init__(
        self, path: Path, model: bytes, *, write: bool = False, limit: int | None = None, durable: bool = True
    ) -> None:
        self.path, self.model, self.limit = path, model, limit
        self.problems: list[str] = []  # a sentence for every chunk that was there and cannot be used
        self.folder = StoreFolder(path)
        self._durable = durable
        self._catalog = Catalog()
        self._state: IndexState | None = None
        self._lock: FileLock | None = None
        if not write:
            self._open_for_reading()
            return
        self._lock = self._claim()
        try:
            self._open_for_writing()
        except BaseException:
            self._release()
            raise

    # ---- reading

    def find(self, tokens: TokenArray) -> list[StoredChunk]:
        """The stored variants of the chunk with these tokens, from the index alone."""
        return self._catalog.variants(chunk_key(self.model, tokens))

    def variants(self, key: bytes) -> list[StoredChunk]:
        """The same for a chunk's key (`identity.chunk_key`)."""
        return self._catalog.variants(key)

    def open(self, name: ChunkName, tokens: TokenArray) -> ChunkFile | None:
        """The file of a stored variant if it holds exactly these tokens and can be read, else None."""
        if self._catalog.get(name) is None:
            return None
        path = self.folder.chunk(name)
        try:
            file = ChunkFile(path)
        except FileNotFoundError:  # another process has removed it
            self._catalog.forget(name)
            return None
        except (DamagedChunk, OSError) as error:
            self.report(name, str(error))
            return None
        if file.model != self.model or file.key != name.key:
            self.report(name, f"{path}: holds another chunk than its name says")
            return None
        return file if file.holds(tokens) else None

    def report(self, name: ChunkName, problem: str) -> None:
        """A stored variant cannot be used: it counts as not there from now on."""
        self.problems.append(f"{problem}; it is skipped and computed again")
        self._catalog.forget(name)

    def refresh(self) -> None:
        """Takes in what another process has put or removed since."""
        try:
            entries, self._state, anew = read_index(self.folder.index, self._state)
        except (FileNotFoundError, DamagedIndex):
            return  # what is known stays known
        if anew:
            self._catalog = Catalog()
        self._catalog.take(entries)

    def __len__(self) -> int:
        """Stored variants, of all models."""
        return len(self._catalog)

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(list(self._catalog))

    def used_bytes(self) -> int:
        """What counts against the limit."""
        return self._used_with(0)

    def least_recently_used(self) -> list[ChunkName]:
        """All stored variants, the one whose last use is longest ago first."""
        names = [chunk.name for chunk in self._catalog]
        return sorted(names, key=lambda name: last_use(self.folder.chunk(name)))

    def touch(self, names: Iterable[ChunkName]) -> None:
        """Notes that these were used just now."""
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self.folder.chunk(name))

    def check(self, found_bad: Callable[[ChunkName, str], None]) -> int:
        """Reads every chunk whole and names each that is damaged or gone. Returns how many are good."""
        good = 0
        for chunk in self:
            problem = _problem_of(self.folder.chunk(chunk.name), chunk.name)
            if problem is None:
                good += 1
            else:
                found_bad(chunk.name, problem)
        return good

    # ---- writing

    def put(self, header: ChunkHeader, layers: Sequence[EncodedLayer]) -> bool:
        """Stores a variant. False, and nothing changes, when it would exceed the limit. Raises StoreWriteFailed."""
        assert self._lock is not None, "the store was opened for reading"
        assert header.model == self.model, "a chunk of another model"
        name = ChunkName(header.key, header.variant)
        if self._catalog.get(name) is not None:
            return True
        needed = whole_blocks(file_bytes(header, layers))
        if self.limit is not None and self._used_with(1) + needed > self.limit:
            return False
        path = self.folder.chunk(name)
        temporary = unfinished(path)
        try:
            with self._writing(temporary):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_chunk_file(temporary, header, layers, self._durable)
                os.replace(temporary, path)
                if self._durable:
                    sync_folder(Path(path).parent)
                self._append(make_entry(header, needed))
        except StoreWriteFailed:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        return True

    def remove(self, names: Iterable[ChunkName]) -> int:
        """Removes stored variants; returns the bytes that became free. A process that has one open keeps it."""
        assert self._lock is not None, "the store was opened for reading"
        before = self._catalog.disk_bytes
        for name in names:
            if self._catalog.get(name) is None:
                continue
            with self._writing(self.path):
                self._append(make_removal(name.key, name.variant))
                _unlink(self.folder.chunk(name))
        outdated = self._catalog.num_entries - len(self._catalog)
        if outdated > _FEW_ENTRIES and outdated > len(self._catalog):
            self._rewrite_index()
        return before - self._catalog.disk_bytes

    def remove_damaged(self, name: ChunkName) -> None:
        """Removes what `check` named, whether or not the index still knows it."""
        self.remove([name])
        _unlink(self.folder.chunk(name))

    def shrink(self, limit: int) -> int:
        """Removes the least recently used variants until at most `limit` bytes are used; returns how many."""
        removed = 0
        for name in self.least_recently_used() if self.used_bytes() > limit else ():
            if self.used_bytes() <= limit:
                break
            self.remove([name])
            removed += 1
        if self.used_bytes() > limit and self._catalog.num_entries > len(self._catalog):
            self._rewrite_index()
        return removed

    def close(self) -> None:
        """Lets another process write. Closing twice is allowed."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.folder.unclean.unlink(missing_ok=True)
            self._release()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- opening

    def _claim(self) -> FileLock:
        if self.path.exists() and not self.folder.is_store() and _holds_anything(self.path):
            raise StoreError(
                f"{self.path}: is not a chunk store and not empty; choose another folder for chunks.store"
            )
        with self._writing(self.path):
            self.folder.chunks.mkdir(parents=True, exist_ok=True)
            self.folder.lock.touch()
        return FileLock(
            self.folder.lock,
            f"{self.path}: another process ({{}}) is writing this chunk store; wait until it has ended",
        )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open_for_reading(self) -> None:
        check_store(self.path)
        try:
            entries, self._state, _ = read_index(self.folder.index)
        except (FileNotFoundError, DamagedIndex) as error:
            self.problems.append(f"{error}; the chunk files were read one by one instead")
            entries = self.folder.entries_of(lambda name: False)
        except OSError as error:
            raise StoreError(f"{self.folder.index}: cannot be read ({error.strerror})") from error
        self._catalog.take(entries)

    def _open_for_writing(self) -> None:
        with self._writing(self.path):
            clean = not self.folder.unclean.exists()
            self.folder.unclean.touch()
            try:
                entries, self._state, _ = read_index(self.folder.index)
                self._catalog.take(entries)
            except FileNotFoundError:
                clean = False
            except DamagedIndex as error:
                self.problems.append(f"{error}; it was made anew from the chunk files")
                clean = False
            if not clean:
                self._recover()
        if self.limit is not None:
            self.shrink(self.limit)

    def _recover(self) -> None:
        """After a process that did not get to the end: makes index and files agree."""
        self.folder.remove_unfinished()
        there = set(self.folder.names())
        for chunk in self:
            if chunk.name not in there:
                self._catalog.forget(chunk.name)
        self._catalog.take(self.folder.entries_of(lambda name: self._catalog.get(name) is not None))
        for name in there:
            if self._catalog.get(name) is None:  # damaged
                _unlink(self.folder.chunk(name))
        self._rewrite_index()

    # ---- the index

    def _append(self, entry: np.ndarray) -> None:
        assert self._state is not None
        self._state = append_entries(self.folder.index, entry, self._state, self._durable)
        self._catalog.take(entry)

    def _rewrite_index(self) -> None:
        """Without what was removed."""
        entries = self._catalog.entries()
        with self._writing(self.folder.index):
            self._state = write_index(self.folder.index, entries, self._durable)
        self._catalog = Catalog()
        self._catalog.take(entries)

    def _used_with(self, more_entries: int) -> int:
        entries = self._catalog.num_entries + more_entries
        index = 2 * whole_blocks(
            index_bytes(entries)
        )  # twice: when it is written anew, the old one is still there
        return self._catalog.disk_bytes + index + _SMALL_FILES

    @contextlib.contextmanager
    def _writing(self, path: Path | str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StoreWriteFailed(
                f"{path}: cannot be written ({reason}); chunks already in the store stay, so free space or fix "
                "the permissions and run the same command again"
            ) from error


def _problem_of(path: str, name: ChunkName) -> str | None:
    try:
        header = check_whole_file(path)
    except FileNotFoundError:
        return f"{path}: is missing"
    except (DamagedChunk, OSError) as error:
        return str(error)
    if (header.key, header.variant) != name or chunk_key(header.model, header.tokens) != header.key:
        return f"{path}: holds another chunk than its name says"
    return None


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _holds_anything(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())
