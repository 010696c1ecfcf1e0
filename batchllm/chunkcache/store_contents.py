"""What a store holds: the catalog in memory and the index file, which say the same."""

from __future__ import annotations

from pathlib import Path

from batchllm.chunkcache.catalog import Catalog
from batchllm.chunkcache.store_errors import writing
from batchllm.chunkcache.store_folder import BLOCK_BYTES, whole_blocks
from batchllm.chunkcache.store_index import (
    DamagedIndex,
    Entries,
    IndexState,
    append_entries,
    index_bytes,
    read_index,
    write_index,
)

_SMALL_FILES = 4 * BLOCK_BYTES  # lock and notes
_FEW_ENTRIES = 1024  # an index with more, of which most are outdated, is written anew


class StoreContents:
    """Empty until `read`. Only the process that holds the store's lock may `append` and `rewrite`."""

    def __init__(self, index: Path, durable: bool) -> None:
        self.catalog = Catalog()
        self._index, self._durable = index, durable
        self._state: IndexState | None = None

    def read(self) -> None:
        """Takes in the index. Raises FileNotFoundError, DamagedIndex, OSError."""
        entries, self._state, anew = read_index(self._index, self._state)
        if anew:
            self.catalog = Catalog()
        self.catalog.take(entries)

    def refresh(self) -> None:
        """Takes in what another process has put or removed since. What cannot be read changes nothing."""
        try:
            self.read()
        except (FileNotFoundError, DamagedIndex):
            return

    def append(self, entry: Entries) -> None:
        """Notes what was put or removed. Raises OSError."""
        assert self._state is not None, "an index is read or written before anything is added"
        self._state = append_entries(self._index, entry, self._state, self._durable)
        self.catalog.take(entry)

    def rewrite(self) -> None:
        """Writes the index anew, without what was removed. Raises StoreWriteFailed."""
        entries = self.catalog.entries()
        with writing(self._index):
            self._state = write_index(self._index, entries, self._durable)
        self.catalog = Catalog()
        self.catalog.take(entries)

    @property
    def outdated(self) -> int:
        """Entries of the index that no stored variant needs."""
        return self.catalog.num_entries - len(self.catalog)

    def rewrite_if_mostly_outdated(self) -> None:
        """Raises StoreWriteFailed."""
        if self.outdated > max(_FEW_ENTRIES, len(self.catalog)):
            self.rewrite()

    def used_bytes(self, more_entries: int = 0) -> int:
        """What counts against a store's limit, with so many entries more in the index."""
        entries = self.catalog.num_entries + more_entries
        # Twice: when the index is written anew, the old one is still there.
        return self.catalog.disk_bytes + 2 * whole_blocks(index_bytes(entries)) + _SMALL_FILES
