"""CSV text to rows of cells. A row that cannot be read is one faulty row in its place.

Own code rather than a library's, because libraries drop such rows, stop at them, or lose count of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

Cell = bytes | None  # None: an empty cell without quotes
NEVER_CLOSED = "has a quote that is never closed"

_MOST_BYTES = 16 << 20  # of a row that goes over several lines
_QUOTED = re.compile(rb'[^"]*+(?:""[^"]*+)*+')  # up to the closing quote or the end of the line
_PLAIN = re.compile(rb"[^,\n]*+")


def split_rows(lines: Iterator[bytes]) -> Iterator[list[Cell] | str]:
    """The cells of each row, or what is wrong with it. Blank lines are no rows.

    A row goes on over several lines while a quoted cell is open. Where the quote is never closed, the first line
    alone is the faulty row and reading goes on with the second.
    """
    while (line := next(lines, None)) is not None:
        if b'"' not in line:
            if text := line.rstrip(b"\r\n"):
                yield [cell or None for cell in text.split(b",")]
            continue
        row, taken, size = _Row(), [line], len(line)
        while not row.feed(taken[-1]) and size < _MOST_BYTES:
            more = next(lines, None)
            if more is None:
                break
            taken.append(more)
            size += len(more)
        if row.is_open:
            lines = chain(taken[1:], lines)
        yield NEVER_CLOSED if row.is_open else row.cells


class _Row:
    """The cells found so far."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self._quoted: list[bytes] | None = None  # pieces of the cell whose quote is open

    @property
    def is_open(self) -> bool:
        return self._quoted is not None

    def feed(self, line: bytes) -> bool:
        """Goes on with the next line. True when the row ends with it."""
        position = 0
        while True:
            if self._quoted is None and line[position : position + 1] == b'"':
                self._quoted = []
                position += 1
            before = b""
            if self._quoted is not None:
                piece = _match(_QUOTED, line, position)
                self._quoted.append(piece)
                position += len(piece) + 1
                if position > len(line):
                    return False
                before = b"".join(self._quoted).replace(b'""', b'"')
            # Text after a closing quote belongs to the cell, as everywhere.
            plain = _match(_PLAIN, line, position)
            position += len(plain)
            at_end = line[position : position + 1] != b","
            text = before + (plain.removesuffix(b"\r") if at_end else plain)
            self.cells.append(None if self._quoted is None and not text else text)
            self._quoted = None
            if at_end:
                return True
            position += 1


def _match(pattern: re.Pattern[bytes], line: bytes, position: int) -> bytes:
    found = pattern.match(line, position)
    return found[0] if found else b""
