"""Which stretches of KV each token of a step reads, as few large reads. The same for every layer with one window.

Every token has exactly one own read (a run, a padded group or a causal chunk) and one block read for each shared
node above it that it can see, and for what its own node held before a long chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.executor.step import Chunk, SharedRead

_SHORT = 256  # chunks whose own stretch is at most this long are padded and gathered together
_MAX_PADDING = 1.5  # longest own stretch of a padded group over its shortest, roughly
_FEW = 8  # fewer neighbours than this are gathered with others instead of being a call of their own


@dataclass(frozen=True)
class Run:
    """Single tokens, each over its own extent, in one call.

    Extents that lie one after another and are equally large are read through a strided view of the pool; others are
    gathered.
    """

    rows: Tensor  # [r] flat indices
    longest: int  # slots read in each extent
    mask: Tensor | None  # [r, 1, 1, longest]
    offset: int = 0  # slot of the first extent
    stride: int = 0  # slots from one extent to the next
    slots: Tensor | None = None  # [r, longest] to gather instead, any valid one where masked


@dataclass(frozen=True)
class PaddedGroup:
    """Short prompt chunks, each with all its node holds; padded to the longest of the group."""

    rows: Tensor  # [b, n] flat indices, any valid one where padded
    slots: Tensor  # [b, L] pool slots, any valid one where padded
    mask: Tensor  # [b, 1, n, L]
    real: Tensor  # [k] indices into the flattened [b, n] that are tokens
    real_rows: Tensor  # [k] their flat indices


@dataclass(frozen=True)
class BlockRead:
    """Flat rows that read one contiguous stretch of slots."""

    rows: Tensor  # [n]
    offset: int
    length: int
    mask: Tensor | None  # [1, 1, n, length]


@dataclass(frozen=True)
class BlockLevel:
    """Blocks whose readers are all different, so that their results can be merged in one go."""

    rows: Tensor  # [N] the rows of the blocks, one block after another
    blocks: list[BlockRead]


@dataclass(frozen=True)
class StepReads:
    runs: list[Run]
    padded: list[PaddedGroup]
    causal: list[BlockRead]
    levels: list[BlockLevel]


def plan_reads(
    chunks: Sequence[Chunk], shared_reads: Sequence[SharedRead], window: int | None, dtype: torch.dtype
) -> StepReads:
    """Reads of a step's chunks for layers with a sliding window of `window` tokens (None: unlimited).

    A token at position p sees positions p - window + 1 .. p. Masks are additive, in `dtype`.
    """
    single = [chunk for chunk in chunks if chunk.count == 1]
    short = [chunk for chunk in chunks if chunk.count > 1 and _own_length(chunk) <= _SHORT]
    long = [chunk for chunk in chunks if chunk.count > 1 and _own_length(chunk) > _SHORT]
    held = [_held_read(chunk, window, dtype) for chunk in long if chunk.held_before]
    shared = [_node_read(read, window, dtype) for read in shared_reads]
    strided = [group for group in _adjacent(single) if len(group) >= _FEW or _own_length(group[0]) > _SHORT]
    taken = {chunk.first for group in strided for chunk in group}
    scattered = _similar([chunk for chunk in single if chunk.first not in taken])
    return StepReads(
        runs=[
            *(_run(group, window, dtype, gather=False) for group in strided),
            *(_run(group, window, dtype, gather=True) for group in scattered),
        ],
        padded=[_padded_group(group, window, dtype) for group in _similar(short)],
        causal=[_causal_read(chunk, window, dtype) for chunk in long],
        levels=_levels([block for block in (*held, *shared) if block is not None]),
    )


def _own_length(chunk: Chunk) -> int:
    return chunk.held_before + chunk.count


# ---- own stretches


def _adjacent(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Groups single tokens whose extents are neighbours of equal capacity."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.extent.offset):
        last = groups[-1][-1].extent if groups else None
        if last and chunk.extent.capacity == last.capacity and chunk.extent.offset == last.end:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _run(chunks: Sequence[Chunk], window: int | None, dtype: torch.dtype, gather: bool) -> Run:
    lengths = torch.tensor([_own_length(chunk) for chunk in chunks]).unsqueeze(1)
    longest = int(lengths.max())
    slot = torch.arange(longest)
    hidden = slot >= lengths
    if window is not None:
        hidden |= slot < lengths - window
    mask = _additive(hidden, dtype)[:, None, None] if bool(hidden.any()) else None
    rows = torch.tensor([chunk.first for chunk in chunks])
    if gather:
        offsets = torch.tensor([chunk.extent.offset for chunk in chunks]).unsqueeze(1)
        return Run(rows, longest, mask, slots=offsets + torch.minimum(slot, lengths - 1))
    return Run(rows, longest, mask, offset=chunks[0].extent.offset, stride=chunks[0].extent.capacity)


def _similar(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Groups chunks of similar size, so that padding stays small."""
    groups: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: (_own_length(chunk), chunk.count)):
        if groups and _own_length(chunk) <= _MAX_PADDING * _own_length(groups[-1][0]) + 8:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _padded_group(chunks: Sequence[Chunk], window: int | None, dtype: torch.dtype) -> PaddedGroup:
    first = np.array([chunk.first for chunk in chunks])[:, None]
    count = np.array([chunk.count for chunk in chunks])[:, None]
    held = np.array([chunk.held_before for chunk in chunks])[:, None]
    offset = np.array([chunk.extent.offset for chunk in chunks])[:, None]
    query, key = np.arange(count.max())[None], np.arange((held + count).max())[None]
    rows = first + np.minimum(query, count - 1)
    slots = offset + np.minimum(key, held + count - 1)
    # A padded query repeats the last real one, so that every query sees a key.
    seen_to = (held + np.minimum(query, count - 1))[:, :, None]
    hidden = key[:, None] > seen_to
    if window is not None:
        hidden |= key[:, None] <= seen_to - window
    real = np.flatnonzero(query < count)
    return PaddedGroup(
        torch.from_numpy(rows),
        torch.from_numpy(slots),
        _additive(torch.from_numpy(hidden), dtype)[:, None],
        torch.from_numpy(real),
        torch.from_numpy(rows.reshape(-1)[real]),
    )


