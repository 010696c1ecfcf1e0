"""What a step reads of KV memory, as few large products: the plan that `attention_plan` makes and attention follows.

Rows are the tokens of the step in tree order, so that the readers of a node are neighbours. Neighbouring rows form
*bands*. A band has one buffer of scores, [rows, width], whose columns are

    0 .. own_width                the row's own stretch (what its own node holds, up to the row itself)
    own_width .. width            the positions above it, node by node, in the order of the sequence

so that one softmax over a band's columns is the softmax over all keys of each row, whatever was read together. Each
cell is written by one read, or filled because the row has nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    mixed: bool = (
        False  # some rows are multiplied with slots that are not their sequence's, or that nobody wrote
    )


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, columns] → [rows, 1, columns]: 0 where seen, -inf where hidden."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
