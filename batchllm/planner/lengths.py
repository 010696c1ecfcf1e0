"""How many tokens a request will still decode, learned from the ones that finished.

After Tokasaurus' stopping predictor: the last finished lengths are kept, and of them only those count that
are longer than what a request has decoded already. A little of their spread is added to their mean, so that
memory planned with these estimates is rarely exceeded.

What is known is weighed in three steps, each trusted the more the more lengths stand behind it: `max_tokens`, the
lengths seen with sampling parameters of the same kind (`length_kinds`), and of those the lengths seen in the same group
(`length_groups`). However many sets of parameters and groups a job has, memory is bounded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, SamplingParams
from batchllm.planner.length_errors import LengthErrors
from batchllm.planner.length_groups import NO_GROUP
from batchllm.planner.length_kinds import MOST_KINDS, length_kinds

KEPT_LENGTHS = 2048  # the most recent finished ones, per kind of parameters
KEPT_IN_GROUP = 256  # the same, per kind and group
MOST_IN_GROUPS = 4096  # pairs of kind and group that are learned; in others that come later only the kind is
SPREAD = 0.25  # standard deviations added to the mean
TRUSTED_LENGTHS = 16  # as many observations weigh as much as the assumption that max_tokens is reached
TRUSTED_IN_GROUP = 4  # as many of a group weigh as much as those of all: groups differ more than their rows
UNLIMITED_GUESS = 512  # the least that an output without a limit of its own is expected to come to

IntLike = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float64]


class LengthEstimator:
    """Not thread-safe. `group` is an array of numbers, NO_GROUP where there is none, or None.

    `params`: the sets that a params index stands for; without them each index is of a kind of its own. `errors`: of
    what was expected of each sequence that finished, just before it was learned from. `unlimited`: the parameter sets
    whose max_tokens is all that the model reads, which says nothing about how long outputs will be.
    """

    def __init__(
        self,
        errors: LengthErrors | None = None,
        params: Sequence[SamplingParams] = (),
        unlimited: Collection[int] = (),
    ) -> None:
        self._unlimited = np.array(sorted(unlimited), dtype=np.int64)
        self._seen: dict[int, _RecentLengths] = {}  # by kind
        self._in_group: dict[int, _RecentLengths] = {}  # by kind and group
        self._kind_of = length_kinds(params)
        self.errors = LengthErrors() if errors is None else errors

    def kinds(self, params_index: IntLike | int) -> IntArray:
        """The kind of each set of parameters, a number up to MOST_KINDS."""
        index: IntArray = np.asarray(params_index, dtype=np.int64)
        return self._kind_of[index] if len(self._kind_of) else np.minimum(index, MOST_KINDS)

    def observe(self, params_index: int, length: IntLike | int, group: IntLike | None = None) -> None:
        """Sequences with these parameters have come to `length` [n] output tokens in the end, the latest last."""
        lengths = np.atleast_1d(length)
        self.observe_all(np.full(len(lengths), params_index), lengths, group)

    def observe_all(self, params_index: IntLike, length: IntLike, group: IntLike | None = None) -> None:
        """`observe` for sequences [n] of any parameters."""
        kind = self.kinds(params_index)
        for one, mine in _parts(kind):
            self._seen.setdefault(one, _RecentLengths(KEPT_LENGTHS)).extend(length[mine])
        if group is None:
            return
        in_group = np.flatnonzero(np.asarray(group) != NO_GROUP)
        for key, mine in _parts(_key(kind[in_group], np.asarray(group)[in_group])):
            if key in self._in_group or len(self._in_group) < MOST_IN_GROUPS:
                seen = self._in_group.setdefault(key, _RecentLengths(KEPT_IN_GROUP))
                seen.extend(length[in_group[mine]])

    def learn(
        self, params_index: IntLike, length: IntLike, max_tokens: IntLike, group: IntLike | None = None
    ) -> None:
        """`observe` for the sequences [n] that finished in a step, and notes how well they had been foreseen."""
        self.errors.add(self.mean_total(params_index, max_tokens, group), length)
        self.observe_all(params_index, length, group)

    def estimate(
        self, params_index: IntLike, decoded: IntLike, max_tokens: IntLike, group: IntLike | None = None
    ) -> IntArray:
        """Tokens still to be decoded, >= 1, by sequences that have decoded `decoded` so far. Arrays [n].

        Never more than `max_tokens - decoded`, and exactly that as long as no longer output has been seen; but of
        `unlimited` parameters as much again as has been decoded, and UNLIMITED_GUESS at the least.
        """
        done: IntArray = np.asarray(decoded, dtype=np.int64)
        most = np.asarray(max_tokens, dtype=np.float64)
        total = most.copy()
        if len(self._unlimited):
            unlimited = np.isin(params_index, self._unlimited)
            total[unlimited] = np.minimum(most, np.maximum(UNLIMITED_GUESS, 2 * done))[unlimited]
        kind = self.kinds(params_index)
        for seen, mine in _members(self._seen, kind):
            total[mine] = seen.expected_total(done[mine], most[mine], total[mine], TRUSTED_LENGTHS)
        for seen, mine in self._members_of_groups(kind, group):
            total[mine] = seen.expected_total(done[mine], most[mine], total[mine], TRUSTED_IN_GROUP)
        remaining: IntArray = np.maximum(np.ceil(total).astype(np.int64) - done, 1)
        return remaining

    def mean_total(
        self, params_index: IntLike, max_tokens: IntLike, group: IntLike | None = None
    ) -> IntArray:
        """Mean length of the whole output [n] of sequences that have not started, without any caution: `max_tokens`
        for parameters of which nothing has been seen."""
        most = np.asarray(max_tokens, dtype=np.float64)
        total = most.copy()
        kind = self.kinds(params_index)
        for seen, mine in _members(self._seen, kind):
            total[mine] = seen.mean_clipped(most[mine])
        for seen, mine in self._members_of_groups(kind, group):
            trust = seen.count / (seen.count + TRUSTED_IN_GROUP)
            total[mine] = trust * seen.mean_clipped(most[mine]) + (1.0 - trust) * total[mine]
        return np.maximum(np.rint(total), 1).astype(np.int64)

    def quantile(self, params_index: int, share: float) -> int | None:
        """The length that this share of the outputs seen with these parameters do not exceed; None: none seen."""
        seen = self._seen.get(int(self.kinds(params_index)))
        return None if seen is None else seen.quantile(share)

    def _members_of_groups(
        self, kind: IntArray, group: IntLike | None
    ) -> Iterator[tuple[_RecentLengths, IntArray]]:
        if group is not None and self._in_group:
            yield from _members(self._in_group, _key(kind, group))


def _key(kind: IntArray, group: IntLike) -> IntArray:
    """One number for kind and group; none that is learned where there is no group."""
    key: IntArray = (kind << 32) + np.asarray(group, dtype=np.int64)
    return key


def _members(seen: dict[int, _RecentLengths], key: IntArray) -> Iterator[tuple[_RecentLengths, IntArray]]:
    """What has been seen under each key, and which entries have that key."""
    for one, mine in _parts(key) if seen else ():
        if one in seen:
            yield seen[one], mine


def _parts(key: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Each distinct key with the entries that have it, in order."""
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=key[order[:1]] - 1))
    yield from zip(key[order[first]].tolist(), np.split(order, first[1:]))