def _causal_read(chunk: Chunk, window: int | None, dtype: torch.dtype) -> BlockRead:
    """A long chunk over itself; the mask is None when the kernel's own causal mask is enough."""
    rows = torch.arange(chunk.first, chunk.first + chunk.count)
    mask = None
    if window is not None and chunk.count > window:
        distance = torch.arange(chunk.count).unsqueeze(1) - torch.arange(chunk.count)
        mask = _additive((distance < 0) | (distance >= window), dtype)[None, None]
    return BlockRead(rows, chunk.extent.offset + chunk.held_before, chunk.count, mask)


# ---- stretches that lie wholly before their readers


def _held_read(chunk: Chunk, window: int | None, dtype: torch.dtype) -> BlockRead | None:
    rows = np.arange(chunk.first, chunk.first + chunk.count)
    positions = np.arange(chunk.position, chunk.position + chunk.count)
    return _block(rows, positions, chunk.extent.offset, chunk.node_start, chunk.held_before, window, dtype)


def _node_read(read: SharedRead, window: int | None, dtype: torch.dtype) -> BlockRead | None:
    rows = np.concatenate([np.arange(chunk.first, chunk.first + chunk.count) for chunk in read.chunks])
    positions = np.concatenate(
        [np.arange(chunk.position, chunk.position + chunk.count) for chunk in read.chunks]
    )
    return _block(rows, positions, read.extent.offset, read.start, read.length, window, dtype)


def _block(
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    offset: int,
    start: int,
    length: int,
    window: int | None,
    dtype: torch.dtype,
) -> BlockRead | None:
    """The part of [start, start + length) that the rows still see, or None when they see none of it."""
    if window is None:
        return BlockRead(torch.from_numpy(rows), offset, length, None)
    first_seen = positions - (window - 1)
    seeing = first_seen < start + length
    if not seeing.any():
        return None
    rows, first_seen = rows[seeing], first_seen[seeing]
    skipped = max(0, int(first_seen.min()) - start)
    hidden = np.arange(start + skipped, start + length) < first_seen[:, None]
    mask = _additive(torch.from_numpy(hidden), dtype)[None, None] if hidden.any() else None
    return BlockRead(torch.from_numpy(rows), offset + skipped, length - skipped, mask)


def _levels(blocks: Sequence[BlockRead]) -> list[BlockLevel]:
    """Each block goes to the first level after all earlier blocks that share a reader with it."""
    last_row = max((int(block.rows.max()) for block in blocks), default=0)
    level_of_row = np.zeros(last_row + 1, dtype=np.int64)
    levels: list[list[BlockRead]] = []
    for block in blocks:
        rows = block.rows.numpy()
        level = int(level_of_row[rows].max())
        level_of_row[rows] = level + 1
        if level == len(levels):
            levels.append([])
        levels[level].append(block)
    return [BlockLevel(torch.cat([block.rows for block in level]), level) for level in levels]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
