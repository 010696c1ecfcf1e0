"""How far expected output lengths were from those that came."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class LengthErrors:
    """Sums over sequences; add as many at a time as there are."""

    def __init__(self) -> None:
        self.sequences = 0
        self._expected = self._actual = self._absolute = 0.0

    def add(self, expected: NDArray[np.generic], actual: NDArray[np.generic]) -> None:
        """Output tokens [n] and [n]."""
        came = np.asarray(actual, dtype=np.float64)
        error = np.asarray(expected, dtype=np.float64) - came
        self.sequences += len(came)
        self._expected += float((error + came).sum())
        self._actual += float(came.sum())
        self._absolute += float(np.abs(error).sum())

    def figures(self) -> dict[str, float]:
        """`bias` is expected over actual tokens of all sequences, less 1; `mean_absolute_error` is of a sequence, in
        tokens. Empty when there was none."""
        if not self.sequences:
            return {}
        return {
            "mean_expected": self._expected / self.sequences,
            "mean_absolute_error": self._absolute / self.sequences,
            "bias": self._expected / max(self._actual, 1.0) - 1.0,
        }
