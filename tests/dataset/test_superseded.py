"""Answers set aside: who takes them back, how long they are kept, and that no end of a process loses or doubles one."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from batchllm.core import RequestResult
from batchllm.dataset.folder import Folder
from batchllm.dataset.resume import answered_before
from tests.dataset.results_world import World, names
from tests.dataset.test_results import WORLD, damage_a_page, read
from tests.dataset.test_results_crash import Dead, Mortal, check_no_row_twice

FEW = World(names(range(7)))


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def trial(name: str, rows: int = 7) -> World:
    return World(names(range(rows)), configuration=name.encode())


def generations(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "_run" / "superseded").glob("*"))


def test_a_look_at_fewer_rows_costs_nothing(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    assert FEW.run(tmp_path).num_resumed == 7
    assert read(tmp_path) == FEW.rows()
    back = replace(WORLD, note="new note of")
    with back.open(tmp_path) as store:
        assert store.done.all()
        assert store.notes == ["28 answers that had been set aside match again and were taken back"]
        assert sorted(read(tmp_path)) == sorted(back.rows())
        store.finish()
    assert read(tmp_path) == back.rows()
    assert generations(tmp_path) == [], "the folder's parts hold all of it"


def test_going_back_and_forth_costs_nothing(tmp_path: Path) -> None:
    other = replace(WORLD, configuration=b"other")
    WORLD.run(tmp_path)
    assert other.run(tmp_path).num_resumed == 0
    for world, aside in ((WORLD, other), (other, WORLD), (WORLD, other)):
        store = world.run(tmp_path)
        assert (store.num_resumed, store.num_superseded) == (35, 35)
        assert read(tmp_path) == world.rows()
        kept = pl.read_parquet(tmp_path / "_run/superseded/*/*.parquet")
        assert sorted(kept["output"]) == sorted(row[3] for row in aside.rows())


def test_a_whole_result_outlasts_trials_on_fewer_rows(tmp_path: Path) -> None:
    WORLD.run(tmp_path)
    for number in range(6):
        trial(f"trial {number}", 5 + number % 3).run(tmp_path)
        assert len(generations(tmp_path)) <= 4
    assert WORLD.run(tmp_path).num_resumed == 35


def test_a_whole_result_outlasts_a_smaller_one_of_its_own(tmp_path: Path) -> None:
    """Half of it has been taken back and set aside once more: that half must not outweigh the other."""
    WORLD.run(tmp_path)
    trial("another").run(tmp_path)
    half = World(names(range(20)))
    assert half.run(tmp_path).num_resumed == 20
    trial("another", 35).run(tmp_path)
    assert WORLD.run(tmp_path).num_resumed == 35


def test_of_whole_results_the_last_but_one_stays(tmp_path: Path) -> None:
    worlds = [replace(WORLD, configuration=name) for name in (b"first", b"second", b"third")]
    for world in worlds:
        world.run(tmp_path)
    assert len(generations(tmp_path)) == 1
    assert worlds[1].run(tmp_path).num_resumed == 35
    assert worlds[0].run(tmp_path).num_resumed == 0


def test_answers_come_from_several_generations(tmp_path: Path) -> None:
    """Each time other rows are asked for, and in the end all of them."""
    for rows in (range(30), range(20, 35), range(30, 35)):
        World(names(rows)).run(tmp_path, part_rows=4)
    assert WORLD.run(tmp_path).num_resumed == 35
    assert read(tmp_path) == WORLD.rows()


def test_errors_do_not_come_back(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        store.add([RequestResult(3, None, (), "error", "out of memory", 3, 0)])
        WORLD.fill(store)
        store.finish()
    FEW.open(tmp_path).close()
    trial("other").run(tmp_path)
    assert WORLD.run(tmp_path).num_resumed == 34
    assert read(tmp_path) == WORLD.rows()


@pytest.mark.parametrize("damage", ["page", "footer"])
def test_damage_to_what_was_set_aside_costs_its_rows_only(tmp_path: Path, damage: str) -> None:
    WORLD.run(tmp_path)
    trial("other").run(tmp_path)
    part = sorted((tmp_path / "_run" / "superseded").glob("*/*.parquet"))[1]
    if damage == "page":
        damage_a_page(part)
    else:
        os.truncate(part, 100)
    assert WORLD.run(tmp_path).num_resumed == 25
    assert read(tmp_path) == WORLD.rows()


def test_what_is_answered_is_known_before_anything_is_changed(tmp_path: Path) -> None:
    with WORLD.open(tmp_path) as store:
        store.add([RequestResult(3, None, (), "error", "out of memory", 3, 0)])
        WORLD.fill(store)
        store.finish()
    FEW.run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = answered_before(Folder(tmp_path), WORLD.requests)
    assert (~found).nonzero()[0].tolist() == [], "FEW has computed the one that had failed"
    assert answered_before(Folder(tmp_path), World(names([40, 2, 30])).requests).tolist() == [
        False,
        True,
        True,
    ]
    assert not answered_before(Folder(tmp_path / "none"), WORLD.requests).any()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("way", ["back to all", "to others"])
def test_death_at_any_step_loses_and_doubles_nothing(tmp_path: Path, way: str) -> None:
    """Whoever comes next is given what was paid for: by the whole run, and by the look at a few rows."""
    whole, few = World(names(range(24))), World(names(range(5)))
    whole.run(tmp_path / "template", part_rows=6)
    few.run(tmp_path / "template", part_rows=6)
    world = whole if way == "back to all" else World(names(range(20, 28)))
    for last_step in range(200):
        out = tmp_path / f"out{last_step}"
        shutil.copytree(tmp_path / "template", out)
        survived = False
        with pytest.MonkeyPatch.context() as monkeypatch:
            mortal = Mortal(monkeypatch, last_step)
            with contextlib.suppress(Dead), world.open(out, part_rows=6) as store:
                world.fill(store)
                store.finish()
                survived = True
            mortal.bury()
        check_no_row_twice(out)
        assert whole.run(out, part_rows=6).num_resumed == 24
        assert read(out) == whole.rows()
        shutil.rmtree(out)
        if survived:
            break
    assert survived and last_step > 10
