"""One step of work, as the scheduler hands it to the model: flat arrays and what attention has to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
    logit_rows: NDArray[np.int64]  # [L] flat indices whose logits are read
    samples: list[Sample]
    keep_logits: list[tuple[int, int]]  # (node, logit row): sequences that start later may sample from these
    prompt_tokens: int  # of the T tokens, how many are prompt tokens
    decode_tokens: int  # and how many decoded ones that are fed for the first time

    def last_tokens(self) -> tuple[list[Chunk], list[SharedRead]] | None:
        """Chunks and shared reads for the tokens in `logit_rows` alone, numbered 0..L-1, if each ends a chunk."""
        row_of = {int(row): number for number, row in enumerate(self.logit_rows)}
        kept: dict[int, Chunk] = {}
        for chunk in self.chunks:
            number = row_of.get(chunk.first + chunk.count - 1)
            if number is not None:
                position = chunk.position + chunk.count - 1
                kept[chunk.first] = Chunk(number, 1, position, chunk.node_start, chunk.extent)
        if len(kept) != len(row_of):
            return None
        reads = [
            SharedRead(read.extent, read.start, read.length, readers)
            for read in self.shared_reads
            if (readers := [kept[chunk.first] for chunk in read.chunks if chunk.first in kept])
        ]
        return list(kept.values()), reads


@dataclass(frozen=True, slots=True)
class Sample:
    """One token to draw: for which sequence, from which logits."""

    sequence: int
    logit_row: int  # row of the step's logits, or -1: logits kept from an earlier step for `node`
    node: int
