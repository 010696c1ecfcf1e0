"""How far a run is: bars on a terminal, a plain line now and then anywhere else, nothing when quiet."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from tqdm import tqdm

_LINE_SECONDS = 10.0


class Stage:
    """The figures of one stage. Whoever does the work reports them; a display shows them when it likes."""

    def __init__(
        self, name: str, total_rows: int | None, rows_done: int, show: Callable[[Stage], None]
    ) -> None:
        self.name = name
        self.total_rows = total_rows
        self.rows = rows_done
        self.tokens = 0
        self.total_tokens: int | None = None  # that `tokens` will come to, where that can be foreseen
        self.kv_used_fraction: float | None = None
        self.saved_fraction: float | None = None
        self._rows_before = rows_done
        self._started = time.monotonic()
        self._show = show

    def advance(self, rows: int = 0, tokens: int = 0) -> None:
        """So many more are done."""
        self.rows += rows
        self.tokens += tokens
        self._show(self)

    def update(
        self,
        rows_done: int,
        prompt_tokens_done: int = 0,
        output_tokens: int = 0,
        kv_used_fraction: float | None = None,
        saved_fraction: float | None = None,
        total_tokens: int | None = None,
    ) -> None:
        """So many are done in all: rows with those of earlier runs, tokens of this run only, as in `total_tokens`."""
        self.rows = rows_done
        self.tokens = prompt_tokens_done + output_tokens
        self.kv_used_fraction = kv_used_fraction
        self.saved_fraction = saved_fraction
        self.total_tokens = total_tokens
        self._show(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """From the tokens of this run so far, else from its rows; None while nothing can be said."""
        if self.total_tokens is not None and self.tokens > 0:
            return self.seconds / self.tokens * max(0, self.total_tokens - self.tokens)
        rows = self.rows - self._rows_before
        if self.total_rows is None or rows <= 0:
            return None
        return self.seconds / rows * max(0, self.total_rows - self.rows)

    def figures(self, brief: bool = False) -> str:
        """All but the rows: `1,234 tokens/s, 63% of prompt tokens saved, KV 71% full`; brief fits a bar."""
        parts = []
        if self.tokens:
            parts.append(f"{self.tokens / max(self.seconds, 1e-3):,.0f} tokens/s")
        if self.saved_fraction is not None:
            parts.append(f"{self.saved_fraction:.0%} {'saved' if brief else 'of prompt tokens saved'}")
        if self.kv_used_fraction is not None:
            parts.append(f"KV {self.kv_used_fraction:.0%}{'' if brief else ' full'}")
        return ", ".join(parts)


class Progress:
    """Where stages are shown. `quiet` shows nothing; a stream that is no terminal gets plain lines."""

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, line_seconds: float = _LINE_SECONDS
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._line_seconds = line_seconds

    @contextmanager
    def stage(self, name: str, total_rows: int | None = None, rows_done: int = 0) -> Iterator[Stage]:
        """One stage of the work. `rows_done` of the rows were there before and say nothing about speed."""
        display = self._display()
        stage = Stage(name, total_rows, rows_done, display.show)
        display.open(stage)
        try:
            yield stage
        except BaseException:
            display.close(stage, complete=False)
            raise
        display.close(stage, complete=True)

    def note(self, text: str) -> None:
        """A line for the person, above a bar if one is shown."""
        if not self._quiet:
            tqdm.write(text, file=self._stream)

    def _display(self) -> _Display:
        if self._quiet:
            return _Nothing()
        if self._stream.isatty():
            return _Bar(self._stream)
        return _Lines(self._stream, self._line_seconds)


class _Display(Protocol):
    """`show` is called at every report and returns at once when it is not yet time to show anything."""

    def open(self, stage: Stage) -> None: ...
    def show(self, stage: Stage) -> None: ...
    def close(self, stage: Stage, complete: bool) -> None: ...


class _Nothing:
    def open(self, stage: Stage) -> None: ...
    def show(self, stage: Stage) -> None: ...
    def close(self, stage: Stage, complete: bool) -> None: ...


class _Bar:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None

    def open(self, stage: Stage) -> None:
        self._bar = tqdm(
            desc=stage.name,
            total=stage.total_rows,
            initial=stage.rows,
            unit=" rows",
            file=self._stream,
            dynamic_ncols=_knows_its_width(self._stream),
            ncols=None if _knows_its_width(self._stream) else 80,
            nrows=20,
            miniters=0,  # what is left changes also where no row has ended
            bar_format=_bar_format(stage),
        )

    def show(self, stage: Stage) -> None:
        assert self._bar is not None
        self._bar.bar_format = _bar_format(stage)
        self._bar.set_postfix_str(stage.figures(brief=True), refresh=False)
        self._bar.update(stage.rows - self._bar.n)

    def close(self, stage: Stage, complete: bool) -> None:
        assert self._bar is not None
        self._bar.bar_format = _bar_format(stage)
        self._bar.set_postfix_str(stage.figures(brief=True), refresh=False)
        self._bar.refresh()
        self._bar.close()


class _Lines:
    def __init__(self, stream: TextIO, line_seconds: float) -> None:
        self._stream = stream
        self._line_seconds = line_seconds
        self._last = time.monotonic()

    def open(self, stage: Stage) -> None: ...

    def show(self, stage: Stage) -> None:
        now = time.monotonic()
        if now - self._last < self._line_seconds or stage.rows == stage.total_rows:
            return
        self._last = now
        left = stage.seconds_left
        self._print(
            f"{stage.name}: {_rows(stage)}", stage.figures(), f"{_duration(left)} left" if left else ""
        )

    def close(self, stage: Stage, complete: bool) -> None:
        after = "in" if complete else "when stopped after"
        self._print(f"{stage.name}: {_rows(stage)} {after} {_duration(stage.seconds)}", stage.figures())

    def _print(self, *parts: str) -> None:
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)


def _bar_format(stage: Stage) -> str:
    if stage.total_rows is None:
        return "{desc} {n_fmt} rows [{elapsed}]{postfix}"
    left = "?" if stage.seconds_left is None else tqdm.format_interval(stage.seconds_left)
    return (
        f"{{desc}} {{percentage:3.0f}}%|{{bar}}| {{n_fmt}}/{{total_fmt}} rows [{{elapsed}}<{left}]{{postfix}}"
    )


def _knows_its_width(terminal: TextIO) -> bool:
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _rows(stage: Stage) -> str:
    if not stage.total_rows or stage.rows >= stage.total_rows:
        return f"{stage.rows:,} rows"
    return f"{stage.rows:,} of {stage.total_rows:,} rows ({stage.rows / stage.total_rows:.0%})"


def _duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
