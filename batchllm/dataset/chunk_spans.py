"""From characters to tokens: which tokens of a prompt belong to each of its chunks.

A prompt is tokenised as a whole, exactly as without chunks. A chunk is the tokens that lie wholly within its
characters; a token that reaches across its edge (a full stop together with the line break after it) belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchllm.core import ChunkTable
from batchllm.dataset.chunk_marks import Span
from batchllm.errors import ModelError


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises ModelError when this tokenizer cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{source}: chunks need a tokenizer that knows which characters its tokens stand for (a tokenizer.json), "
            "and the model has none; remove the section chunks"
        )


def chunk_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """(first token, one past the last) of each chunk that has tokens. `offsets`: characters of every token."""
    if not spans:
        return []
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    found: list[Span] = []
    for begin, end in spans:
        inside = np.flatnonzero(
            (places[:, 0] >= begin) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
        )
        if len(inside) and inside[-1] - inside[0] + 1 == len(inside):
            found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


class ChunkTableBuilder:
    """Gathers the chunks of row after row."""

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._chunks: list[Span] = []

    def add(self, chunks: Sequence[Span]) -> None:
        self._counts.append(len(chunks))
        self._chunks += chunks

    def build(self) -> ChunkTable:
        both = np.array(self._chunks, dtype=np.int64).reshape(-1, 2)
        ptr = np.append(0, np.cumsum(np.array(self._counts, dtype=np.int64)))
        return ChunkTable(ptr, both[:, 0].copy(), both[:, 1].copy())
