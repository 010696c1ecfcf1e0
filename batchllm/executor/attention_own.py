"""How pieces read their own stretches of KV: decode tokens in runs, prompt chunks in tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from batchllm.executor.attention_pieces import Piece
from batchllm.executor.attention_reads import Run, Tile, additive_mask

_FEW = 8  # fewer neighbours than this are gathered with others instead of being a call of their own
_GATHERED = 256  # and only stretches up to this length: a copy costs as much as the read


def own_runs(singles: Sequence[Piece], window: int | None, dtype: torch.dtype, apart: bool) -> Iterator[Run]:
    """Decode tokens whose stretches lie at equal distances are one view of the pool, what lies behind shorter stretches
    included; the others, or with `apart` all, are gathered."""
    loose: list[Piece] = []
    for group in _equally_spaced(singles):
        if apart:
            loose += group
        elif len(group) >= _FEW or group[0].size.own > _GATHERED:
            yield from _loose_runs(loose, window, dtype)
            loose = []
            yield from _strided_runs(group, window, dtype)
        else:
            loose += group
    yield from _loose_runs(loose, window, dtype)


def _equally_spaced(singles: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbouring rows whose extents are equally large and lie one after another."""
    groups: list[list[Piece]] = []
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


def _strided_runs(group: Sequence[Piece], window: int | None, dtype: torch.dtype) -> Iterator[Run]:
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


def _loose_runs(loose: Sequence[Piece], window: int | None, dtype: torch.dtype) -> Iterator[Run]:
    for group in _consecutive(loose):
        lengths = torch.tensor([piece.members[0].held + 1 for piece in group]).unsqueeze(1)
        begin, end = _seen_columns(lengths, window)
        offsets = torch.tensor([piece.members[0].chunk.extent.offset for piece in group]).unsqueeze(1)
        slots = offsets + torch.minimum(torch.arange(begin, end), lengths - 1)
        mask = _run_mask(lengths, begin, end, window, dtype)
        yield Run(group[0].first, group[-1].last, end - begin, mask, 0, slots)


def _consecutive(pieces: Sequence[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
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
    return additive_mask(hidden, dtype) if bool(hidden.any()) else None


def own_tile(piece: Piece, window: int | None, dtype: torch.dtype) -> Tile:
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
    mask = additive_mask(torch.from_numpy(hidden[:, mask_from:]), dtype) if mask_from < width else None
    if len(slots) == 1:
        return Tile(piece.first, piece.last, width, mask, mask_from, None, offset=slots[0].start)
    gathered = torch.from_numpy(np.concatenate([np.asarray(seen) for seen in slots]))
    return Tile(piece.first, piece.last, width, mask, mask_from, gathered)
