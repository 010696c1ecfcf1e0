"""Whatever moment ends the process: no row is lost that was in a part, none is there twice, and it can go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import polars as pl
import pytest

from batchllm.dataset import claim as claim_module
from batchllm.dataset.results import ResultStore
from tests.dataset.results_world import World, names

ROOT = Path(__file__).resolve().parents[2]
OURS = str(Path(claim_module.__file__).parents[1])
STEPS = ("replace", "unlink", "link", "rmdir")


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes die here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def rows_on_disk(out: Path) -> list[tuple[str, str]]:
    """(id, output), read as a person would."""
    if not list(out.glob("*.parquet")):
        return []
    return pl.read_parquet(out / "*.parquet").select("id", "output").rows()


def check_no_row_twice(out: Path) -> list[tuple[str, str]]:
    rows = rows_on_disk(out)
    assert len({name for name, _ in rows}) == len(rows)
    return rows


# ---- death at every step, simulated


class Dead(BaseException):
    """Nothing a dead process would have done is done: every later step of it raises this as well."""


class Mortal:
    """Ends the process, as far as its effects on the disk go, at its k-th step that changes the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last_step: int) -> None:
        self.left = last_step
        self.locks: list[Any] = []
        for name in STEPS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(fcntl, "flock", self._locked(fcntl.flock))

    def _counted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.left <= 0:
                raise Dead
            self.left -= 1
            return step(*args, **kwargs)

        return counted

    def _locked(self, flock: Callable[..., Any]) -> Callable[..., Any]:
        def locked(file: Any, how: int) -> None:
            flock(file, how)
            self.locks.append(file)

        return locked

    def bury(self) -> None:
        for file in self.locks:
            file.close()


def die_at_every_step(
    template: Path, tmp_path: Path, world: World, stride: int, finish: Callable[[Path], None]
) -> int:
    """Runs `finish` on copies of a folder, ending it after 0, stride, 2 x stride ... steps, and goes on after each.

    Returns the number of deaths.
    """
    for deaths, last_step in enumerate(range(0, 10_000, stride)):
        out = tmp_path / f"out{last_step}"
        shutil.copytree(template, out)
        before = set(check_no_row_twice(out)) & {(row[0], row[3]) for row in world.rows()}
        with pytest.MonkeyPatch.context() as monkeypatch:
            mortal = Mortal(monkeypatch, last_step)
            try:
                finish(out)
                survived = True
            except Dead:
                survived = False
            mortal.bury()
        there = set(check_no_row_twice(out))
        if last_step and before and not survived:
            assert there, "a reader finds something at every moment"
        with world.open(out) as store:
            wanted = {(row[0], row[3]) for row in world.rows()}
            assert store.num_resumed >= len(before | (there & wanted)), "no answer is paid for twice"
            world.fill(store)
            store.finish()
        table = pl.read_parquet(out / "*.parquet")
        assert table.select("id", "note", "output").rows() == [(r[0], r[2], r[3]) for r in world.rows()]
        shutil.rmtree(out)
        if survived:
            return deaths
    raise AssertionError("it never came to an end")


def test_death_while_finishing(tmp_path: Path) -> None:
    world = World(names(range(25)))
    with world.open(tmp_path / "template", part_rows=4) as store:
        world.fill(store)

    def finish(out: Path) -> None:
        with world.open(out, part_rows=7) as store:
            store.finish()

    assert die_at_every_step(tmp_path / "template", tmp_path, world, 1, finish) > 20


def test_death_while_running(tmp_path: Path) -> None:
    world = World(names(range(12)))
    (tmp_path / "template").mkdir()

    def run(out: Path) -> None:
        with world.open(out, part_rows=5) as store:
            world.fill(store)
            store.finish()

    assert die_at_every_step(tmp_path / "template", tmp_path, world, 1, run) > 15


