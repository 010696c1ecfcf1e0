"""One step of work, as the scheduler hands it to the model: flat arrays and what attention has to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = -1  # as a sample's logit row
UNREAD = -2  # the sequence is scored: it ends here, and no token is chosen


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one node that this step computes: a piece of prompt, or one decoded token.

    Owner of the positions: ancestors hold [0, node_start), `extent` holds [node_start, position + count).
    """

    first: int  # index of the first token in the flat batch
    count: int
    position: int  # absolute position of the first token
    node_start: int  # absolute position of the first slot of `extent`
    extent: Any  # a kv_memory.KvExtent, of the kind that the step's attention reads

    @property
    def held_before(self) -> int:
        """Tokens of the extent computed in earlier steps."""
        return self.position - self.node_start


@dataclass(slots=True)
class SharedRead:
    """One shared node read by tokens below it: `chunks` are the readers."""

    extent: Any
    start: int  # absolute position of the first token of the node
    length: int
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(frozen=True)
class StepBatch:
    """Everything one forward pass needs. `T` tokens in one flat sequence, prompt chunks and decode tokens alike."""

    tokens: NDArray[np.int64]  # [T] token ids
    positions: NDArray[np.int64]  # [T] absolute positions
    slots: NDArray[np.int64]  # [T] KV slot that each token's K and V are written to
    copy_from: NDArray[np.int64]  # [C] slots copied after the writes, before attention
    copy_to: NDArray[np.int64]  # [C]
    chunks: list[Chunk]
    shared_reads: list[SharedRead]
    logit_rows: NDArray[np.int64]  # [L] flat indices whose logits are read, ascending
    samples: list[Sample]
    keep_logits: list[tuple[int, int]]  # (node, logit row): sequences that start later may sample from these
    prompt_tokens: int  # of the T tokens, how many are prompt tokens
    decode_tokens: int  # and how many decoded ones that are fed for the first time
    scores: StepScores | None = None  # log-probabilities to read; None: no row of `logit_rows` is for these
    pending: tuple[
        tuple[int, int], ...
    ] = ()  # (flat index, sequence): tokens the host does not know, -1 in `tokens`

    @property
    def only_decodes(self) -> bool:
        """Whether every token is a sequence's newest one, with its logits read, in order, and nothing else happens."""
        return (
            0 < self.decode_tokens == len(self.tokens) == len(self.samples) == len(self.logit_rows)
            and not len(self.copy_to)
            and not self.keep_logits
            and self.scores is None
            and all(sample.logit_row == row for row, sample in enumerate(self.samples))
        )

    def logit_tokens(self) -> tuple[list[Chunk], list[SharedRead]] | None:
        """Chunks and shared reads for the tokens in `logit_rows` alone, numbered 0..L-1; None if these are all.

        Tokens that follow each other in a chunk stay a chunk.
        """
        if len(self.logit_rows) == len(self.tokens):
            return None
        kept: dict[int, list[Chunk]] = {}
        bounds = np.array([(chunk.first, chunk.first + chunk.count) for chunk in self.chunks]).reshape(-1, 2)
        ends = np.searchsorted(self.logit_rows, bounds)
        for chunk, (begin, end) in zip(self.chunks, ends.tolist()):
            if begin < end:
                kept[chunk.first] = list(_stretches(chunk, self.logit_rows[begin:end], begin))
        reads = [
            SharedRead(read.extent, read.start, read.length, readers)
            for read in self.shared_reads
            if (readers := [part for chunk in read.chunks for part in kept.get(chunk.first, ())])
        ]
        return [part for parts in kept.values() for part in parts], reads


def _stretches(chunk: Chunk, rows: NDArray[np.int64], number: int) -> Iterator[Chunk]:
    """The part of a chunk in `rows` (ascending), which are numbered from `number` on."""
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1 if len(rows) > 1 else ()
    for begin, end in pairwise((0, *breaks, len(rows))):
        position = chunk.position + int(rows[begin]) - chunk.first
        yield Chunk(number + int(begin), int(end - begin), position, chunk.node_start, chunk.extent)


@dataclass(frozen=True, slots=True)
class StepScores:
    """Log-probabilities that a step reads: score `score[i]` is that of token `target[i]` in logits `row[i]`."""

    row: NDArray[np.int64]  # [K] rows of the step's logits, ascending
    target: NDArray[np.int64]  # [K] token ids
    score: NDArray[np.int64]  # [K] numbers of planner.score_reads
    sampled: NDArray[np.int64]  # [S] rows of the step's logits that samples count (see Sample.logit_row)


@dataclass(frozen=True, slots=True)
class Sample:
    """One token to draw: for which sequence, from which logits."""

    sequence: int
    logit_row: (
        int  # row of the logits sampled from; KEPT: those kept from an earlier step for `node`; or UNREAD
    )
    node: int
