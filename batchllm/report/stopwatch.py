"""Where the time and the memory of a run went."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopwatch:
    """Seconds by stage. A stage inside another stops the outer one, so the seconds add up to what was timed."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._started = self._mark = time.perf_counter()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        self._charge()
        self._running.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    @property
    def wall_seconds(self) -> float:
        """Since the stopwatch was made."""
        return time.perf_counter() - self._started

    def seconds(self) -> dict[str, float]:
        """Stage → seconds so far, in the order in which the stages first ended."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._mark
        self._mark = now


def rss_peak_bytes() -> int:
    """The most main memory this process has held at once; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
