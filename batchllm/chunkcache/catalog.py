"""What a store holds, in memory: stored variants by key. Made from index entries, 100,000 in a tenth of a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from batchllm.chunkcache.store_index import FIELDS, Entries, make_entries


class ChunkName(NamedTuple):
    """Names one stored variant of a chunk."""

    key: bytes
    variant: bytes


class StoredChunk(NamedTuple):
    """What the index says of a stored variant: the fields of `store_index.ENTRY`, in order."""

    key: bytes
    variant: bytes
    model: bytes
    context: bytes  # digest of the tokens before it
    disk_bytes: int
    num_tokens: int
    context_tokens: int
    context_chunks: int
    outside_mean: float
    inside_mean: float
    removed: int
    codec: bytes

    @property
    def name(self) -> ChunkName:
        return ChunkName(self.key, self.variant)


class Catalog:
    """Every variant that was put and not removed again."""

    def __init__(self) -> None:
        self._variants: dict[bytes, list[StoredChunk]] = {}
        self._size = 0
        self.disk_bytes = 0  # of the chunk files
        self.num_entries = 0  # in the index, removals and what they removed included

    def take(self, entries: Entries) -> None:
        """Takes in index entries, in their order."""
        self.num_entries += len(entries)
        if not len(entries):
            return
        for chunk in map(StoredChunk._make, entries[FIELDS].tolist()):
            if chunk.removed:
                self.forget(chunk.name)
            else:
                self._add(chunk)

    def _add(self, chunk: StoredChunk) -> None:
        self.forget(chunk.name)
        self._variants.setdefault(chunk.key, []).append(chunk)
        self._size += 1
        self.disk_bytes += chunk.disk_bytes

    def forget(self, name: ChunkName) -> None:
        found = self._variants.get(name.key)
        if found is None:
            return
        for chunk in found:
            if chunk.variant == name.variant:
                found.remove(chunk)
                self._size -= 1
                self.disk_bytes -= chunk.disk_bytes
                break
        if not found:
            del self._variants[name.key]

    def variants(self, key: bytes) -> list[StoredChunk]:
        return list(self._variants.get(key, ()))

    def get(self, name: ChunkName) -> StoredChunk | None:
        for chunk in self._variants.get(name.key, ()):
            if chunk.variant == name.variant:
                return chunk
        return None

    def entries(self) -> Entries:
        """What an index must hold to say the same."""
        return make_entries(list(self))

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[StoredChunk]:
        for found in self._variants.values():
            yield from found
