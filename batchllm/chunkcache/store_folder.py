"""Where things lie in a chunk store, and what is found there when the index does not say.

STORE/chunks/ab/KEY-VARIANT.kv   one file for every stored variant of a chunk, in 256 folders
STORE/index                      the same as a list, read at once
STORE/models/MODEL.json          which model an identity belongs to, for people
STORE/lock                       held by the one process that writes
STORE/unclean                    there while a process writes; if none does, one did not get to the end
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchllm.chunkcache.catalog import ChunkName
from batchllm.chunkcache.chunk_file import ChunkFile, DamagedChunk
from batchllm.chunkcache.identity import DIGEST_BYTES
from batchllm.chunkcache.store_index import Entries, join_entries, make_entry

BLOCK_BYTES = 4096
_SUFFIX, _TEMPORARY = ".kv", ".tmp"
_NAME_LENGTH = 4 * DIGEST_BYTES + 1


class StoreFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks = path / "chunks"
        self._chunks = str(self.chunks)
        self.index = path / "index"
        self.models = path / "models"
        self.lock = path / "lock"
        self.unclean = path / "unclean"

    def is_store(self) -> bool:
        return self.index.is_file() or self.chunks.is_dir()

    def chunk(self, name: ChunkName) -> str:
        """The path of a chunk file; plain text, because this is on the way of every lookup."""
        key = name.key.hex()
        return f"{self._chunks}/{key[:2]}/{key}-{name.variant.hex()}{_SUFFIX}"

    def names(self) -> Iterator[ChunkName]:
        """Every chunk file, whole or not, by its name."""
        for entry in self._files():
            name = _parsed(entry.name)
            if name is not None:
                yield name

    def remove_unfinished(self) -> None:
        """Removes what a process was writing when it was stopped."""
        for entry in self._files():
            if entry.name.endswith(_TEMPORARY):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)

    def entry_of(self, name: ChunkName) -> Entries | None:
        """The index entry of a chunk file; None when the file is damaged or gone."""
        try:
            file = ChunkFile(self.chunk(name))
        except (DamagedChunk, OSError):
            return None
        header = file.header
        if (header.key, header.variant) != name:
            return None
        return make_entry(header, whole_blocks(os.stat(file.path).st_size))

    def entries_of(self, is_known: Callable[[ChunkName], bool]) -> Entries:
        """Entries of every good chunk file that is not known yet."""
        found = (self.entry_of(name) for name in self.names() if not is_known(name))
        return join_entries([entry for entry in found if entry is not None])

    def note_model(self, model: bytes, about: dict[str, Any]) -> None:
        """Remembers for people which model an identity belongs to. A note that cannot be written is done without."""
        with contextlib.suppress(OSError):
            self.models.mkdir(exist_ok=True)
            path = self.models / f"{model.hex()}.json"
            if not path.exists():
                path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def about_model(self, model: bytes) -> dict[str, Any]:
        try:
            about = json.loads((self.models / f"{model.hex()}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return about if isinstance(about, dict) else {}

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.chunks) as folders:
            for folder in folders:
                if folder.is_dir():
                    with os.scandir(folder.path) as files:
                        yield from list(files)


def unfinished(path: str) -> str:
    """The name of a chunk file while it is written."""
    return path.removesuffix(_SUFFIX) + _TEMPORARY


def remove_file(path: str) -> None:
    """Removes a chunk file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def whole_blocks(size: int) -> int:
    """What a file of this length takes: whole blocks of the file system."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def last_use(path: str) -> float:
    """When a chunk was put or last used, by the time of its file; 0 when it is gone."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _parsed(file_name: str) -> ChunkName | None:
    stem = file_name.removesuffix(_SUFFIX)
    if stem == file_name or len(stem) != _NAME_LENGTH:
        return None
    try:
        return ChunkName(*(bytes.fromhex(part) for part in stem.split("-")))
    except (ValueError, TypeError):
        return None
