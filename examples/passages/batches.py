"""Training rows: a document set with all of its questions, and the masks that keep these apart.

One row is ``prefix | question answer | question answer | ...``. Every question sees the prefix and itself, and
its positions continue from the end of the prefix, so each is exactly a prompt with one question, and the
passages are computed once for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from generator import SPEAKER, DocumentSet, TaskShape, make_document_set
from tokenizer import PAD, answer_text, prefix_text, question_text
from tokenizers import Tokenizer
from torch import Tensor

PREFIX, PADDING = 0, -1  # segment numbers; questions count from 1
LENGTH_MULTIPLE = 32


@dataclass
class Row:
    """One training row."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    is_target: list[int]  # 1 where the token itself is to be predicted
    kinds: list[str] = field(default_factory=list)  # of question i + 1


@dataclass
class Batch:
    """Rows padded to one length; every tensor is [batch, length] but ``visible`` [batch, 1, length, length]."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    is_target: Tensor
    visible: Tensor
    kinds: list[list[str]]  # of each row


class RowMaker:
    """Turns document sets into rows of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pad_id = tokenizer.token_to_id(PAD)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def question_row(self, made: DocumentSet) -> Row:
        """The row of a document set and its questions; targets are the answers."""
        row = self._prefix_row(made)
        prefix_len = len(row.ids)
        for number, question in enumerate(made.questions, start=1):
            prompt = self.encode(question_text(question.text))
            answer = self.encode(answer_text(question.answer))
            length = len(prompt) + len(answer)
            row.ids += prompt + answer
            row.positions += range(prefix_len, prefix_len + length)
            row.segments += [number] * length
            row.is_target += [0] * len(prompt) + [1] * len(answer)
            row.kinds.append(question.kind)
        return row

    def restatement_row(self, made: DocumentSet, rng: random.Random) -> Row:
        """The passages, then their sentences again in another order; targets are the repeated ones."""
        row = self._prefix_row(made)
        stated = [each for sentences in made.sentences for each in sentences if SPEAKER not in each.lower()]
        rng.shuffle(stated)
        repeated = self.encode(" " + " ".join(stated) + "\n")
        row.positions += range(len(row.ids), len(row.ids) + len(repeated))
        row.ids += repeated
        row.segments += [1] * len(repeated)
        row.is_target += [1] * len(repeated)
        return row

    def _prefix_row(self, made: DocumentSet) -> Row:
        ids = self.encode(prefix_text(made.documents))
        return Row(ids, list(range(len(ids))), [PREFIX] * len(ids), [0] * len(ids))


def collate(rows: list[Row], pad_id: int) -> Batch:
    """Pad rows to one length and build the mask: a token sees the prefix and its own segment so far."""
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    segments = padded([row.segments for row in rows], PADDING)
    visible = (segments[:, None, :] == PREFIX) | (segments[:, None, :] == segments[:, :, None])
    visible &= torch.ones(length, length, dtype=torch.bool).tril()
    visible |= torch.eye(length, dtype=torch.bool)
    return Batch(
        ids=padded([row.ids for row in rows], pad_id),
        positions=padded([row.positions for row in rows], 0),
        segments=segments,
        is_target=padded([row.is_target for row in rows], 0),
        visible=visible[:, None],
        kinds=[row.kinds for row in rows],
    )


def fill_batch(make_row: Callable[[], Row], max_tokens: int, pad_id: int) -> Batch:
    """Make rows until another one would take the padded batch over ``max_tokens``; always at least two."""
    rows: list[Row] = []
    longest = 0
    while len(rows) < 2 or (len(rows) + 1) * longest <= max_tokens:
        rows.append(make_row())
        longest = max(len(row.ids) for row in rows)
    return collate(rows, pad_id)


def question_batch(
    maker: RowMaker,
    rng: random.Random,
    shape: TaskShape,
    max_tokens: int,
    max_per_kind: tuple[int, int, int],
) -> Batch:
    """Training questions; all rows have the same number of passages, so that little is padding."""
    count = rng.randint(*shape.passages)
    same = TaskShape((count, count), shape.sentences, shape.speaker_probability)

    def make_row() -> Row:
        while True:
            made = make_document_set(rng, same, held_out=False, max_per_kind=max_per_kind)
            if made.questions:
                return maker.question_row(made)

    return fill_batch(make_row, max_tokens, maker.pad_id)


def restatement_batch(
    maker: RowMaker, rng: random.Random, sentences: tuple[int, int], max_tokens: int
) -> Batch:
    """Training restatements of document sets of 2 to 4 passages without speakers."""
    count = rng.randint(2, 4)
    shape = TaskShape((count, count), sentences, 0.0)

    def make_row() -> Row:
        made = make_document_set(rng, shape, held_out=False, max_per_kind=(0, 0, 0))
        return maker.restatement_row(made, rng)

    return fill_batch(make_row, max_tokens, maker.pad_id)
