"""Work tiles of one step: which rows read which pages, in which order, and how their parts are put together.

A step is a set of stretches of KV (a shared node, a sequence's own tokens), each on a list of pages and each read by
some rows. The plan cuts this into work tiles = rows x pages. The kernel that runs a tile knows nothing about trees,
decoding or prompts. Every (row, position it sees) is in exactly one tile; a row in several tiles gets as many parts,
which a second kernel merges. The tile is FlashInfer's unit of work (Ye et al. 2025, arXiv 2501.01005); all levels of
a tree in one launch follow FastTree (Pan et al. 2025) and BatchLLM (Zheng et al. 2025).

NumPy only, no loop over rows, tiles or pages. One plan serves every layer with the same sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SMALL, LARGE = 0, 1
TILE_COLUMNS = 8  # first row, rows, first entry, first masked entry, end of entries, kind, cost, spare
_TILE_COST = 32  # what starting a tile costs, in tokens of KV read
_LARGE_COST = 2  # a large tile computes, a small one waits for memory


@dataclass(frozen=True)
class KvReads:
    """What the rows of a step read. Readers of two stretches are nested or disjoint, as in a tree.

    A row at position p sees every token at a position up to p, and with a window only the last `window` of those.
    """

    positions: Ints  # [T] absolute position of each row's token
    start: Ints  # [S] absolute position of each stretch's first token
    length: Ints  # [S] tokens it holds; those beyond a reader's position need not be written yet
    page_ptr: (
        Ints  # [S + 1] its pages: pages[page_ptr[s] : page_ptr[s + 1]], ceil(length / page_size) or more
    )
    pages: Ints  # [P]
    row_ptr: Ints  # [S + 1] its readers: rows[row_ptr[s] : row_ptr[s + 1]], each once, at least one
    rows: Ints  # [R]


@dataclass(frozen=True)
class TileShape:
    """Sizes that kernel and plan agree on."""

    page_size: int  # tokens a page, and keys a program reads at once
    small_rows: int  # query rows of a small tile's matrix products
    large_rows: int
    heads_per_row: int  # query heads of one KV head that lie together: they fill small_rows and large_rows
    head_programs: int  # programs a tile is launched with: KV heads, times splits of very large groups

    @property
    def small_tokens(self) -> int:
        return self.small_rows // self.heads_per_row

    @property
    def large_tokens(self) -> int:
        return self.large_rows // self.heads_per_row


@dataclass(frozen=True)
class TilePlan:
    """Arrays the kernels read. Slots of one row are neighbours, so a merge reads one stretch of memory."""

    tiles: NDArray[np.int32]  # [W, TILE_COLUMNS], in launch order
    tile_rows: NDArray[np.int32]  # [N] row of each (tile, row)
    tile_slots: NDArray[
        np.int32
    ]  # [N] where its part goes, or -1: it is the row's only part, written as the result
    entry_pages: NDArray[np.int32]  # [E] page of each (tile, page); a tile's unmasked pages come first
    entry_positions: NDArray[np.int32]  # [E] absolute position of its first token
    entry_fills: NDArray[np.int32]  # [E] tokens of it that may be read
    merge_rows: NDArray[np.int32]  # [M] rows with several parts
    merge_ptr: NDArray[np.int32]  # [M + 1] their slots
    num_slots: int


def plan_tiles(
    reads: KvReads,
    shape: TileShape,
    *,
    window: int | None = None,
    horizon: int = 0,
    resident_programs: int = 264,
    least_split: int = 512,
) -> TilePlan:
    """The tiles of a step.

    horizon: the plan stays valid while every position grows by up to this many; lengths count the tokens that will
      have been written by then.
    resident_programs: programs the device runs at once; a read longer than half of what each of these would get is
      split, if it is also longer than `least_split` tokens.
    """
    stretch_segment, segment_rows, segment_row_ptr = _segments(reads)
    rows = _ordered_rows(reads.positions, segment_rows, segment_row_ptr, window)
    blocks = _row_blocks(np.diff(segment_row_ptr), shape)
    first_row = segment_row_ptr[blocks.segment] + blocks.offset
    lowest, highest = _position_range(reads.positions[rows], first_row, blocks.count)
    pages = _segment_pages(reads, stretch_segment, len(segment_row_ptr) - 1, shape.page_size)
    entries = _entries(pages, blocks.segment, lowest, highest + horizon, shape.page_size, window)
    tiles = _work_tiles(blocks, first_row, entries, shape, resident_programs, least_split)
    tile_rows, tile_first = _expand(rows, tiles[:, 0], tiles[:, 1])
    tiles[:, 0] = tile_first
    tile_slots, merge_rows, merge_ptr = _slots(tile_rows, len(reads.positions))
    return TilePlan(
        tiles=tiles.astype(np.int32),
        tile_rows=tile_rows.astype(np.int32),
        tile_slots=tile_slots.astype(np.int32),
        entry_pages=entries.page.astype(np.int32),
        entry_positions=entries.position.astype(np.int32),
        entry_fills=entries.fill.astype(np.int32),
        merge_rows=merge_rows.astype(np.int32),
        merge_ptr=merge_ptr.astype(np.int32),
        num_slots=int(merge_ptr[-1]),
    )


# ---- segments: stretches with the same readers, read as one


def _segments(reads: KvReads) -> tuple[Ints, Ints, Ints]:
    """Segment of each stretch [S]; rows of all segments, one segment after another; [segments + 1] their bounds.

    Readers are nested or disjoint, so two stretches have the same readers if they have as many and share one.
    """
    counts = np.diff(reads.row_ptr)
    smallest = np.minimum.reduceat(reads.rows, reads.row_ptr[:-1])
    key = smallest * (len(reads.positions) + 1) + counts
    _, chosen, segment = np.unique(key, return_index=True, return_inverse=True)
    rows, first = _expand(reads.rows, reads.row_ptr[chosen], counts[chosen])
    return segment.reshape(-1), rows, np.append(first, len(rows))


def _ordered_rows(positions: Ints, rows: Ints, row_ptr: Ints, window: int | None) -> Ints:
    """Rows of each segment by position, where a window lets rows of a block skip pages together."""
    if window is None:
        return rows
    segment = np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr))
    return rows[np.lexsort((positions[rows], segment))]


@dataclass(frozen=True)
class _Blocks:
    """Rows of one segment that go through the matrix unit together."""

    segment: Ints
    offset: Ints  # of the first row, in its segment
    count: Ints
    kind: Ints


def _row_blocks(segment_sizes: Ints, shape: TileShape) -> _Blocks:
    """Large blocks and a rest; a small block where a rest, or a whole segment, is small enough."""
    large = shape.large_tokens
    block_counts = -(-segment_sizes // large)
    segment = np.repeat(np.arange(len(segment_sizes)), block_counts)
    offset = _ramp(block_counts) * large
    count = np.minimum(segment_sizes[segment] - offset, large)
    return _Blocks(segment, offset, count, np.where(count <= shape.small_tokens, SMALL, LARGE))


def _position_range(positions: Ints, first: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Lowest and highest position of each block. Blocks lie one after another and hold every row."""
    return np.minimum.reduceat(positions, first), np.maximum.reduceat(positions, first)


