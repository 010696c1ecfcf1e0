"""How many tokens a request will still decode, learned from the ones that finished.

After Tokasaurus' stopping predictor: the last finished lengths are kept, and of them only those count that
are longer than what a request has decoded already. A little of their spread is added to their mean, so that
memory planned with these estimates is rarely exceeded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray

KEPT_LENGTHS = 2048  # the most recent finished ones, per parameter set
SPREAD = 0.25  # standard deviations added to the mean
TRUSTED_LENGTHS = 16  # as many observations weigh as much as the assumption that max_tokens is reached

IntLike = NDArray[np.integer[Any]]


class LengthEstimator:
    """Not thread-safe. One for a whole run; lengths are learned separately for each parameter set."""

    def __init__(self) -> None:
        self._seen: dict[int, _RecentLengths] = {}

    def observe(self, params_index: int, length: int) -> None:
        """A sequence with these parameters has finished after `length` output tokens."""
        self._seen.setdefault(int(params_index), _RecentLengths()).add(length)

    def estimate(self, params_index: IntLike, decoded: IntLike, max_tokens: IntLike) -> IntArray:
        """Tokens still to be decoded, >= 1, by sequences that have decoded `decoded` so far. Arrays [n].

        Never more than `max_tokens - decoded`, and exactly that as long as no longer output has been seen.
        """
        decoded = np.asarray(decoded, dtype=np.int64)
        most = np.asarray(max_tokens, dtype=np.int64)
        total: NDArray[np.float64] = most.astype(np.float64)
        for params in np.unique(params_index).tolist():
            seen = self._seen.get(params)
            if seen is not None:
                mine = np.asarray(params_index) == params
                total[mine] = seen.expected_total(decoded[mine], most[mine])
        remaining: IntArray = np.maximum(np.ceil(total).astype(np.int64) - decoded, 1)
        return remaining

    def mean_total(self, params_index: IntLike, max_tokens: IntLike) -> IntArray:
        """Mean length of the whole output [n] of sequences that have not started, without any caution: `max_tokens`
        for parameters of which nothing has been seen."""
        most = np.asarray(max_tokens, dtype=np.float64)
        total = most.copy()
        for params in np.unique(params_index).tolist():
            seen = self._seen.get(params)
            if seen is not None:
                mine = np.asarray(params_index) == params
                total[mine] = seen.mean_clipped(most[mine])
        return np.maximum(np.rint(total), 1).astype(np.int64)

    def quantile(self, params_index: int, share: float) -> int | None:
        """The length that this share of the outputs seen with these parameters do not exceed; None: none seen."""
        seen = self._seen.get(params_index)
        return None if seen is None else seen.quantile(share)


class _RecentLengths:
    """A ring of the last lengths, and sums over the sorted ring that are rebuilt when it has changed."""

    def __init__(self) -> None:
        self._ring = np.zeros(KEPT_LENGTHS, dtype=np.int64)
        self._added = 0
        self._stale = True

    def add(self, length: int) -> None:
        self._ring[self._added % KEPT_LENGTHS] = length
        self._added += 1
        self._stale = True

    def expected_total(self, decoded: IntArray, max_tokens: IntArray) -> NDArray[np.float64]:
        """Length of the finished output: a cautious estimate given that it exceeds `decoded`."""
        if self._stale:
            self._rebuild()
        first = np.searchsorted(self._lengths, decoded, side="right")
        count = len(self._lengths) - first
        divisor = np.maximum(count, 1)
        mean = self._sum_from[first] / divisor
        variance = np.maximum(self._square_sum_from[first] / divisor - mean**2, 0.0)
        expected = np.minimum(mean + SPREAD * np.sqrt(variance), max_tokens)
        trust = count / (count + TRUSTED_LENGTHS)
        return trust * expected + (1.0 - trust) * max_tokens

    def mean_clipped(self, most: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of the lengths seen, those beyond `most` counted as that."""
        if self._stale:
            self._rebuild()
        within = np.searchsorted(self._lengths, most, side="right")
        count = len(self._lengths)
        mean: NDArray[np.float64] = (
            self._sum_from[0] - self._sum_from[within] + (count - within) * most
        ) / count
        return mean

    def quantile(self, share: float) -> int:
        return int(np.quantile(self._ring[: min(self._added, KEPT_LENGTHS)], share, method="higher"))

    def _rebuild(self) -> None:
        self._lengths = np.sort(self._ring[: min(self._added, KEPT_LENGTHS)])
        as_float = self._lengths.astype(np.float64)
        self._sum_from = _sums_from(as_float)
        self._square_sum_from = _sums_from(as_float**2)
        self._stale = False


def _sums_from(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[n + 1]`: entry i is the sum of value[i:]."""
    return np.append(np.cumsum(value[::-1])[::-1], 0.0)
