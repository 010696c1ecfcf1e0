"""The work folder of a run: its own, gone afterwards, and no leftovers of killed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm.work_folder import work_folder


def test_everything_made_for_it_is_gone_afterwards(tmp_path: Path) -> None:
    with work_folder(tmp_path / "a" / "b" / "out") as work:
        (work / "prompts").write_text("x")
        assert work.parent == tmp_path / "a" / "b" / "out" / "_run"
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_or_was_added_stays(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    (tmp_path / "a").mkdir()
    with work_folder(out):
        (out / "part").write_text("x")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", out, out / "part"]


def test_it_is_gone_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no"), work_folder(tmp_path / "out"):
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_have_two_folders_and_leave_each_other_alone(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out") as first:
        (first / "prompts").write_text("first")
        with work_folder(tmp_path / "out") as second:
            assert second != first
        assert not second.exists()
        assert (first / "prompts").read_text() == "first"


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / "out" / "_run" / "work-of-a-killed-run"
    abandoned.mkdir(parents=True)
    (abandoned / "lock").touch()
    (abandoned / "prompts").write_text("x")
    with work_folder(tmp_path / "out"):
        assert not abandoned.exists()
