"""Which stored chunks the rows of a job can use, and where."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from batchllm.chunkcache.catalog import ChunkName, StoredChunk
from batchllm.chunkcache.chunk_file import ChunkStatistics
from batchllm.chunkcache.decision import StoredContext, best_variant
from batchllm.chunkcache.identity import DIGEST_BYTES, chunk_key
from batchllm.chunkcache.store import ChunkStore
from batchllm.core import ChunkTable, PromptTable, TokenArray

_ROWS_KEPT = 4096


@dataclass(frozen=True)
class StoredVariant:
    """One stored variant of a chunk, as far as its index entry and its file's header say."""

    number: int  # in the order in which they were found
    name: ChunkName
    tokens: TokenArray
    codec: str
    context_digest: bytes
    stored: StoredContext
    num_bytes: int  # of its KV, all layers


@dataclass(frozen=True)
class RowChunk:
    """A chunk in a row's prompt, and the stored variant to use for it."""

    begin: int
    end: int
    key: bytes
    before: tuple[bytes, ...]  # keys of the chunks before it
    variant: StoredVariant | None
    exact: bool  # the variant was computed after exactly the tokens that stand before it here


class ChunkLookup:
    """Finds what is stored for each row, from any thread. Damaged files are not there; `store.problems` names them."""

    def __init__(
        self,
        store: ChunkStore,
        prompts: PromptTable,
        chunks: ChunkTable,
        *,
        exact_only: bool,
        codecs: frozenset[str],
    ):
        """`codecs`: of the variants that may be used. `exact_only`: only those computed in the very same context."""
        self.store, self.prompts, self.chunks = store, prompts, chunks
        self.exact_only, self.codecs = exact_only, codecs
        self.variants: list[StoredVariant] = []
        self._opened: dict[ChunkName, StoredVariant | None] = {}
        self._lock = threading.Lock()
        self._rows: OrderedDict[int, list[RowChunk]] = OrderedDict()

    def row(self, row: int) -> list[RowChunk]:
        """The chunks of a row's prompt, in order."""
        with self._lock:
            known = self._rows.get(row)
            if known is None:
                known = self._rows[row] = self._find(row)
                if len(self._rows) > _ROWS_KEPT:
                    self._rows.popitem(last=False)
            return known

    def use_exact_only(self) -> None:
        """From now on, only variants computed in the very same context."""
        with self._lock:
            self.exact_only = True
            self._rows.clear()

    def forget(self, variant: StoredVariant, problem: str) -> None:
        """A variant turned out to be damaged: no row uses it from now on."""
        with self._lock:
            self.store.report(variant.name, problem)
            self._opened[variant.name] = None
            self._rows.clear()

    def _find(self, row: int) -> list[RowChunk]:
        prompt = self.prompts.tokens[self.prompts.offsets[row] : self.prompts.offsets[row + 1]]
        if not len(prompt):
            return []
        places = self.chunks.of(row)
        keys = [chunk_key(self.store.model, prompt[begin:end]) for begin, end in places]
        found = []
        for index, (begin, end) in enumerate(places):
            before = tuple(keys[:index])
            variants = self._variants(keys[index], prompt[begin:end])
            digest = xxhash.xxh3_128_digest(prompt[:begin].tobytes()) if variants else bytes(DIGEST_BYTES)
            variant = next((each for each in variants if each.context_digest == digest), None)
            exact = variant is not None
            if variant is None and variants and not self.exact_only:
                variant = variants[best_variant([each.stored for each in variants], before)]
            found.append(RowChunk(begin, end, keys[index], before, variant, exact))
        return found

    def _variants(self, key: bytes, tokens: TokenArray) -> list[StoredVariant]:
        entries = self.store.variants(key)
        found = [self._open(entry, tokens) for entry in entries if _text(entry.codec) in self.codecs]
        return [variant for variant in found if variant is not None]

    def _open(self, entry: StoredChunk, tokens: TokenArray) -> StoredVariant | None:
        name = entry.name
        if name not in self._opened:
            file = self.store.open(name, tokens)
            self._opened[name] = None
            if file is not None:
                header = file.header
                variant = StoredVariant(
                    len(self.variants),
                    name,
                    header.tokens.copy(),
                    header.codec,
                    header.context.digest,
                    stored_context(header.context.chunks, header.statistics),
                    int(file.layer_bytes().sum()),
                )
                self.variants.append(variant)
                self._opened[name] = variant
        return self._opened[name]


def stored_context(chunks: Sequence[bytes], statistics: ChunkStatistics) -> StoredContext:
    """What the decision needs of a chunk file's header."""
    return StoredContext(
        tuple(chunks),
        statistics.context_chunks,
        statistics.outside,
        statistics.sensitivity,
        statistics.outside_mean,
        statistics.inside_mean,
    )


def _text(codec: bytes) -> str:
    return codec.rstrip(b"\0").decode()
