"""`output.cache`: answers shared by jobs, and duplicates within one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batchllm.dataset import answer_cache
from tests.jobs import exit_code_of, make_job, questions, read_metrics, read_output, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def run(folder: Path, model: Path, rows: Any, cache: Path, **generate: Any) -> tuple[pl.DataFrame, int]:
    """The answers, and how many tokens were decoded for them."""
    job = make_job(folder, model, rows, generate=generate, output={"cache": str(cache)})
    assert exit_code_of("run", job, "--quiet") == 0
    return read_output(folder / "out"), read_metrics(folder / "out")["output_tokens"]


def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "id": f"other {row['id']}"} for row in rows]


@pytest.mark.parametrize("generate", [{"temperature": 0.0}, {"temperature": 1.1, "n": 2, "top_logprobs": 2}])
def test_another_job_takes_what_is_there(tmp_path: Path, model: Path, generate: dict[str, Any]) -> None:
    rows, cache = questions(20), tmp_path / "cache"
    first, decoded = run(tmp_path / "first", model, rows[:12], cache, **generate)
    assert decoded > 0
    again, none = run(tmp_path / "again", model, rows[:12][::-1], cache, **generate)
    assert none == 0
    keys = ["id", "sample"] if "n" in generate else ["id"]
    shown = ["id", "output", "output_tokens", "finish_reason", "error", "prompt_tokens", *(keys[1:])]
    assert again.sort(keys).select(shown).equals(first.sort(keys).select(shown))
    if "top_logprobs" in generate:
        assert again.sort(keys)["top_logprobs"].to_list() == first.sort(keys)["top_logprobs"].to_list()
    more, some = run(tmp_path / "more", model, rows, cache, **generate)
    alone, all_of_them = run(tmp_path / "alone", model, rows, tmp_path / "other", **generate)
    assert 0 < some < all_of_them
    assert more["output"].to_list() == alone["output"].to_list()


def test_what_could_change_an_answer_is_looked_at(tmp_path: Path, model: Path) -> None:
    rows, cache = questions(6), tmp_path / "cache"
    run(tmp_path / "a", model, rows, cache, temperature=0.0, max_tokens=4)
    assert run(tmp_path / "b", model, renamed(rows), cache, temperature=0.0, max_tokens=4)[1] == 0
    assert run(tmp_path / "c", model, rows, cache, temperature=0.0, max_tokens=5)[1] > 0
    assert run(tmp_path / "d", model, rows, cache, temperature=0.0, max_tokens=4, min_tokens=2)[1] > 0
    other = save_model(tmp_path / "model", seed=1)
    assert run(tmp_path / "e", other, rows, cache, temperature=0.0, max_tokens=4)[1] > 0
    run(tmp_path / "f", model, rows, cache, temperature=1.0, max_tokens=4)
    assert run(tmp_path / "g", model, renamed(rows), cache, temperature=1.0, max_tokens=4)[1] > 0


def test_damaged_files_are_passed_over(tmp_path: Path, model: Path) -> None:
    rows, cache = questions(4), tmp_path / "cache"
    expected, decoded = run(tmp_path / "a", model, rows, cache)
    for path in cache.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:50])
    found, again = run(tmp_path / "b", model, rows, cache)
    assert again == decoded and found["output"].to_list() == expected["output"].to_list()


def test_a_cache_that_cannot_be_written_is_noticed_at_once(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    job = make_job(tmp_path / "a", model, questions(4), output={"cache": str(tmp_path / "file" / "cache")})
    assert exit_code_of("run", job, "--quiet") == 2
    assert f"error: {job}: output.cache: {tmp_path}/file/cache: cannot be written" in capfd.readouterr().err
    assert not (tmp_path / "a" / "out").exists()


def test_a_full_disk_under_the_cache_costs_only_the_cache(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(table: Any, path: Path, **_: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    cache = tmp_path / "cache"
    job = make_job(tmp_path / "a", model, questions(12), output={"cache": str(cache)})
    monkeypatch.setattr(answer_cache, "_FILE_ROWS", 3)
    with monkeypatch.context() as patched:
        patched.setattr(answer_cache.pq, "write_table", full)
        # Parts have a writer of their own; the plan is written with this function.
        patched.setattr("batchllm.execution.write_plan", lambda *_: None)
        assert exit_code_of("run", job) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "output.cache" in line]
    assert notes == [
        f"output.cache: {cache} cannot be written (No space left on device), so answers are not kept there"
    ]
    assert len(read_output(tmp_path / "a" / "out")) == 12
    assert list(cache.iterdir()) == []


def test_equal_rows_are_computed_once_when_greedy(tmp_path: Path, model: Path) -> None:
    rows = [{"id": number, "prompt": "The same for all"} for number in range(9)]
    table, decoded = run(tmp_path / "a", model, rows, tmp_path / "cache", temperature=0.0)
    assert table["output"].n_unique() == 1 and decoded == len(table["output_tokens"][0])
    drawn, tokens = run(tmp_path / "b", model, rows, tmp_path / "cache", temperature=1.5)
    assert drawn["output"].n_unique() > 1 and tokens > decoded
