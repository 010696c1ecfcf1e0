"""Quantities over the steps of a simulated run: what has been decided about the future, and what the past came to.

A quantity changes at the steps where something starts or ends, so a change is written down there, once, and levels are
sums of changes. Only a window of steps is in memory: what is over is turned into StepLoads, alike steps into one entry.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from batchllm.planner.loads import FloatArray, StepLoads, join_loads

_WINDOW = 1 << 14  # steps in memory at first
_FLUSH = 1 << 12  # steps that are turned into loads together


class Level(IntEnum):
    """What has a value in every step, and changes now and then."""

    DECODING = 0  # sequences that feed a decoded token
    RUNNING = 1
    RESERVED = 2  # KV slots taken by what runs, those for tokens to come included
    CEILING = 3  # KV tokens that those running hold when all are at their longest
    KEPT = 4  # KV slots kept only to be copied from
    OWN_READ = 5  # KV tokens of own stretches read by decoded tokens; `grow` adds one a step
    SHARED_PAIRS = 6  # of decoded tokens
    SHARED_READS = 7
    SHARED_READ = 8


class Event(IntEnum):
    """What happens in one step: prompt tokens."""

    PROMPT = 0
    LOGITS = 1
    CHUNKS = 2
    OWN_PAIRS = 3
    OWN_READ = 4
    SHARED_PAIRS = 5
    COPIED = 6


_CURRENT = 4  # the first levels are kept summed up to `now`


class Timeline:
    """Steps are absolute. What is written must lie between the last `forget` and the last step `reserve`d."""

    def __init__(self) -> None:
        self.now = 0
        self.last = -1  # last step in which anything is there
        self.current = np.zeros(_CURRENT)  # the first levels, at `now`
        self.peak = 0  # KV slots taken, in the steps forgotten
        self._base = 0
        self._change = np.zeros((len(Level), _WINDOW))
        self._event = np.zeros((len(Event), _WINDOW))
        self._growth = np.zeros(_WINDOW)
        self._fixed = np.zeros(_WINDOW)  # see `foreseen`
        self._carried = np.zeros(len(Level))
        self._carried_rate = 0.0
        self._carried_growth = 0.0
        self._done: list[StepLoads] = []

    # ---- writing

    def change(self, level: Level, step: int, amount: float) -> None:
        """From `step` on."""
        self._change[level, step - self._base] += amount
        if level < _CURRENT and step <= self.now:
            self.current[level] += amount

    def grow(self, first: int, after: int) -> None:
        """OWN_READ grows by one in every step from `first` to `after` - 1. Take it back with `change`."""
        self._growth[first - self._base] += 1
        self._growth[after - self._base] -= 1

    def event(self, event: Event, step: int, amount: float) -> None:
        self._event[event, step - self._base] += amount

    def foresee(self, first: int, after: int, tokens: float, growing: bool = False) -> None:
        """KV tokens that will be held in steps `first` .. `after` - 1, one more each step if `growing`."""
        low, high = first - self._base, after - self._base
        self._fixed[low:high] += tokens
        if growing:
            self._fixed[low:high] += np.arange(high - low)

    def reserve(self, last: int) -> None:
        """Makes room for changes up to a step after `last`."""
        self.last = max(self.last, last)
        if last + 3 - self._base > len(self._growth):
            self._widen(last + 3 - self._base)

    # ---- reading

    def foreseen(self, first: int, after: int) -> FloatArray:
        """KV tokens held in steps `first` .. `after` - 1 by what has been foreseen. A copy."""
        held = np.zeros(after - first)
        known = self._fixed[first - self._base : after - self._base]
        held[: len(known)] = known
        return held

    def first_below(self, level: Level, limit: float) -> int:
        """The first step from now on in which the level, one of the first four, is at most `limit`; or the end."""
        if self.current[level] <= limit:
            return self.now
        low = self.now + 1 - self._base
        ahead = self.current[level] + np.cumsum(self._change[level, low : self.last + 2 - self._base])
        ahead[-1] = limit
        return self.now + 1 + int((ahead <= limit).argmax())

    def advance(self, step: int) -> None:
        self.reserve(step)
        low, high = self.now + 1 - self._base, step + 1 - self._base
        if high - low == 1:
            self.current += self._change[:_CURRENT, low]
        else:
            self.current += self._change[:_CURRENT, low:high].sum(axis=1)
        self.now = step

    def forget(self, force: bool = False) -> None:
        """Turns the steps before `now` into loads, when they have become many."""
        if self.now - self._base >= _FLUSH or (force and self.now > self._base):
            self._flush(self.now - self._base)

    def finish(self) -> StepLoads:
        """The loads of all steps."""
        self.now = max(self.now, self.last + 1)
        self.reserve(self.now)
        self.forget(force=True)
        return join_loads(self._done)

    # ---- memory

    def _widen(self, needed: int) -> None:
        width = len(self._growth)
        while width < needed:
            width *= 2
        more = width - len(self._growth)
        self._change = np.pad(self._change, ((0, 0), (0, more)))
        self._event = np.pad(self._event, ((0, 0), (0, more)))
        self._growth = np.pad(self._growth, (0, more))
        self._fixed = np.pad(self._fixed, (0, more))

    def _flush(self, steps: int) -> None:
        levels = self._carried[:, None] + np.cumsum(self._change[:, :steps], axis=1)
        rate = self._carried_rate + np.cumsum(self._growth[:steps])
        grown = self._carried_growth + np.cumsum(rate)
        self._carried, self._carried_rate, self._carried_growth = levels[:, -1].copy(), rate[-1], grown[-1]
        levels[Level.OWN_READ] += grown
        self.peak = max(self.peak, int((levels[Level.RESERVED] + levels[Level.KEPT]).max()))
        self._done.append(_loads(levels, self._event[:, :steps]))
        for array in (self._change, self._event, self._growth, self._fixed):
            array[..., :-steps] = array[..., steps:]
            array[..., -steps:] = 0
        self._base += steps


def _loads(levels: NDArray[np.float64], events: NDArray[np.float64]) -> StepLoads:
    """One entry for each run of steps without events in which the same sequences decode and the same nodes are read.

    Steps in which nothing runs are left out: they are no steps.
    """
    runs = levels[Level.RUNNING] > 0
    levels, events = levels[:, runs], events[:, runs]
    kind = levels[[Level.DECODING, Level.SHARED_PAIRS, Level.SHARED_READS, Level.SHARED_READ]]
    first = np.arange(levels.shape[1]) == 0
    first[1:] |= (kind[:, 1:] != kind[:, :-1]).any(axis=0)
    eventful = np.asarray(events.any(axis=0))
    first |= eventful
    first[1:] |= eventful[:-1]
    begin = np.flatnonzero(first)
    if len(begin) == 0:
        return join_loads([])
    steps = np.diff(begin, append=levels.shape[1]).astype(np.float64)
    level = np.add.reduceat(levels, begin, axis=1) / steps
    event = np.add.reduceat(events, begin, axis=1) / steps
    decoding = level[Level.DECODING]
    return StepLoads(
        steps=steps,
        prompt_tokens=event[Event.PROMPT],
        decode_tokens=decoding,
        logit_rows=decoding + event[Event.LOGITS],
        chunks=decoding + event[Event.CHUNKS],
        own_pairs=level[Level.OWN_READ] + event[Event.OWN_PAIRS],
        own_kv_read=level[Level.OWN_READ] + event[Event.OWN_READ],
        shared_reads=level[Level.SHARED_READS],
        shared_pairs=level[Level.SHARED_PAIRS] + event[Event.SHARED_PAIRS],
        shared_kv_read=level[Level.SHARED_READ],
        copied_tokens=event[Event.COPIED],
    )
