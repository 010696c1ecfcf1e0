"""Prompt texts to token ids, in batches that use all cores. One bad text costs its row, not the batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchllm.dataset.chunk_marks import Span
from batchllm.dataset.chunk_spans import chunk_tokens
from batchllm.dataset.line_encoder import line_encoder
from batchllm.dataset.prompts import Prompt
from batchllm.dataset.rows import RowFault
from batchllm.errors import first_line

# Long prompts go to the tokenizer in smaller batches: ids come back as Python lists, 8 bytes a token and more.
_CALL_CHARACTERS = 8_000_000
_NO_TOKENS = RowFault("the prompt has no tokens")


@dataclass(frozen=True)
class Tokenized:
    """`ids[i]` of prompt i, empty when it is in `faults`."""

    ids: list[Sequence[int]]
    faults: dict[int, RowFault]
    chunks: dict[int, list[Span]] = field(
        default_factory=dict
    )  # (begin, end) in tokens, where prompts have any


def tokenize(tokenizer: Any, prompts: Sequence[Prompt | RowFault | Sequence[int]]) -> Tokenized:
    """Ids for every prompt that is not a fault already; ids that are given stay as they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids: list[Sequence[int]] = [() if isinstance(prompt, Prompt | RowFault) else prompt for prompt in prompts]
    faults = {row: prompt for row, prompt in enumerate(prompts) if isinstance(prompt, RowFault)}
    chunks: dict[int, list[Span]] = {}
    for special in (True, False):
        given = {
            row: prompt
            for row, prompt in enumerate(prompts)
            if isinstance(prompt, Prompt) and prompt.add_special_tokens is special
        }
        texts = {row: prompt.text for row, prompt in given.items()}
        with_chunks = any(prompt.chunks is not None for prompt in given.values())
        for rows in _calls(texts):
            call = [texts[row] for row in rows]
            for row, result in zip(rows, _encode(tokenizer, call, special, with_chunks)):
                if isinstance(result, RowFault):
                    faults[row] = result
                elif isinstance(result, _Placed):
                    ids[row] = result.ids
                    chunks[row] = chunk_tokens(result.offsets, given[row].chunks or ())
                else:
                    ids[row] = result
    return Tokenized(ids, faults, chunks)


@dataclass(frozen=True)
class _Placed:
    """Ids, and the characters that each stands for."""

    ids: Sequence[int]
    offsets: Sequence[Span]


def _calls(texts: Mapping[int, str]) -> Iterator[list[int]]:
    """The rows, divided so that no call gets much more than its share of characters."""
    call: list[int] = []
    characters = 0
    for row, text in texts.items():
        call.append(row)
        characters += len(text)
        if characters >= _CALL_CHARACTERS:
            yield call
            call, characters = [], 0
    if call:
        yield call


def _encode(
    tokenizer: Any, texts: list[str], special: bool, with_places: bool
) -> list[Sequence[int] | _Placed | RowFault]:
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    try:
        if with_places:
            placed = tokenizer(texts, return_offsets_mapping=True, **options)
            pairs = zip(placed["input_ids"], placed["offset_mapping"])
            return [_Placed(ids, offsets) if ids else _NO_TOKENS for ids, offsets in pairs]
        by_line = line_encoder(tokenizer)
        if by_line is not None:
            return [ids or _NO_TOKENS for ids in by_line.encode(texts, special)]
        encoded = tokenizer(texts, **options)
    except Exception as error:  # tokenizers raise what they like, on half a surrogate pair for one
        if len(texts) > 1:
            return [_encode(tokenizer, [text], special, with_places)[0] for text in texts]
        return [RowFault(f"the prompt cannot be tokenised: {first_line(error)}")]
    return [ids or _NO_TOKENS for ids in encoded["input_ids"]]
