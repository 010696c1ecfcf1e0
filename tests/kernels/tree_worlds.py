"""Random prefix trees on scattered pages, what a step's rows read of them, and dense attention as the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from batchllm_kernels.tile_plan import Ints, KvReads
from torch import Tensor


@dataclass
class Stretch:
    """KV of one node: positions start .. start + length - 1, on `pages`."""

    start: int
    length: int
    pages: Ints
    above: list[Stretch]
    computed: int = 0  # tokens that are there before the step


@dataclass
class TreeWorld:
    reads: KvReads
    path_of_row: list[list[Stretch]]  # stretches that a row may see, root first, its own last
    page_size: int
    num_pages: int

    def place(self, row: int, position: int) -> tuple[int, int]:
        """Page and index in it of the key that a row sees at a position."""
        for stretch in self.path_of_row[row]:
            if stretch.start <= position < stretch.start + stretch.length:
                index = position - stretch.start
                return int(stretch.pages[index // self.page_size]), index % self.page_size
        raise AssertionError("no node of the row's path holds the position")

    def written(self) -> Tensor:
        """[pages, page_size] whether a slot holds a token that some row may see."""
        there = torch.zeros(self.num_pages, self.page_size, dtype=torch.bool)
        for row, position in enumerate(self.reads.positions):
            for seen in range(int(position) + 1):
                there[self.place(row, seen)] = True
        return there


def make_world(
    random: np.random.Generator,
    page_size: int,
    *,
    num_nodes: int = 8,
    longest: int = 60,
    spare: int = 0,
    decode_only: bool = False,
) -> TreeWorld:
    """Trees up to four deep. Inner nodes are mostly there already, leaves decode or are computed in part or whole.

    spare: slots that own stretches have beyond what is written, as decoding ahead needs them.
    """
    stretches: list[Stretch] = []
    for _ in range(num_nodes):
        choices = [stretch for stretch in stretches if len(stretch.above) < 3]
        parent = choices[random.integers(len(choices))] if choices and random.random() < 0.85 else None
        above = [*parent.above, parent] if parent else []
        start = above[-1].start + above[-1].length if above else 0
        stretches.append(Stretch(start, int(random.integers(1, longest + 1)), np.zeros(0), above))
    inner = {id(above) for stretch in stretches for above in stretch.above}
    page_counts = [-(-(stretch.length + spare) // page_size) for stretch in stretches]
    shuffled = random.permutation(sum(page_counts))
    for stretch, first, count in zip(stretches, np.cumsum([0, *page_counts]), page_counts):
        stretch.pages = shuffled[first : first + count]
        whole = decode_only or random.random() < 0.7
        if id(stretch) in inner:
            stretch.computed = stretch.length if whole else int(random.integers(0, stretch.length))
        else:
            stretch.computed = stretch.length - 1 if whole else int(random.integers(0, stretch.length))
        if any(above.computed < above.length for above in stretch.above):
            stretch.computed = 0  # what is above is computed in this very step
    return TreeWorld(*_reads(stretches, spare), page_size, len(shuffled))


def _reads(stretches: list[Stretch], spare: int) -> tuple[KvReads, list[list[Stretch]]]:
    positions: list[int] = []
    paths: list[list[Stretch]] = []
    own_rows: dict[int, list[int]] = {}
    rows_below: dict[int, list[int]] = {}
    for stretch in stretches:
        for index in range(stretch.computed, stretch.length):
            own_rows.setdefault(id(stretch), []).append(len(positions))
            for above in stretch.above:
                rows_below.setdefault(id(above), []).append(len(positions))
            positions.append(stretch.start + index)
            paths.append([*stretch.above, stretch])
    starts, lengths, pages, rows = [], [], [], []
    for stretch in stretches:
        for readers, length in (
            (rows_below.get(id(stretch)), stretch.length),
            (own_rows.get(id(stretch)), stretch.length + spare),
        ):
            if readers:
                starts.append(stretch.start)
                lengths.append(length)
                pages.append(stretch.pages)
                rows.append(np.array(readers))
    reads = KvReads(
        positions=np.array(positions),
        start=np.array(starts),
        length=np.array(lengths),
        page_ptr=np.cumsum([0, *map(len, pages)]),
        pages=np.concatenate(pages),
        row_ptr=np.cumsum([0, *map(len, rows)]),
        rows=np.concatenate(rows),
    )
    return reads, paths


def dense_attention(
    world: TreeWorld,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each row over all positions it sees, in float64: query [T, Hq, Dk], pools [pages, Hkv, page_size, D] →
    [T, Hq, Dv]."""
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    output = torch.zeros(rows, heads, values.shape[-1], dtype=torch.float64)
    for row in range(rows):
        position = int(world.reads.positions[row])
        first = 0 if window is None else max(0, position - window + 1)
        places = torch.tensor([world.place(row, seen) for seen in range(first, position + 1)])
        key = keys[places[:, 0], :, places[:, 1]].double()
        value = values[places[:, 0], :, places[:, 1]].double()
        grouped = query[row].double().view(kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("hgd,lhd->hgl", grouped, key) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if sinks is not None:
            sink = sinks.double().view(kv_heads, -1, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        output[row] = torch.einsum("hgl,lhd->hgd", weights, value).reshape(heads, -1)
    return output
