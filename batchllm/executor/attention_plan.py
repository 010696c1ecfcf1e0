"""Which stretches of KV each token of a step reads: the bands of `attention_reads`. The same for every layer with one
window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.executor.attention_bands import cut_into_bands
from batchllm.executor.attention_own import own_runs, own_tile
from batchllm.executor.attention_pieces import Piece, cut_into_pieces
from batchllm.executor.attention_reads import Band, Fill, NodeRead, StepReads, additive_mask
from batchllm.executor.step import Chunk, SharedRead
from batchllm.executor.tree_order import first_rows, row_ranges, tree_order


def plan_reads(
    chunks: Sequence[Chunk],
    shared_reads: Sequence[SharedRead],
    window: int | None,
    dtype: torch.dtype,
    query_heads: int,
    apart: bool = False,
) -> StepReads:
    """Reads of a step's chunks for layers with a sliding window of `window` tokens (None: unlimited).

    A token at position p sees positions p - window + 1 .. p. Masks are additive, in `dtype`: what they hide must be a
    number all the same. `apart`: nothing is hidden but what belongs to the sequence.
    """
    if not chunks:
        return StepReads(None, [])
    ordered = tree_order(chunks, shared_reads)
    flat = np.concatenate([np.arange(chunk.first, chunk.first + chunk.count) for chunk in ordered])
    is_sorted = bool((np.diff(flat) == 1).all()) and flat[0] == 0
    pieces = [*cut_into_pieces(ordered, window, apart)]
    bands = [
        _band(pieces[first:last], window, dtype, apart)
        for first, last in cut_into_bands([piece.size for piece in pieces], query_heads)
    ]
    row_of = first_rows(ordered)
    for read in sorted(shared_reads, key=lambda read: read.start):
        _add_node_read(bands, read, row_of, window, dtype)
    mixed = any(_is_mixed(band.band) for band in bands)
    return StepReads(None if is_sorted else torch.from_numpy(flat), [band.band for band in bands], mixed)


# ---- bands


@dataclass
class _PlannedBand:
    """A band, and what is needed to add node reads to it."""

    band: Band
    base: int  # absolute position of column own_width
    end: int  # and after the last column: some row sees each position in between, no row another one above
    positions: NDArray[np.int64]  # [rows]


def _band(pieces: Sequence[Piece], window: int | None, dtype: torch.dtype, apart: bool) -> _PlannedBand:
    first, last = pieces[0].first, pieces[-1].last
    single = [piece for piece in pieces if piece.size.rows == 1]
    runs = [*own_runs(single, window, dtype, apart)]
    tiles = [own_tile(piece, window, dtype) for piece in pieces if piece.size.rows > 1]
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


def _is_mixed(band: Band) -> bool:
    """See StepReads. Gathered runs repeat slots of their own row."""
    return any(run.slots is None and run.mask is not None for run in band.runs) or any(
        tile.slots is not None for tile in band.tiles
    )


def _fill(band: Band, first: int, last: int, begin: int, end: int) -> None:
    """Marks columns begin..end of some rows; neighbours with the same columns become one fill."""
    if begin >= end:
        return
    columns = slice(begin, end)
    if band.fills and band.fills[-1].last == first and band.fills[-1].columns == columns:
        first = band.fills.pop().first
    band.fills.append(Fill(first, last, columns))


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
        mask = additive_mask(torch.from_numpy(hidden), dtype) if hidden.any() else None
    column = band.own_width + begin - planned.base
    offset = read.extent.offset + begin - read.start
    band.nodes.append(NodeRead(first, last, column, offset, end - begin, mask))
