"""Prompt texts to token ids, in batches that use all cores. One bad text costs its row, not the batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchllm.dataset.prompts import Prompt
from batchllm.dataset.rows import RowFault

# Long prompts go to the tokenizer in smaller batches: ids come back as Python lists, 8 bytes a token and more.
_CALL_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class Tokenized:
    """`ids[i]` of prompt i, empty when it is in `faults`."""

    ids: list[Sequence[int]]
    faults: dict[int, RowFault]


def tokenize(tokenizer: Any, prompts: Sequence[Prompt | RowFault | Sequence[int]]) -> Tokenized:
    """Ids for every prompt that is not a fault already; ids that are given stay as they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids: list[Sequence[int]] = [() if isinstance(prompt, Prompt | RowFault) else prompt for prompt in prompts]
    faults = {row: prompt for row, prompt in enumerate(prompts) if isinstance(prompt, RowFault)}
    for special in (True, False):
        rows = [
            row for row, p in enumerate(prompts) if isinstance(p, Prompt) and p.add_special_tokens is special
        ]
        for call in _calls(rows, prompts):
            texts = [prompts[row].text for row in call]
            for row, result in zip(call, _encode(tokenizer, texts, special)):
                if isinstance(result, RowFault):
                    faults[row] = result
                else:
                    ids[row] = result
    return Tokenized(ids, faults)


def _calls(rows: list[int], prompts: Sequence[Any]) -> Iterator[list[int]]:
    call: list[int] = []
    characters = 0
    for row in rows:
        call.append(row)
        characters += len(prompts[row].text)
        if characters >= _CALL_CHARACTERS:
            yield call
            call, characters = [], 0
    if call:
        yield call


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[Sequence[int] | RowFault]:
    try:
        encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    except Exception as error:  # tokenizers raise what they like, on text with half a surrogate pair for one
        if len(texts) == 1:
            return [
                RowFault(
                    f"the prompt cannot be tokenised: {str(error).splitlines()[0] if str(error) else error!r}"
                )
            ]
        return [_encode(tokenizer, [text], special)[0] for text in texts]
    return [ids or RowFault("the prompt has no tokens") for ids in encoded["input_ids"]]
