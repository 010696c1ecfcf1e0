"""Which stretches of KV each token of a step reads, as few large products. The same for every layer with one window.

Rows (tokens of the step) are put in tree order, so that the readers of a node are neighbours. Neighbouring rows form
*bands*. A band has one buffer of scores, [rows, width], whose columns are

    0 .. own_width                the row's own stretch (what its own node holds, up to the row itself)
    own_width .. width            the positions above it, node by node, in the order of the sequence

so that one softmax over a band's columns is the softmax over all keys of each row, whatever was read together. Each
cell is written by one read, or filled because the row has nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.executor.attention_bands import PieceSize, cut_into_bands
from batchllm.executor.step import Chunk, SharedRead
from batchllm.executor.tree_order import first_rows, row_ranges, tree_order

_SHORT = 96  # chunks whose own stretch is at most this long are read together, each masking the others
_TILE_ROWS = 64  # tokens of short chunks in a tile
_LONG_TILE_ROWS = 128  # tokens of a long chunk in a tile; half a square of scores is masked in each
_FEW = 8  # fewer neighbours than this are gathered with others instead of being a call of their own
_GATHERED = 256  # and only stretches up to this length: a copy costs as much as the read


@dataclass(frozen=True)
class OwnRead:
    """Rows first..last over their own stretches: columns 0..width of their band."""

    first: int
    last: int
    width: int
    mask: Tensor | None  # [rows, 1, width - mask_from], additive, for columns from mask_from on
    mask_from: int
    slots: Tensor | None  # gathered: [rows, width] of a run, [width] of a tile; any valid slot where masked
    offset: int = 0  # otherwise the slot of the first column of the first row


@dataclass(frozen=True)
class Run(OwnRead):
    """Single tokens, each with a stretch of its own; `stride` slots from one to the next where not gathered."""

    stride: int = 0


@dataclass(frozen=True)
class Tile(OwnRead):
    """Tokens of prompt chunks that all read the same columns."""


@dataclass(frozen=True)
class NodeRead:
    """Rows first..last over one stretch that lies wholly before them."""

    first: int
    last: int
    column: int
    offset: int
    length: int
    mask: Tensor | None  # [rows, 1, length]


@dataclass(frozen=True)
class Fill:
    """Cells where rows first..last have no key."""

    first: int
    last: int
    columns: slice


@dataclass
class Band:
    """Rows first..last that share one buffer of scores. Rows of all reads count from the start of the step."""

    first: int
    last: int
    own_width: int
    width: int
    runs: list[Run] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    nodes: list[NodeRead] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)

    @property
    def reads(self) -> list[OwnRead | NodeRead]:
        """Own reads first: they write what nodes are added to."""
        return [*self.runs, *self.tiles, *self.nodes]


@dataclass(frozen=True)
class StepReads:
    """`order[i]` is the flat index of row i; None when rows are in that order already."""

    order: Tensor | None
    bands: list[Band]


def plan_reads(
    chunks: Sequence[Chunk],
    shared_reads: Sequence[SharedRead],
    window: int | None,
    dtype: torch.dtype,
    query_heads: int,
) -> StepReads:
    """Reads of a step's chunks for layers with a sliding window of `window` tokens (None: unlimited).

    A token at position p sees positions p - window + 1 .. p. Masks are additive, in `dtype`.
    """
    if not chunks:
        return StepReads(None, [])
    ordered = tree_order(chunks, shared_reads)
    flat = np.concatenate([np.arange(chunk.first, chunk.first + chunk.count) for chunk in ordered])
    is_sorted = bool((np.diff(flat) == 1).all()) and flat[0] == 0
    pieces = [*_pieces(ordered, window)]
    bands = [
        _band(pieces[first:last], window, dtype)
        for first, last in cut_into_bands([piece.size for piece in pieces], query_heads)
    ]
    row_of = first_rows(ordered)
    for read in sorted(shared_reads, key=lambda read: read.start):
        _add_node_read(bands, read, row_of, window, dtype)
    return StepReads(None if is_sorted else torch.from_numpy(flat), [band.band for band in bands])


# ---- pieces: rows that stay in one band


@dataclass(frozen=True)
class _Member:
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
class _Piece:
    """One decode token, or the tokens of one tile. Rows are numbered in tree order."""

    first: int
    members: tuple[_Member, ...]
    size: PieceSize

    @property
    def last(self) -> int:
        return self.first + self.size.rows


def _pieces(chunks: Sequence[Chunk], window: int | None) -> Iterator[_Piece]:
    first = 0
    gathered: list[_Member] = []

    def piece(members: Sequence[_Member]) -> _Piece:
        nonlocal first
        rows = sum(member.count for member in members)
        own = sum(len(member.own_slots(window)) for member in members)
        above = max(member.chunk.node_start - member.first_seen(window) for member in members)
        made = _Piece(first, tuple(members), PieceSize(rows, own, max(0, above)))
        first += rows
        return made

    for chunk in chunks:
        whole = _Member(chunk, chunk.position, chunk.count)
        is_short = chunk.count > 1 and chunk.held_before + chunk.count <= _SHORT
        if gathered and (not is_short or sum(m.count for m in gathered) + chunk.count > _TILE_ROWS):
            yield piece(gathered)
            gathered = []
        if is_short:
            gathered.append(whole)
        else:
            yield from (piece([part]) for part in _parts(whole))
    if gathered:
        yield piece(gathered)


def _parts(whole: _Member) -> Iterator[_Member]:
    for done in range(0, whole.count, _LONG_TILE_ROWS):
        count = min(_LONG_TILE_ROWS, whole.count - done)
        yield _Member(whole.chunk, whole.position + done, count)


# ---- bands


@dataclass
class _PlannedBand:
    """A band, and what is needed to add node reads to it."""

    band: Band
    base: int  # absolute position of column own_width
    end: int  # and after the last column: some row sees each position in between, no row another one above
    positions: NDArray[np.int64]  # [rows]


def _band(pieces: Sequence[_Piece], window: int | None, dtype: torch.dtype) -> _PlannedBand:
    first, last = pieces[0].first, pieces[-1].last
    single = [piece for piece in pieces if piece.size.rows == 1]
    runs = [*_runs(single, window, dtype)]
    tiles = [_tile(piece, window, dtype) for piece in pieces if piece.size.rows > 1]
    own_width = max(read.width for read in (*runs, *tiles))
    members = [member for piece in pieces for member in piece.members]
    seen = [
        (member.first_seen(window), member.chunk.node_start)
        for member in members
        if member.first_seen(window) < member.chunk.node_start
    ]
    base = min((start for start, _ in seen), default=0)
    end = max((end for _, end in seen), default=base)
    band = Band(first, last, own_width, own_width + end - base, runs, tiles)
    for read in (*runs, *tiles):
        _fill(band, read.first, read.last, read.width, own_width)
    row = first
    for member in members:
        above = max(0, member.chunk.node_start - base)
        _fill(band, row, row + member.count, own_width + above, band.width)
        row += member.count
    positions = [np.arange(member.position, member.position + member.count) for member in members]
    return _PlannedBand(band, base, end, np.concatenate(positions))


def _fill(band: Band, first: int, last: int, begin: int, end: int) -> None:
    """Marks columns begin..end of some rows; neighbours with the same columns become one fill."""
    if begin >= end:
        return
    columns = slice(begin, end)
    if band.fills and band.fills[-1].last == first and band.fills[-1].columns == columns:
        first = band.fills.pop().first
    band.fills.append(Fill(first, last, columns))


# ---- own stretches


def _runs(singles: Sequence[_Piece], window: int | None, dtype: torch.dtype) -> Iterator[Run]:
    """Decode tokens whose stretches lie at equal distances are one view of the pool; the others are gathered."""
    loose: list[_Piece] = []
    for group in _equally_spaced(singles):
        if len(group) >= _FEW or group[0].size.own > _GATHERED:
            yield from _loose_runs(loose, window, dtype)
            loose = []
            yield from _strided_runs(group, window, dtype)
        else:
            loose += group
    yield from _loose_runs(loose, window, dtype)


def _equally_spaced(singles: Sequence[_Piece]) -> list[list[_Piece]]:
    """Neighbouring rows whose extents are equally large and lie one after another."""
    groups: list[list[_Piece]] = []
    for piece in singles:
        extent = piece.members[0].chunk.extent
        last = groups[-1][-1] if groups else None
        above = last.members[0].chunk.extent if last else None
        if (
            last
            and above
            and last.last == piece.first
            and above.end == extent.offset
            and above.capacity == extent.capacity
        ):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _strided_runs(group: Sequence[_Piece], window: int | None, dtype: torch.dtype) -> Iterator[Run]:
    lengths = torch.tensor([piece.members[0].held + 1 for piece in group]).unsqueeze(1)
    begin, end = _seen_columns(lengths, window)
    extent = group[0].members[0].chunk.extent
    yield Run(
        first=group[0].first,
        last=group[-1].last,
        width=end - begin,
        mask=_run_mask(lengths, begin, end, window, dtype),
        mask_from=0,
        slots=None,
        offset=extent.offset + begin,
        stride=extent.capacity,
    )


def _loose_runs(loose: Sequence[_Piece], window: int | None, dtype: torch.dtype) -> Iterator[Run]:
    for group in _consecutive(loose):
        lengths = torch.tensor([piece.members[0].held + 1 for piece in group]).unsqueeze(1)
        begin, end = _seen_columns(lengths, window)
        offsets = torch.tensor([piece.members[0].chunk.extent.offset for piece in group]).unsqueeze(1)
        slots = offsets + torch.minimum(torch.arange(begin, end), lengths - 1)
        mask = _run_mask(lengths, begin, end, window, dtype)
        yield Run(group[0].first, group[-1].last, end - begin, mask, 0, slots)


def _consecutive(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups and groups[-1][-1].last == piece.first:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _seen_columns(lengths: Tensor, window: int | None) -> tuple[int, int]:
    begin = 0 if window is None else max(0, int(lengths.min()) - window)
    return begin, int(lengths.max())


def _run_mask(lengths: Tensor, begin: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    slot = torch.arange(begin, end)
    hidden = slot >= lengths
    if window is not None:
        hidden |= slot < lengths - window
    return _additive(hidden, dtype) if bool(hidden.any()) else None


def _tile(piece: _Piece, window: int | None, dtype: torch.dtype) -> Tile:
    slots = [member.own_slots(window) for member in piece.members]
    width = sum(map(len, slots))
    hidden = np.ones((piece.size.rows, width), dtype=bool)
    row = column = 0
    for member, seen in zip(piece.members, slots):
        query = np.arange(member.count)[:, None] + member.held
        key = np.arange(len(seen)) + member.hidden(window)
        part = hidden[row : row + member.count, column : column + len(seen)]
        np.greater(key, query, out=part)
        if window is not None:
            part |= key <= query - window
        row, column = row + member.count, column + len(seen)
    any_hidden = np.flatnonzero(hidden.any(axis=0))
    mask_from = int(any_hidden[0]) if len(any_hidden) else width
    mask = _additive(torch.from_numpy(hidden[:, mask_from:]), dtype) if mask_from < width else None
    if len(slots) == 1:
        return Tile(piece.first, piece.last, width, mask, mask_from, None, offset=slots[0].start)
    gathered = torch.from_numpy(np.concatenate([np.asarray(seen) for seen in slots]))
    return Tile(piece.first, piece.last, width, mask, mask_from, gathered)


# ---- nodes above


def _add_node_read(
    bands: Sequence[_PlannedBand],
    read: SharedRead,
    row_of: Mapping[int, int],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    ranges = row_ranges(read.chunks, row_of)
    index = 0
    for first, last in ranges:
        while index and bands[index - 1].band.last > first:
            index -= 1
        while index < len(bands) and bands[index].band.first < last:
            planned = bands[index]
            begin, end = max(first, planned.band.first), min(last, planned.band.last)
            if begin < end:
                _add_to_band(planned, read, begin, end, window, dtype)
            index += 1


def _add_to_band(
    planned: _PlannedBand, read: SharedRead, first: int, last: int, window: int | None, dtype: torch.dtype
) -> None:
    band = planned.band
    begin, end = max(read.start, planned.base), min(read.start + read.length, planned.end)
    if begin >= end:
        return
    mask = None
    if window is not None:
        first_seen = planned.positions[first - band.first : last - band.first] - (window - 1)
        hidden = np.arange(begin, end) < first_seen[:, None]
        mask = _additive(torch.from_numpy(hidden), dtype) if hidden.any() else None
    column = band.own_width + begin - planned.base
    offset = read.extent.offset + begin - read.start
    band.nodes.append(NodeRead(first, last, column, offset, end - begin, mask))


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] → [rows, 1, columns]: 0 where seen, -inf where hidden."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
