"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import re
import time

import numpy as np
import pytest

from batchllm.core import SequenceResult
from batchllm.report import progress as progress_module
from batchllm.report.planned_tokens import PlannedTokens
from batchllm.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_lines_come_every_ten_seconds_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("tokenize", 1000) as stage:
        for _ in range(25):
            clock.now += 1
            stage.advance(rows=40, tokens=2000)
    assert stream.getvalue().splitlines() == [
        "tokenize: 400 of 1,000 rows (40%), 2,000 tokens/s, 15.0 s left",
        "tokenize: 800 of 1,000 rows (80%), 2,000 tokens/s, 5.0 s left",
        "tokenize: 1,000 rows in 25.0 s, 2,000 tokens/s",
    ]


def test_a_line_of_the_running_stage(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("run", 1000, rows_done=400) as stage:
        clock.now += 100
        stage.update(
            700, prompt_tokens_done=90_000, output_tokens=10_000, kv_used_fraction=0.7, saved_fraction=0.63
        )
    line, end = stream.getvalue().splitlines()
    # the 400 rows of an earlier run say nothing about the speed of this one
    assert line == (
        "run: 700 of 1,000 rows (70%), 1,000 tokens/s, 63% of prompt tokens saved, KV 70% full, 1 min 40 s left"
    )
    assert end.startswith("run: 700 of 1,000 rows (70%) in 1 min 40 s, 1,000 tokens/s")


def test_what_is_left_is_told_by_tokens_before_the_first_row_has_ended(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("run", 1000, rows_done=400) as stage:
        for tokens, rows in ((10_000, 400), (40_000, 990), (50_000, 990)):
            clock.now += 50
            stage.update(rows, prompt_tokens_done=tokens, total_tokens=45_000)
    lines = [line.split(", ")[2:] for line in stream.getvalue().splitlines()]
    # more came than was expected: nothing is said, rather than something below zero
    assert lines == [["2 min 55 s left"], ["12.5 s left"], [], []]


def test_a_bar_says_what_is_left_by_tokens() -> None:
    stream = Terminal()
    with Progress(stream=stream).stage("run", 10) as stage:
        assert "<?]" in stream.getvalue()
        stage._started -= 100
        for rows, total in ((0, 4000), (6, 3000), (6, 2000)):
            time.sleep(0.2)  # longer than a bar waits before it is drawn again
            stage.update(rows, prompt_tokens_done=1000, total_tokens=total)
        drawn = re.findall(r"(\d+)/10 rows \[00:0\d<0(\d):", stream.getvalue())
        assert drawn == [("0", "5"), ("6", "3"), ("6", "1")]


def test_planned_tokens_are_mended_by_what_came() -> None:
    planned = PlannedTokens(1000, np.array([100, 100, 50, 50]))
    assert planned.total == 1300
    planned.end([SequenceResult(0, (7,) * 20, "", "stop"), SequenceResult(2, (), "", "error", "too long")])
    assert planned.total == 1000 + 20 + 150 * 20 / 100
    planned.end([SequenceResult(1, (7,) * 40, "", "stop")])
    assert planned.total == 1000 + 60 + 50 * 60 / 200
    planned.end([SequenceResult(3, (7,) * 9, "", "stop")])
    assert planned.total == 1069


def test_rows_of_unknown_number(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream=stream).stage("load") as stage:
        clock.now += 11
        stage.advance(rows=50)
    assert stream.getvalue().splitlines() == ["load: 50 rows", "load: 50 rows in 11.0 s"]


def test_a_stage_that_is_stopped_says_how_far_it_came(clock: Clock) -> None:
    stream = io.StringIO()

    def interrupted() -> None:
        with Progress(stream=stream).stage("run", 10) as stage:
            clock.now += 7200
            stage.advance(rows=3)
            stream.truncate(0)
            stream.seek(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue() == "run: 3 of 10 rows (30%) when stopped after 2 h 00 min\n"


def test_no_rows_at_all() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(stream=stream).stage("run", 0) as stage:
            stage.update(0)
        assert "run" in stream.getvalue()


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(stream=stream).stage("run", 10, rows_done=2) as stage:
        stage.update(7, prompt_tokens_done=500, output_tokens=50, kv_used_fraction=0.5, saved_fraction=0.9)
    last = re.split(r"[\r\n]+", stream.getvalue().strip())[-1]
    assert last.startswith("run  70%|")
    assert "7/10 rows" in last
    assert re.search(r"[\d,]+ tokens/s, 90% saved, KV 50%", last)
    assert len(last) <= 80


def test_notes_and_quiet() -> None:
    stream = io.StringIO()
    Progress(stream=stream).note("1,200 earlier answers were set aside")
    assert stream.getvalue() == "1,200 earlier answers were set aside\n"
    quiet = Terminal()
    silent = Progress(quiet=True, stream=quiet)
    silent.note("nothing")
    with silent.stage("run", 10) as stage:
        stage.advance(rows=5)
        stage.update(10)
    assert quiet.getvalue() == ""
    assert stage.rows == 10
