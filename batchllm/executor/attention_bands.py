"""How a step's rows are cut into bands that share one buffer of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Scores of one band over all heads: few enough to stay in a CPU's cache from the product that makes them to the one
# that uses them, many enough to make the products large.
BAND_SCORES = 1_500_000
_WASTE = 1.25  # cells of a band over the cells its rows need
_CHEAP_SCORES = 100_000  # or this many more, over all heads: they cost less than the calls for another band


@dataclass(frozen=True, slots=True)
class PieceSize:
    """Rows that stay together, with how many columns they read: of their own, and above."""

    rows: int
    own: int
    above: int

    @property
    def cells(self) -> int:
        return self.rows * (self.own + self.above)


def cut_into_bands(pieces: Sequence[PieceSize], query_heads: int) -> list[tuple[int, int]]:
    """Neighbouring pieces as ranges of indices. A band is as wide as its widest piece: bands are cut where that
    would waste too much, or the buffer grow too large."""
    largest = BAND_SCORES // query_heads
    cheap = _CHEAP_SCORES // query_heads
    bands: list[tuple[int, int]] = []
    first = rows = own = above = needed = 0
    for index, piece in enumerate(pieces):
        wider = max(own, piece.own) + max(above, piece.above)
        cells, used = (rows + piece.rows) * wider, needed + piece.cells
        if index > first and (cells > largest or cells > max(_WASTE * used, used + cheap)):
            bands.append((first, index))
            first, rows, own, above, needed = index, 0, 0, 0, 0
        rows, needed = rows + piece.rows, needed + piece.cells
        own, above = max(own, piece.own), max(above, piece.above)
    if pieces:
        bands.append((first, len(pieces)))
    return bands
