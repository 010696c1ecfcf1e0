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
from batchllm.chunkcache.store_contents import StoreContents
from batchllm.chunkcache.store_errors import StoreWriteFailed, writing
from batchllm.chunkcache.store_folder import StoreFolder, last_use, remove_file, unfinished, whole_blocks
from batchllm.chunkcache.store_index import make_entry, make_removal
from batchllm.chunkcache.store_opening import claim, open_to_read, open_to_write
from batchllm.core import TokenArray
from batchllm.durable import sync_folder
from batchllm.file_lock import FileLock


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
        self._contents = StoreContents(self.folder.index, durable)
        self._lock: FileLock | None = None
        if not write:
            self.problems += open_to_read(self.folder, self._contents)
            return
        self._lock = claim(self.folder)
        try:
            self.problems += open_to_write(self.folder, self._contents)
            if limit is not None:
                self.shrink(limit)
        except BaseException:
            self._release()
            raise

    @property
    def _catalog(self) -> Catalog:
        return self._contents.catalog

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
        self._contents.refresh()

    def __len__(self) -> int:
        """Stored variants, of all models."""
        return len(self._catalog)

    def __iter__(self) -> Iterator[StoredChunk]:
        return iter(list(self._catalog))

    def used_bytes(self) -> int:
        """What counts against the limit."""
        return self._contents.used_bytes()

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
        if self.limit is not None and self._contents.used_bytes(more_entries=1) + needed > self.limit:
            return False
        path = self.folder.chunk(name)
        temporary = unfinished(path)
        try:
            with writing(temporary):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_chunk_file(temporary, header, layers, self._durable)
                os.replace(temporary, path)
                if self._durable:
                    sync_folder(Path(path).parent)
                self._contents.append(make_entry(header, needed))
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
            with writing(self.path):
                self._contents.append(make_removal(name.key, name.variant))
                remove_file(self.folder.chunk(name))
        self._contents.rewrite_if_mostly_outdated()
        return before - self._catalog.disk_bytes

    def remove_damaged(self, name: ChunkName) -> None:
        """Removes what `check` named, whether or not the index still knows it."""
        self.remove([name])
        remove_file(self.folder.chunk(name))

    def shrink(self, limit: int) -> int:
        """Removes the least recently used variants until at most `limit` bytes are used; returns how many."""
        removed = 0
        for name in self.least_recently_used() if self.used_bytes() > limit else ():
            if self.used_bytes() <= limit:
                break
            self.remove([name])
            removed += 1
        if self.used_bytes() > limit and self._contents.outdated:
            self._contents.rewrite()
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

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


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
