"""What the rows of a step read, as tiles of rows with segments of KV: the form that the CPU kernel takes.

Rows are put in tree order, so that the readers of a shared node are neighbours and meet in one tile, where the node's
KV is loaded once for all of them. What a row sees of a segment follows from positions, so nothing here depends on a
layer's sliding window: one plan serves every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from batchllm_kernels.cpu.attention import TiledReads
from numpy.typing import NDArray

from batchllm.executor.step import Chunk, SharedRead
from batchllm.executor.tree_order import first_rows, row_ranges, tree_order

_QUERIES = 256  # most queries of a tile and KV head: enough to make packing a block of keys cheap
_NARROW = 32  # as in attention.c: keys that no more queries read come from memory for all heads at once
_TILES = 4  # for each thread, where keys are mostly read by few

Read = tuple[int, int, int, int, int]  # first row, last row, first slot, position of that slot, length


def plan_tiles(
    chunks: Sequence[Chunk], shared_reads: Sequence[SharedRead], group: int, threads: int
) -> TiledReads:
    """`group`: query heads that share a KV head. Tiles with most work come first."""
    if not chunks:
        none = np.zeros(0, dtype=np.int64)
        return TiledReads(none, none, np.zeros(1, np.int64), np.zeros(1, np.int64), none.reshape(0, 5))
    ordered = tree_order(chunks, shared_reads)
    count = np.array([chunk.count for chunk in ordered])
    first = np.cumsum(count) - count  # row of each chunk's first token
    within = np.arange(count.sum()) - np.repeat(first, count)
    token = np.repeat([chunk.first for chunk in ordered], count) + within
    position = np.repeat([chunk.position for chunk in ordered], count) + within
    row_of = first_rows(ordered)
    reads = _joined([_own(chunk, row_of[chunk.first]) for chunk in ordered])
    for read in shared_reads:
        reads += [
            (*rows, read.extent.offset, read.start, read.length) for rows in row_ranges(read.chunks, row_of)
        ]
    table = np.array(reads, dtype=np.int64)
    return _cut(table, token, position, _tile_bounds(count, _tile_rows(table, group, threads)))


def _tile_rows(reads: NDArray[np.int64], group: int, threads: int) -> int:
    """Most rows of a tile. Rows that share little gain nothing from each other: they make small tiles, of which every
    thread gets some with all heads."""
    rows = int((reads[:, 1]).max())
    is_narrow = (reads[:, 1] - reads[:, 0]) * group <= _NARROW
    most = max(1, _QUERIES // group)
    if reads[is_narrow, 4].sum() < reads[~is_narrow, 4].sum():
        return most
    return min(most, -(-rows // (_TILES * threads)))


def _own(chunk: Chunk, row: int) -> Read:
    return row, row + chunk.count, chunk.extent.offset, chunk.node_start, chunk.held_before + chunk.count


def _joined(reads: list[Read]) -> list[Read]:
    """Neighbouring rows that read one stretch read it once, up to where the last of them needs it: a node of which
    scattered tokens are computed (see stored_kv) has many short chunks, and positions say what each row sees."""
    found: list[Read] = []
    for read in reads:
        if found and found[-1][1:3] == read[:1] + read[2:3]:
            first, _, slot, start, length = found[-1]
            found[-1] = (first, read[1], slot, start, max(length, read[4]))
        else:
            found.append(read)
    return found


def _tile_bounds(count: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Tiles of at most `rows` rows: long chunks are cut, short ones are put together."""
    bounds = [0]
    end = 0
    for size in count.tolist():
        if size > rows or end + size - bounds[-1] > rows:
            if end > bounds[-1]:
                bounds.append(end)
            bounds += range(end + rows, end + size, rows)
        end += size
    return np.array([*bounds, end], dtype=np.int64)


def _cut(
    reads: NDArray[np.int64],
    token: NDArray[np.int64],
    position: NDArray[np.int64],
    tile_first: NDArray[np.int64],
) -> TiledReads:
    """Divides reads [n, 5] at the bounds of tiles, and puts tiles in order of falling work."""
    first_tile = np.searchsorted(tile_first, reads[:, 0], side="right") - 1
    last_tile = np.searchsorted(tile_first, reads[:, 1], side="left") - 1
    tiles = last_tile - first_tile + 1
    segments = np.repeat(reads, tiles, axis=0)
    tile = np.repeat(first_tile, tiles) + np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    segments[:, 0] = np.maximum(segments[:, 0], tile_first[tile])
    segments[:, 1] = np.minimum(segments[:, 1], tile_first[tile + 1])
    work = np.zeros(len(tile_first) - 1)
    np.add.at(work, tile, (segments[:, 1] - segments[:, 0]) * segments[:, 4])
    return _in_order(segments, tile, token, position, tile_first, np.argsort(-work, kind="stable"))


def _in_order(
    segments: NDArray[np.int64],
    tile: NDArray[np.int64],
    token: NDArray[np.int64],
    position: NDArray[np.int64],
    tile_first: NDArray[np.int64],
    order: NDArray[np.int64],
) -> TiledReads:
    """Renumbers tiles, and with them rows and segments, so that tile order[0] is the first."""
    size = np.diff(tile_first)
    new_first = np.concatenate(([0], np.cumsum(size[order])))
    moved = np.empty_like(size)  # [tiles] how far the rows of each tile move
    moved[order] = new_first[:-1] - tile_first[:-1][order]
    rows = np.arange(len(token)) - np.repeat(moved[order], size[order])  # old row of each new one
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # Of one tile, stretches with many rows first and in the order of positions.
    by_tile = np.lexsort((segments[:, 3], rank[tile]))
    shifted = segments[by_tile]
    shifted[:, :2] += moved[tile[by_tile]][:, None]
    counts = np.bincount(rank[tile], minlength=len(size))
    return TiledReads(
        np.ascontiguousarray(token[rows]),
        np.ascontiguousarray(position[rows]),
        new_first,
        np.concatenate(([0], np.cumsum(counts))),
        np.ascontiguousarray(shifted),
    )
