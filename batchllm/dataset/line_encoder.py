"""Tokenises every distinct line once, where that gives exactly what the tokenizer gives for the whole text.

Prompts of a job repeat each other: instructions, examples, documents. A tokenizer of SentencePiece's kind (Llama 2,
Phi-3, Mistral ...) merges over the whole text, which is slow and which a cache of words does not help. But if no token
holds a line break together with anything else, then no merge reaches across one, and the tokens of a text are the
tokens of its lines put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

# After a line break, unless white space follows: some special tokens swallow the white space after them.
_CUT = re.compile(r"(?<=\n)(?=\S)")
_BREAKS = ("\n", "<0x0A>")
_CACHED_CHARACTERS = 64_000_000
_PROBES = ("a", "a\nb", " a\n\n b\nc ", "é\n\U0001f600\n\n\nd\n")

_encoders: WeakKeyDictionary[Any, LineEncoder | None] = WeakKeyDictionary()


def line_encoder(tokenizer: Any) -> LineEncoder | None:
    """The one for this transformers tokenizer, or None when lines cannot be told apart. Made once."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = _make(tokenizer)
    return _encoders[tokenizer]


class LineEncoder:
    """Use `line_encoder`: only some tokenizers allow this."""

    def __init__(self, backend: Any, before: Sequence[int], after: Sequence[int]) -> None:
        self._backend = backend
        self._before, self._after = list(before), list(after)  # special tokens around a text
        added = backend.get_added_tokens_decoder().values()
        self._swallowing = tuple(token.content for token in added if token.rstrip)
        self._break: list[int] = backend.encode("\n", add_special_tokens=False).ids
        self._first: dict[str, list[int]] = {}  # a line at the beginning of a text → its tokens
        self._later: dict[str, list[int]] = {}
        self._characters = 0

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Raises what the tokenizer raises."""
        lines = [self._lines(text) for text in texts]
        if self._characters > _CACHED_CHARACTERS:
            self._first, self._later, self._characters = {}, {}, 0
        self._learn(self._first, "", (parts[0] for parts in lines))
        self._learn(self._later, "\n", chain.from_iterable(parts[1:] for parts in lines))
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        first, later = self._first, self._later
        return [
            [*before, *first[parts[0]], *chain.from_iterable([later[line] for line in parts[1:]]), *after]
            for parts in lines
        ]

    def _lines(self, text: str) -> list[str]:
        """A line break that a special token swallows does not end a line."""
        parts = _CUT.split(text)
        if not self._swallowing:
            return parts
        lines = parts[:1]
        for part in parts[1:]:
            if lines[-1].rstrip().endswith(self._swallowing):
                lines[-1] += part
            else:
                lines.append(part)
        return lines

    def _learn(self, known: dict[str, list[int]], lead: str, lines: Iterable[str]) -> None:
        """Tokenises the lines that are new. `lead` stands before each and is taken off again."""
        new = [line for line in set(lines) if line not in known]
        skipped = len(self._break) if lead else 0
        encoded = self._backend.encode_batch_fast([lead + line for line in new], add_special_tokens=False)
        for line, encoding in zip(new, encoded):
            known[line] = encoding.ids[skipped:]
        self._characters += sum(map(len, new))


def _make(tokenizer: Any) -> LineEncoder | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not _lines_are_apart(backend):
        return None
    plain, special = (backend.encode("a", add_special_tokens=wanted).ids for wanted in (False, True))
    at = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), None)
    if at is None:
        return None
    encoder = LineEncoder(backend, special[:at], special[at + len(plain) :])
    for wanted in (False, True):
        usual = tokenizer(list(_PROBES), add_special_tokens=wanted, return_attention_mask=False)["input_ids"]
        if encoder.encode(_PROBES, wanted) != usual:
            return None
    return encoder


def _lines_are_apart(backend: Any) -> bool:
    """Whether the tokens of a text are those of its lines put together, whatever the text."""
    model = json.loads(backend.model.__getstate__()) if _is_bpe(backend) else {}
    if not model.get("byte_fallback") or model.get("dropout") or model.get("continuing_subword_prefix"):
        return False
    if backend.truncation is not None or backend.padding is not None or not _marks_spaces_only(backend):
        return False
    if any(brk in token and token != brk for token in model["vocab"] for brk in _BREAKS):
        return False
    added = backend.get_added_tokens_decoder().values()
    return all(
        not token.lstrip
        and not token.normalized
        and not token.single_word
        and token.content.strip() == token.content
        and not any(brk in token.content for brk in _BREAKS)
        for token in added
    )


def _marks_spaces_only(backend: Any) -> bool:
    """Whether all that happens before the merges is that spaces become `▁` and one is put in front: of the text, or
    of every stretch between special tokens."""
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else None
    splitter = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else None
    if normalizer is None:
        return splitter == {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    return splitter is None and normalizer == {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }


def _is_bpe(backend: Any) -> bool:
    return type(backend.model).__name__ == "BPE" and bool(getattr(backend.model, "byte_fallback", False))
