"""Small chunks for the store, made from a number. As a script: puts chunks until it is killed.

    python -m tests.chunkcache.store_worlds FOLDER [STOP]

prints the number of each chunk once it is stored. STOP says where in the sixth chunk the process kills itself:
`before-rename`, `before-index`, `in-index`, `before-unlink` (of chunk 0).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np

from batchllm.chunkcache import chunk_file, store, store_contents, store_index
from batchllm.chunkcache.chunk_file import ChunkHeader, ChunkStatistics, EncodedLayer
from batchllm.chunkcache.identity import chunk_context, chunk_key
from batchllm.chunkcache.store import ChunkStore

MODEL = b"the model's name"
LAYERS = 3


def tokens_of(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, 1000, 5 + number % 40).astype(np.int32)


def make_chunk(
    number: int, model: bytes = MODEL, before: int = 0, codec: str = "bf16"
) -> tuple[ChunkHeader, list[EncodedLayer]]:
    """Chunk `number` as computed after `before` tokens."""
    tokens = tokens_of(number)
    rng = np.random.default_rng((number, before))
    context = chunk_context(np.arange(before, dtype=np.int32), [b"k" * 16] * min(before, 3))
    statistics = ChunkStatistics(
        rng.random(len(tokens), np.float32),
        rng.random(len(tokens), np.float32),
        rng.random(len(context.chunks), np.float32),
        0.25,
        0.5,
    )
    header = ChunkHeader(model, chunk_key(model, tokens), tokens, context, statistics, codec, "float32")
    sections = [rng.integers(0, 256, len(tokens) * 64, np.uint8) for _ in range(LAYERS)]
    return header, [EncodedLayer(2, 8, 8, section) for section in sections]


def main(folder: str, stop: str = "") -> None:
    with ChunkStore(Path(folder), MODEL, write=True, durable=False) as chunks:
        first = len(chunks)
        for number in range(first, first + 10_000):
            if stop and number == first + 5:
                _arm(stop)
                if stop == "before-unlink":
                    chunks.remove([store.ChunkName(*_name(0))])
            header, layers = make_chunk(number)
            assert chunks.put(header, layers)
            print(number, flush=True)


def _arm(stop: str) -> None:
    def die(*_: object, **__: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def append_half(path: Path, entries: np.ndarray, state: store_index.IndexState, durable: bool) -> None:
        with open(path, "r+b") as stream:
            stream.seek(state.end)
            stream.write(entries.tobytes()[:50])
        die()

    if stop == "before-rename":
        store.os.replace = die  # type: ignore[assignment]
    elif stop == "before-index":
        store_contents.append_entries = die  # type: ignore[assignment]
    elif stop == "in-index":
        store_contents.append_entries = append_half  # type: ignore[assignment]
    elif stop == "before-unlink":
        store.remove_file = die  # type: ignore[assignment]
    else:
        raise AssertionError(stop)


def _name(number: int) -> tuple[bytes, bytes]:
    header, _ = make_chunk(number)
    return header.key, header.variant


if __name__ == "__main__":
    assert chunk_file
    main(*sys.argv[1:])
