"""A step's chunks as pieces: rows that stay in one band, for they are read together or are one token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchllm.executor.attention_bands import PieceSize
from batchllm.executor.step import Chunk

_SHORT = 96  # chunks whose own stretch is at most this long are read together, each masking the others
_TILE_ROWS = 64  # tokens of short chunks in a tile
_LONG_TILE_ROWS = 128  # tokens of a long chunk in a tile; half a square of scores is masked in each


@dataclass(frozen=True)
class Member:
    """Part of a chunk: `count` tokens from `position` on, the first `held` of its node before them."""

    chunk: Chunk
    position: int
    count: int

    @property
    def held(self) -> int:
        return self.position - self.chunk.node_start

    def hidden(self, window: int | None) -> int:
        """Own slots from the start that none of the tokens sees."""
        return 0 if window is None else max(0, self.held - window + 1)

    def own_slots(self, window: int | None) -> range:
        """Slots that at least one of the tokens sees."""
        offset = self.chunk.extent.offset
        return range(offset + self.hidden(window), offset + self.held + self.count)

    def first_seen(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.position - window + 1)


@dataclass(frozen=True)
class Piece:
    """One decode token, or the tokens of one tile. Rows are numbered in tree order."""

    first: int
    members: tuple[Member, ...]
    size: PieceSize

    @property
    def last(self) -> int:
        return self.first + self.size.rows


def cut_into_pieces(chunks: Sequence[Chunk], window: int | None, apart: bool = False) -> Iterator[Piece]:
    """Pieces of chunks in tree order, for layers with a sliding window of `window` tokens (None: unlimited); with
    `apart` of one chunk each."""
    first = 0
    gathered: list[Member] = []

    def piece(members: Sequence[Member]) -> Piece:
        nonlocal first
        rows = sum(member.count for member in members)
        own = sum(len(member.own_slots(window)) for member in members)
        above = max(member.chunk.node_start - member.first_seen(window) for member in members)
        made = Piece(first, tuple(members), PieceSize(rows, own, max(0, above)))
        first += rows
        return made

    for chunk in chunks:
        whole = Member(chunk, chunk.position, chunk.count)
        is_short = not apart and chunk.count > 1 and chunk.held_before + chunk.count <= _SHORT
        if gathered and (not is_short or sum(m.count for m in gathered) + chunk.count > _TILE_ROWS):
            yield piece(gathered)
            gathered = []
        if is_short:
            gathered.append(whole)
        else:
            yield from (piece([part]) for part in _parts(whole))
    if gathered:
        yield piece(gathered)


def _parts(whole: Member) -> Iterator[Member]:
    for done in range(0, whole.count, _LONG_TILE_ROWS):
        count = min(_LONG_TILE_ROWS, whole.count - done)
        yield Member(whole.chunk, whole.position + done, count)
