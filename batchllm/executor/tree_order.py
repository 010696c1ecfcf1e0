"""The order of a step's tokens in which the readers of a shared node stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from batchllm.executor.step import Chunk, SharedRead


def tree_order(chunks: Sequence[Chunk], shared_reads: Sequence[SharedRead]) -> list[Chunk]:
    """Decode tokens first, then prompts; readers of one node side by side, and neighbours in the pool too."""
    path: dict[int, list[int]] = {chunk.first: [] for chunk in chunks}
    for number, read in enumerate(sorted(shared_reads, key=lambda read: read.start)):
        for chunk in read.chunks:
            path[chunk.first].append(number)

    def key(chunk: Chunk) -> tuple[bool, list[int], int, int]:
        single = chunk.count == 1
        # Single tokens whose stretches are equally large can be read as one view of the pool.
        capacity = chunk.extent.capacity if single else 0
        return not single, path[chunk.first], capacity, chunk.extent.offset

    return sorted(chunks, key=key)


def first_rows(ordered: Sequence[Chunk]) -> dict[int, int]:
    """By a chunk's first token, the row it has when chunks are put in this order."""
    rows = accumulate((chunk.count for chunk in ordered), initial=0)
    return {chunk.first: row for chunk, row in zip(ordered, rows)}


def row_ranges(chunks: Sequence[Chunk], row_of: Mapping[int, int]) -> list[tuple[int, int]]:
    """The rows of these chunks as ranges; in tree order that is one for decode tokens and one for prompts.

    `row_of`: see `first_rows`.
    """
    ranges: list[tuple[int, int]] = []
    for first, count in sorted((row_of[chunk.first], chunk.count) for chunk in chunks):
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], first + count)
        else:
            ranges.append((first, first + count))
    return ranges
