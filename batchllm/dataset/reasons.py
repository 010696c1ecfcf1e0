"""Why rows failed, counted for the end of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"\d[\d,.]*")


class Reasons:
    """Counts reasons. Those that differ in nothing but numbers are one, and it is shown as it came first."""

    def __init__(self, reasons: Iterable[str] = ()) -> None:
        self._count: Counter[str] = Counter()
        self._shown: dict[str, str] = {}
        for reason in reasons:
            self.add(reason)

    def add(self, reason: str) -> None:
        kind = _NUMBER.sub("0", reason)
        self._count[kind] += 1
        self._shown.setdefault(kind, reason)

    @property
    def total(self) -> int:
        return self._count.total()

    def commonest(self, most: int = 20) -> dict[str, int]:
        """Reason → how many rows, falling."""
        return {self._shown[kind]: count for kind, count in self._count.most_common(most)}
