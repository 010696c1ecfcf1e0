"""Finds the elements of a list column again in what a template made of them.

Each element is marked before the template sees it, with two characters that Unicode keeps for a program's own use.
Afterwards the marks are taken out, and where they stood is where the chunks are. White space at an element's ends
stays outside, so that a template which strips it still does. Without the marks the prompt is the same, character by
character.
"""

from __future__ import annotations

from batchllm.dataset.rows import RowFault

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPED = ("\\ufdd0", "\\uFDD0")

Span = tuple[int, int]


def with_marks(values: object, column: str) -> object:
    """The elements of a list, marked. What is no list stays as it is; a null or marked element is a fault."""
    if not isinstance(values, list):
        return values
    marked: list[object] = []
    for number, value in enumerate(values):
        if value is None:
            return RowFault(f"column `{column}`: element {number} is null")
        text = value if isinstance(value, str) else str(value)
        if _OPEN in text or _CLOSE in text:
            return RowFault(f"column `{column}`: element {number} holds U+FDD0 or U+FDD1, which mark chunks")
        core = text.strip()
        begin = text.find(core) if core else 0
        end = begin + len(core)
        marked.append(f"{text[:begin]}{_OPEN}{core}{_CLOSE}{text[end:]}" if core else text)
    return marked


def without_marks(text: str, column: str) -> tuple[str, tuple[Span, ...]] | RowFault:
    """The text, and the characters of each chunk in it, ascending."""
    if any(escaped in text for escaped in _ESCAPED):
        return _changed(column)
    parts: list[str] = []
    spans: list[Span] = []
    length = 0
    for number, piece in enumerate(text.split(_OPEN)):
        inside, closed, rest = piece.partition(_CLOSE) if number else ("", "", piece)
        if (number and not closed) or _CLOSE in rest:
            return _changed(column)
        if number:
            spans.append((length, length + len(inside)))
        parts += [inside, rest]
        length += len(inside) + len(rest)
    return "".join(parts), tuple(spans)


def _changed(column: str) -> RowFault:
    return RowFault(
        f"the template changes the elements of `{column}` (it cuts or escapes them), so they cannot be found "
        "in the prompt; show them as they are"
    )