# ---- entries: the pages of each block


@dataclass(frozen=True)
class _Pages:
    page: Ints
    position: Ints
    fill: Ints
    ptr: Ints  # [segments + 1]


@dataclass(frozen=True)
class _Entries:
    page: Ints
    position: Ints
    fill: Ints
    ptr: Ints  # [blocks + 1]
    unmasked: Ints  # [blocks] how many of a block's entries come first because they need no mask


def _segment_pages(reads: KvReads, segment: Ints, num_segments: int, page_size: int) -> _Pages:
    """Pages of every segment in the order of their positions."""
    order = np.lexsort((reads.start, segment))
    length = reads.length[order]
    counts = -(-length // page_size)
    page, _ = _expand(reads.pages, reads.page_ptr[:-1][order], counts)
    before = _ramp(counts) * page_size
    return _Pages(
        page=page,
        position=np.repeat(reads.start[order], counts) + before,
        fill=np.minimum(np.repeat(length, counts) - before, page_size),
        ptr=_bounds(np.bincount(segment[order], weights=counts, minlength=num_segments).astype(np.int64)),
    )


def _entries(
    pages: _Pages, segment: Ints, lowest: Ints, highest: Ints, page_size: int, window: int | None
) -> _Entries:
    """The pages that some row of each block sees; first those that every row sees whole."""
    counts = np.diff(pages.ptr)[segment]
    index, _ = _expand(np.arange(len(pages.page)), pages.ptr[:-1][segment], counts)
    position, fill = pages.position[index], pages.fill[index]
    last = position + fill - 1
    low, high = np.repeat(lowest, counts), np.repeat(highest, counts)
    seen = position <= high
    whole = (last <= low) & (fill == page_size)
    if window is not None:
        seen &= last > low - window
        whole &= position > high - window
    if not seen.all():
        counts = np.diff(_bounds(seen)[_bounds(counts)])
        index, position, fill, whole = index[seen], position[seen], fill[seen], whole[seen]
    unmasked = np.diff(_bounds(whole)[_bounds(counts)])
    leads = _ramp(counts) < np.repeat(unmasked, counts)
    order = np.empty(len(index), dtype=np.int64)
    order[leads] = np.flatnonzero(whole)
    order[~leads] = np.flatnonzero(~whole)
    return _Entries(pages.page[index[order]], position[order], fill[order], _bounds(counts), unmasked)


# ---- tiles


def _work_tiles(
    blocks: _Blocks,
    first_row: Ints,
    entries: _Entries,
    shape: TileShape,
    resident_programs: int,
    least_split: int,
) -> Ints:
    """[W, TILE_COLUMNS] tiles in launch order: blocks, cut where their pages are many."""
    counts = np.diff(entries.ptr)
    share = int(counts.sum()) * shape.head_programs / (2 * resident_programs)
    most = max(1, least_split // shape.page_size, int(np.ceil(share)))
    pieces = -(-counts // most)
    block = np.repeat(np.arange(len(counts)), pieces)
    piece, of = _ramp(pieces), pieces[block]
    begin = entries.ptr[:-1][block] + counts[block] * piece // of
    end = entries.ptr[:-1][block] + counts[block] * (piece + 1) // of
    tiles = np.zeros((len(block), TILE_COLUMNS), dtype=np.int64)
    tiles[:, 0] = first_row[block]
    tiles[:, 1] = blocks.count[block]
    tiles[:, 2] = begin
    tiles[:, 3] = np.clip((entries.ptr[:-1] + entries.unmasked)[block], begin, end)
    tiles[:, 4] = end
    tiles[:, 5] = blocks.kind[block]
    tiles[:, 6] = _TILE_COST + (end - begin) * shape.page_size * np.where(
        tiles[:, 5] == LARGE, _LARGE_COST, 1
    )
    return tiles[_launch_order(tiles[:, 5], tiles[:, 6])]


def _launch_order(kind: Ints, cost: Ints) -> Ints:
    """Longest first within each kind (Graham's list scheduling); the kinds mixed in proportion.

    Two programs share a multiprocessor: a tile that computes beside one that waits for memory (Kamath et al. 2025,
    POD-Attention). Equal costs keep their order, so the tiles of one node stay neighbours and meet in the cache.
    """
    turn = np.empty(len(kind))
    for one_kind in (SMALL, LARGE):
        members = np.flatnonzero(kind == one_kind)
        members = members[np.argsort(-cost[members], kind="stable")]
        turn[members] = (np.arange(len(members)) + 0.5) / max(1, len(members))
    return np.argsort(turn, kind="stable")


def _slots(tile_rows: Ints, num_rows: int) -> tuple[Ints, Ints, Ints]:
    """Slot of each (tile, row), or -1 where the row is in one tile only; rows to merge and their slots."""
    parts = np.bincount(tile_rows, minlength=num_rows)
    merge_rows = np.flatnonzero(parts > 1)
    slots_before = _bounds(np.where(parts > 1, parts, 0))
    order = np.argsort(tile_rows, kind="stable")
    slots = np.empty(len(tile_rows), dtype=np.int64)
    slots[order] = slots_before[:-1][tile_rows[order]] + _ramp(parts)
    slots[parts[tile_rows] == 1] = -1
    return slots, merge_rows, np.append(slots_before[:-1][merge_rows], slots_before[-1])


# ---- ragged arrays


def _bounds(counts: NDArray[Any]) -> Ints:
    """[n + 1] where each of n neighbours begins, and where the last one ends."""
    bounds = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds


def _ramp(counts: Ints) -> Ints:
    """0 .. count - 1 for every count, one after another."""
    bounds = _bounds(counts)
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)


def _expand(values: Ints, first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """values[first : first + count] of every pair, one after another; and where each begins."""
    bounds = _bounds(counts)
    index = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], counts)
    return values[index], bounds[:-1]