class _RecentLengths:
    """A ring of the last lengths, and sums over the sorted ring that are rebuilt when it has changed."""

    def __init__(self, kept: int) -> None:
        self._ring = np.zeros(kept, dtype=np.int64)
        self._added = 0
        self._stale = True

    @property
    def count(self) -> int:
        return min(self._added, len(self._ring))

    def extend(self, lengths: IntLike) -> None:
        kept = lengths[-len(self._ring) :]
        self._added += len(lengths)
        self._ring[np.arange(self._added - len(kept), self._added) % len(self._ring)] = kept
        self._stale = True

    def expected_total(
        self, decoded: IntArray, most: FloatArray, otherwise: FloatArray, trusted: int
    ) -> FloatArray:
        """Length of the finished output: a cautious estimate given that it exceeds `decoded`.

        `otherwise` is what would be expected without these lengths, and weighs as much as `trusted` of them.
        """
        if self._stale:
            self._rebuild()
        first = np.searchsorted(self._lengths, decoded, side="right")
        count = len(self._lengths) - first
        divisor = np.maximum(count, 1)
        mean = self._sum_from[first] / divisor
        variance = np.maximum(self._square_sum_from[first] / divisor - mean**2, 0.0)
        expected = np.minimum(mean + SPREAD * np.sqrt(variance), most)
        trust = count / (count + trusted)
        return trust * expected + (1.0 - trust) * otherwise

    def mean_clipped(self, most: FloatArray) -> FloatArray:
        """Mean of the lengths seen, those beyond `most` counted as that."""
        if self._stale:
            self._rebuild()
        within = np.searchsorted(self._lengths, most, side="right")
        count = len(self._lengths)
        mean: FloatArray = (self._sum_from[0] - self._sum_from[within] + (count - within) * most) / count
        return mean

    def quantile(self, share: float) -> int:
        if self._stale:
            self._rebuild()
        return int(self._lengths[int(np.ceil(share * (self.count - 1)))])

    def _rebuild(self) -> None:
        self._lengths = np.sort(self._ring[: self.count])
        as_float = self._lengths.astype(np.float64)
        self._sum_from = _sums_from(as_float)
        self._square_sum_from = _sums_from(as_float**2)
        self._stale = False


def _sums_from(value: FloatArray) -> FloatArray:
    """`[n + 1]`: entry i is the sum of value[i:]."""
    return np.append(np.cumsum(value[::-1])[::-1], 0.0)
