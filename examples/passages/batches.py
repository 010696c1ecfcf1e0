"""Training rows: a document set with all of its questions, and the masks that keep these apart.

One row is ``prefix | question answer | question answer | ...``. Every question sees the prefix and itself,
and its positions continue from the end of the prefix, so each is exactly a prompt with one question, and the
passages are computed once for all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from generator import DocumentSet, TaskShape, make_document_set
from tokenizer import PAD, answer_text, prefix_text, question_text
from tokenizers import Tokenizer
from torch import Tensor

PREFIX, PADDING = 0, -1  # segment numbers; questions count from 1
LENGTH_MULTIPLE = 32


@dataclass
class Row:
    """One training row. A hint (position, token) says which name the model should have in mind there."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    is_target: list[int]  # 1 where the token itself is to be predicted
    kinds: list[str] = field(default_factory=list)  # of question i + 1
    bridge_hints: list[tuple[int, int]] = field(default_factory=list)
    speaker_hints: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Batch:
    """Rows padded to one length. Hints are flat positions into [batch * length] and the tokens there."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    is_target: Tensor
    visible: Tensor
    bridge_hints: tuple[Tensor, Tensor]
    speaker_hints: tuple[Tensor, Tensor]
    rows: list[Row]


class RowMaker:
    """Turns document sets into rows of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._speaker_tokens = {tokenizer.token_to_id("Ġspeaker")}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def first_token(self, name: str) -> int:
        return self.encode(" " + name)[0]

    def question_row(self, documents: DocumentSet) -> Row:
        """The row of a document set and its questions; targets are the answers."""
        row = self._prefix_row(documents)
        prefix_len = len(row.ids)
        for number, question in enumerate(documents.questions, start=1):
            prompt, answer = (
                self.encode(question_text(question.text)),
                self.encode(answer_text(question.answer)),
            )
            if question.link is not None and question.bridge is not None:
                end = question.text.index(question.link) + len(question.link)
                hint_at = len(row.ids) + len(self.encode("Question: " + question.text[:end])) - 1
                row.bridge_hints.append((hint_at, self.first_token(question.bridge)))
            length = len(prompt) + len(answer)
            row.ids += prompt + answer
            row.positions += range(prefix_len, prefix_len + length)
            row.segments += [number] * length
            row.is_target += [0] * len(prompt) + [1] * len(answer)
            row.kinds.append(question.kind)
        return row

    def restatement_row(self, documents: DocumentSet, rng: random.Random) -> Row:
        """The passages, then their sentences again in another order; targets are the repeated ones."""
        row = self._prefix_row(documents)
        texts = [text.removeprefix("Passage: ") for text in documents.passages]
        sentences = [part.rstrip(".") + "." for text in texts for part in text.split(". ")]
        stated = [
            sentence for sentence in sentences if "spoken by" not in sentence and "speaker" not in sentence
        ]
        rng.shuffle(stated)
        repeated = self.encode(" " + " ".join(stated) + "\n")
        row.positions += range(len(row.ids), len(row.ids) + len(repeated))
        row.ids += repeated
        row.segments += [1] * len(repeated)
        row.is_target += [1] * len(repeated)
        return row

    def _prefix_row(self, documents: DocumentSet) -> Row:
        ids = self.encode(prefix_text(documents.documents))
        row = Row(ids, list(range(len(ids))), [PREFIX] * len(ids), [0] * len(ids))
        start = len(self.encode(prefix_text("").removesuffix("\n")))
        for passage, speaker in zip(documents.passages, documents.speakers):
            length = len(self.encode(passage + "\n"))
            if speaker is not None:
                token = self.first_token(speaker)
                where = [at for at in range(start, start + length) if ids[at] in self._speaker_tokens]
                row.speaker_hints += [(at, token) for at in where]
            start += length
        return row


def collate(rows: list[Row], pad_id: int) -> Batch:
    """Pad rows to one length and build the mask: a token sees the prefix and its own segment so far."""
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    def flat(hints: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        pairs = [(index * length + at, token) for index, row in enumerate(hints) for at, token in row]
        return tuple(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T)

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
        bridge_hints=flat([row.bridge_hints for row in rows]),
        speaker_hints=flat([row.speaker_hints for row in rows]),
        rows=rows,
    )


def fill_batch(make_row: Callable[[], Row], max_tokens: int, pad_id: int) -> Batch:
    """Make rows until another one would take the padded batch over ``max_tokens``; always at least two."""
    rows, longest = [make_row()], 0
    while len(rows) < 2 or (len(rows) + 1) * longest <= max_tokens:
        rows.append(make_row())
        longest = max(len(row.ids) for row in rows)
    return collate(rows, pad_id)


def question_batch(
    maker: RowMaker, rng: random.Random, shape: TaskShape, max_tokens: int, max_per_kind: tuple[int, int, int]
) -> Batch:
    """Training questions; all rows have the same number of passages, so that little is padding."""
    count = rng.randint(*shape.passages)
    same = TaskShape((count, count), shape.sentences, shape.speaker_probability)

    def make_row() -> Row:
        while True:
            documents = make_document_set(rng, same, held_out=False, max_per_kind=max_per_kind)
            if documents.questions:
                return maker.question_row(documents)

    return fill_batch(make_row, max_tokens, maker.encode(PAD)[0])


def restatement_batch(maker: RowMaker, rng: random.Random, shape: TaskShape, max_tokens: int) -> Batch:
    """Training restatements of document sets of 2 to 4 passages."""
    count = rng.randint(2, 4)
    small = TaskShape((count, count), shape.sentences, 0.0)

    def make_row() -> Row:
        return maker.restatement_row(
            make_document_set(rng, small, held_out=False, max_per_kind=(0, 0, 0)), rng
        )

    return fill_batch(make_row, max_tokens, maker.encode(PAD)[0])
