"""In a simulated run: in which steps shared nodes are read, however many sequences below them read along."""

from __future__ import annotations

from collections.abc import Sequence

from batchllm.planner.timeline import Level, Timeline


class SharedReads:
    """`length` [nodes]: tokens of each. A node is read in one stretch of steps after another."""

    def __init__(self, length: Sequence[int], time: Timeline):
        self._time, self._length = time, length
        self._from = [0] * len(length)  # a chunk below reads the node in all steps from this one ...
        self._until = [-1] * len(length)  # ... to this one

    def read(self, stack: Sequence[int], firsts: Sequence[int], end: int) -> None:
        """A sequence below the nodes of `stack`, root first, runs until step `end`.

        `firsts` are the steps in which the lowest of these nodes and the sequence's leaf are first computed, -1 for
        none: every node reads along from the first chunk below it.
        """
        begin = self._time.now + 1
        for above, node in enumerate(reversed(stack)):
            first = firsts[-1 - above] if above < len(firsts) else -1
            begin = first if first >= 0 else begin
            if self._read(node, begin, end):
                return

    def _read(self, node: int, begin: int, end: int) -> bool:
        """Returns whether the node, and so every node above, is read until then anyway."""
        known = self._until[node]
        earlier = min(self._from[node], known + 1)
        if begin < earlier <= self._time.now + 1 and known >= begin:
            # From this step on, where so far it was from the next one on.
            self._count(node, begin, earlier)
            self._from[node] = begin
        elif known >= end:
            return True
        if end > known:
            if begin > known + 1:
                self._from[node] = begin
            self._count(node, max(begin, known + 1), end + 1)
            self._until[node] = max(known, end)
        return False

    def _count(self, node: int, begin: int, after: int) -> None:
        if begin < after:
            for level, amount in ((Level.SHARED_READS, 1), (Level.SHARED_READ, self._length[node])):
                self._time.change(level, begin, amount)
                self._time.change(level, after, -amount)