@pytest.mark.parametrize("finished", [True, False])
def test_death_while_taking_over_a_changed_job(tmp_path: Path, finished: bool) -> None:
    earlier = World(names(range(24)))
    with earlier.open(tmp_path / "template", part_rows=6) as store:
        earlier.fill(store, None if finished else 20)
        if finished:
            store.finish()
    # Rows 8 to 19 stay, in another order, and others come and go: parts are kept, rewritten and set aside.
    world = World(names([30, 31, *range(19, 7, -1), *range(3)]))

    def take_over(out: Path) -> None:
        with world.open(out, part_rows=7) as store:
            world.fill(store)
            store.finish()

    assert die_at_every_step(tmp_path / "template", tmp_path, world, 1, take_over) > 30


def test_death_while_setting_aside_loses_no_generation(tmp_path: Path) -> None:
    earlier = World(names(range(12)))
    earlier.run(tmp_path / "template", part_rows=4)
    world = replace(earlier, configuration=b"second")
    paid_for = {(row[0], row[3]) for row in earlier.rows()}
    for last_step in range(40):
        out = tmp_path / f"out{last_step}"
        shutil.copytree(tmp_path / "template", out)
        with pytest.MonkeyPatch.context() as monkeypatch:
            mortal = Mortal(monkeypatch, last_step)
            with contextlib.suppress(Dead):
                world.open(out).close()
            mortal.bury()
        world.open(out).close()
        aside = pl.read_parquet(out / "_run/superseded/*/*.parquet").select("id", "output")
        assert set(aside.rows()) == paid_for
        shutil.rmtree(out)


# ---- Ctrl-C at any line


class CtrlC:
    """Raises KeyboardInterrupt once, at the k-th line of ours that is run (in a function of this name)."""

    def __init__(self, function: str | None, line: int) -> None:
        self.function = function
        self.left = line

    def __call__(self, frame: FrameType, event: str, argument: object) -> CtrlC | None:
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or code.co_name == "writing":
            return None
        if event == "line" and self.function in (None, code.co_name):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize(("function", "stride"), [("flush", 1), ("complete_commit", 1), (None, 41)])
def test_ctrl_c_at_any_line(tmp_path: Path, function: str | None, stride: int) -> None:
    """What was answered is written once, whichever line of a flush or of the commit was interrupted."""
    world = World(names(range(12)))
    right = {(row[0], row[3]) for row in world.rows()}
    for number in range(1, 100_000, stride):
        out = tmp_path / f"out{number}"
        store = world.open(out, part_rows=5)
        interrupted = run_until_ctrl_c(world, store, CtrlC(function, number))
        added = int(store.done.sum())
        store.close()
        there = check_no_row_twice(out)
        assert set(there) <= right
        assert world.run(out).num_resumed >= len(there) >= added - 1
        assert rows_on_disk(out) == [(row[0], row[3]) for row in world.rows()]
        shutil.rmtree(out)
        if not interrupted:
            return
    raise AssertionError("it never came to an end")


def run_until_ctrl_c(world: World, store: ResultStore, ctrl_c: CtrlC) -> bool:
    before = sys.gettrace()
    try:
        sys.settrace(ctrl_c)
        world.fill(store)
        store.finish()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


# ---- kill -9


def start(out: Path, rows: int, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.dataset.results_world", str(out), str(rows), "10", str(pause)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen[str], word: str, seconds: float) -> bool:
    """Whether it was killed: it may have come to its end before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait(timeout=30) == -signal.SIGKILL


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Some kills while answers are written, some during finish; after each the folder holds every row at most once."""
    rng = random.Random(7)
    world = World(names(range(200)))
    right = {(row[0], row[3]) for row in world.rows()}
    kills, out = 0, tmp_path / "out0"
    for attempt in range(12):
        word, limit, pause = ("ready", 0.35, 0.001) if attempt % 3 else ("finishing", 0.12, 0.0)
        before = set(rows_on_disk(out))
        if not kill_after(start(out, 200, pause), word, rng.uniform(0, limit)):
            assert rows_on_disk(out) == [(row[0], row[3]) for row in world.rows()]
            out = tmp_path / f"out{attempt + 1}"
            continue
        kills += 1
        there = set(check_no_row_twice(out))
        assert there <= right
        if "COMMIT" not in {path.name for path in (out / "_run").glob("*")}:
            assert before <= there
    world.run(out)
    assert rows_on_disk(out) == [(row[0], row[3]) for row in world.rows()]
    assert kills >= 5
