"""`batchllm eval`: what it writes, two equal nights, a planted regression, and everything that can be wrong."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

from batchllm.evals.eval_job import load_eval_job
from batchllm.executor.device import Machine
from batchllm.table_run import TableRun
from tests.evals.eval_worlds import write_small_tasks
from tests.jobs import exit_code_of

TASKS = ["choices", "answers", "documents"]


@pytest.fixture
def job(model_folder: Path, tmp_path: Path) -> Path:
    write_small_tasks(tmp_path / "tasks")
    return write_job(tmp_path, model_folder, TASKS)


def write_job(folder: Path, model_folder: Path, tasks: Sequence[Any], **sections: Any) -> Path:
    job = {
        "model": {"path": str(model_folder)},
        "engine": {"device": "cpu", "kv_memory": "4MiB", "min_shared_tokens": 4},
        "eval": {"tasks": list(tasks), "include": "tasks", "data": "tasks"},
        "output": {"path": "nights/first"},
        **sections,
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def night(job: Path, name: str, *arguments: str) -> int:
    return exit_code_of("eval", str(job), "--set", f"output.path=nights/{name}", "--quiet", *arguments)


def read(job: Path, name: str, table: str) -> pl.DataFrame:
    return pl.read_parquet(job.parent / "nights" / name / f"{table}.parquet")


def test_scores_with_intervals_and_a_row_for_each_document(job: Path) -> None:
    assert night(job, "first") == 0
    scores, samples = read(job, "first", "scores"), read(job, "first", "samples")
    assert scores["task"].unique().sort().to_list() == sorted(TASKS)
    assert scores["documents"].to_list() == [12] * len(scores)
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["score"] <= scores["high"]).all()
    assert (scores["low"] < scores["high"]).all()
    for score in scores.iter_rows(named=True):
        mine = samples.filter(pl.col("task") == score["task"], pl.col("metric") == score["metric"])
        assert mine["doc_id"].to_list() == list(range(12))
        if score["task"] != "documents":
            assert mine["value"].mean() == pytest.approx(score["score"])
    assert samples.filter(pl.col("task") == "choices")["output"].is_in([" nowhere", " A"]).any() is not None
    about = json.loads((job.parent / "nights" / "first" / "run.json").read_text())
    assert about["engine_runs"] == 1
    assert about["prompt_tokens_computed"] < about["prompt_tokens"]


def test_two_equal_nights_report_no_change(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert night(job, "first") == 0
    capsys.readouterr()
    assert exit_code_of("eval", str(job), "--set", "output.path=nights/second") == 0
    assert "no change since first" in capsys.readouterr().out
    changes = read(job, "second", "changes")
    assert len(changes) == len(read(job, "second", "scores"))
    assert changes["drop"].to_list() == [0.0] * len(changes)
    assert changes["paired"].to_list() == [12] * len(changes)
    assert read(job, "second", "flips").is_empty()


def test_a_planted_regression_is_found_and_named(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The night before had every answer of one task right."""
    assert night(job, "first") == 0
    folder = job.parent / "nights" / "first"
    plant(folder, "answers", "exact_match")
    capsys.readouterr()
    assert exit_code_of("eval", str(job), "--set", "output.path=nights/second") == 4
    said = capsys.readouterr().out
    assert "REGRESSION since first: answers exact_match" in said
    assert "REGRESSION since first: choices" not in said
    assert "'what was right'" in said  # both outputs of a flip
    changes = read(job, "second", "changes")
    assert changes.filter("regression")["task"].to_list() == ["answers"]
    flips = read(job, "second", "flips")
    assert set(flips["task"]) == {"answers"}
    assert len(flips) == changes.filter("regression")["worse"][0] >= 10
    assert set(flips["output_before"]) == {"what was right"}


def plant(folder: Path, task: str, metric: str) -> None:
    mine = (pl.col("task") == task) & (pl.col("metric") == metric)
    samples = pl.read_parquet(folder / "samples.parquet")
    changed = mine & (pl.col("value") == 0.0)
    samples.with_columns(
        output=pl.when(changed).then(pl.lit("what was right")).otherwise("output"),
        value=pl.when(changed).then(1.0).otherwise("value"),
    ).write_parquet(folder / "samples.parquet")
    scores = pl.read_parquet(folder / "scores.parquet")
    scores.with_columns(score=pl.when(mine).then(1.0).otherwise("score")).write_parquet(
        folder / "scores.parquet"
    )


def test_a_drop_within_what_is_allowed_is_no_regression(job: Path) -> None:
    assert night(job, "first") == 0
    plant(job.parent / "nights" / "first", "answers", "exact_match")
    assert night(job, "second", "--set", "compare.max_drop=1.0") == 0
    assert night(job, "third", "--previous", "none") == 0
    assert night(job, "fourth", "--previous", str(job.parent / "nights" / "first")) == 4


def test_tasks_as_files_and_with_other_data(model_folder: Path, tmp_path: Path) -> None:
    """A file is found from the job file's folder, its data from eval.data."""
    write_small_tasks(tmp_path / "tasks")
    write_small_tasks(tmp_path / "fewer", documents=5)
    tasks = ["tasks/choices.yaml", {"task": "answers", "data": {"test": "../fewer/rows.jsonl"}}]
    job = write_job(tmp_path, model_folder, tasks)
    assert night(job, "first") == 0
    documents = dict(read(job, "first", "scores").select("task", "documents").iter_rows())
    assert documents == {"choices": 12, "answers": 5}


def test_a_document_that_is_not_the_same_is_not_compared(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night(job, "first") == 0
    rows = job.parent / "tasks" / "rows.jsonl"
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0].replace("Where is", "And where is"), *lines[1:]]))
    capsys.readouterr()
    exit_code_of("eval", str(job), "--set", "output.path=nights/second")
    assert "choices acc: 1 documents are new or not the same as before" in capsys.readouterr().out
    assert read(job, "second", "changes").filter(pl.col("task") == "choices")["paired"].to_list() == [11, 11]


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("chioces", "eval.tasks[1]: there is no task `chioces`; did you mean choices?"),
        ("tasks/nothing.yaml", "eval.tasks[1]: there is no task file tasks/nothing.yaml"),
        ("without_data", "eval.tasks[1]: task `without_data` cannot be loaded"),
        ({"task": "choices", "data": {"test": "nothing.jsonl"}}, "there is no data file nothing.jsonl"),
        ({"task": "choices", "data": {"test": "rows.xml"}}, "data files must all be JSON"),
        ("bad_template", "task `bad_template` cannot be evaluated"),
    ],
)
def test_a_task_that_cannot_run_is_named_and_the_others_go_on(
    task: Any,
    sentence: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchllm.evals.tasks._Index.all_names", lambda self: TASKS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_small_tasks(tmp_path / "tasks")
    (folder / "rows.xml").write_text("<rows/>")
    choices = yaml.safe_load((folder / "choices.yaml").read_text())
    without_data = {
        **choices,
        "task": "without_data",
        "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}},
    }
    late = "{{ options if '0' in question else nothing.of.this }}"
    bad_template = {**choices, "task": "bad_template", "doc_to_choice": late}
    for wrong in (without_data, bad_template):
        (folder / f"{wrong['task']}.yaml").write_text(yaml.safe_dump(wrong))
    job = write_job(tmp_path, model_folder, ["answers", task])
    assert exit_code_of("eval", str(job)) == 3
    assert sentence in capsys.readouterr().out
    scores = read(job, "first", "scores")
    assert sentence in str(scores.filter(pl.col("score").is_null())["error"][0])
    assert scores.filter(pl.col("task") == "answers")["documents"].to_list() == [12]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"eval": {"tasks": []}}, "eval.tasks must not be empty"),
        ({"eval": {"tasks": ["choices"], "limits": 3}}, "did you mean eval.limit?"),
        (
            {"eval": {"tasks": ["choices"], "include": "nowhere"}},
            "eval.include must be a folder, and there is no",
        ),
        ({"eval": {"tasks": [{"taks": "choices"}]}}, "did you mean eval.tasks[0].task?"),
        (
            {"eval": {"tasks": [{"task": "choices", "x": 1}]}},
            "the keys of eval.tasks[0] are task, data, field",
        ),
        ({"compare": {"max_drop": "0.1"}}, "compare.max_drop must be a number"),
        ({"output": {"path": "s3://bucket/nights"}}, "output.path must be a local folder"),
        ({"compare": {"max_drop": 2}}, "compare.max_drop must be at most 1"),
        ({"compare": {"previous": "tasks"}}, "and tasks holds no scores.parquet"),
        ({"eval": {"tasks": ["tasks/nothing.yaml"]}}, "eval.tasks[0]: there is no task file"),
        ({"model": {"path": "./nowhere"}}, "model.path names no folder"),
    ],
)
def test_a_job_that_cannot_start(
    sections: dict[str, Any],
    sentence: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_small_tasks(tmp_path / "tasks")
    job = write_job(tmp_path, model_folder, TASKS, **sections)
    assert exit_code_of("eval", str(job)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "nights").exists()


def test_an_override_that_is_wrong_is_blamed_for_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("eval", str(job), "--set", "eval.include=nowhere") == 2
    assert "error: --set eval.include: eval.include must be a folder" in capsys.readouterr().err
    assert exit_code_of("eval", str(job), "--set", "compare.max_drop=2") == 2
    assert "error: --set compare.max_drop: compare.max_drop must be at most 1" in capsys.readouterr().err


def test_paths_start_where_they_are_written(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a job in its folder, `~` in the user's home, that of --previous where one types."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spec = load_eval_job(job, ["output.path=~/nights/{date}"], today=date(2026, 11, 29))
    assert spec.output.path == str(tmp_path / "home" / "nights" / "2026-11-29")
    (tmp_path / "elsewhere" / "scores.parquet").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_eval_job(job, previous=".").compare.previous == str(tmp_path / "elsewhere")
    assert load_eval_job(job, previous="none").compare.previous == "none"
    assert exit_code_of("eval", str(job), "--previous", "elsewhere") == 2
    assert "error: --previous: compare.previous must be a folder" in capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("a model is loaded although nothing can come of it")

    monkeypatch.setattr("batchllm.evals.nightly._model", load)


def test_an_evaluation_is_not_overwritten_unasked(
    job: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.parent / "nights" / "first"
    folder.mkdir(parents=True)
    (folder / "scores.parquet").touch()
    assert night(job, "first") == 2
    assert "holds an evaluation already" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--overwrite"]])
def test_a_folder_with_other_files_is_refused_before_anything_is_computed(
    arguments: list[str], job: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    letter = job.parent / "nights" / "first" / "letter.txt"
    letter.parent.mkdir(parents=True)
    letter.write_text("dear")
    assert night(job, "first", *arguments) == 2
    assert "holds files that are no evaluation (letter.txt)" in capsys.readouterr().err
    assert list(letter.parent.iterdir()) == [letter]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    job: Path, no_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("batchllm.durable.os.access", lambda path, mode: Path(path) != job.parent)
    assert night(job, "first") == 2
    assert "cannot be written, because this user may not write to" in capsys.readouterr().err
    assert not (job.parent / "nights").exists()


def test_a_gpu_that_cannot_be_used_is_said(
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr("batchllm.llm.this_machine", lambda: Machine(None, "torch finds no GPU"))
    arguments = ("--set", "engine.device=auto", "--set", "eval.tasks=[choices]")
    assert exit_code_of("eval", job, *arguments) == 0
    assert capfd.readouterr().err.count("device: auto runs on the CPU, for torch finds no GPU") == 1
    assert night(job, "quiet", *arguments) == 0
    assert "device: auto" not in capfd.readouterr().err
    assert not [warning for warning in recwarn if "device: auto" in str(warning.message)]


def test_a_previous_night_that_is_not_whole_is_refused_before_anything_is_computed(
    job: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.parent / "nights" / "before"
    folder.mkdir(parents=True)
    pl.DataFrame({"task": ["choices"]}).write_parquet(folder / "scores.parquet")
    assert night(job, "first") == 2
    said = capsys.readouterr().err
    assert f"compare.previous: {folder} is no evaluation that can be read" in said
    assert "name another folder, or none" in said


def test_overwrite_removes_only_the_files_of_an_evaluation(job: Path) -> None:
    assert night(job, "before") == 0
    assert night(job, "first") == 0
    folder = job.parent / "nights" / "first"
    assert (folder / "flips.parquet").exists()
    (folder / "notes").mkdir()
    (folder / "notes" / "letter.txt").write_text("dear")
    scores = (folder / "scores.parquet").stat().st_mtime_ns
    assert night(job, "first", "--overwrite", "--previous", "none") == 0
    assert (folder / "notes" / "letter.txt").read_text() == "dear"
    assert not (folder / "flips.parquet").exists()
    assert (folder / "scores.parquet").stat().st_mtime_ns > scores
    assert sorted(path.name for path in folder.parent.iterdir()) == ["before", "first"]


def test_a_full_disk_is_one_sentence_and_the_night_is_not_lost(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("batchllm.evals.night_folder.write_bytes", _no_space)
        assert night(job, "first") == 1
    said = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in said
    assert "Traceback" not in said
    assert not (job.parent / "nights" / "first").exists()
    assert night(job, "first") == 0
    assert about(job, "first")["prompt_tokens"] == 0  # all answers were kept


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "no space")


def about(job: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.parent / "nights" / name / "run.json").read_text())
    return found


@pytest.mark.parametrize("after", [1, 20, 50])
def test_an_interrupted_evaluation_goes_on(
    after: int,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On another date, too: with sampled answers, several to a document, it comes to what it would have come to."""
    folder = write_small_tasks(tmp_path / "tasks")
    sampled = yaml.safe_load((folder / "answers.yaml").read_text()) | {"task": "sampled", "repeats": 2}
    sampled["generation_kwargs"] = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    (folder / "sampled.yaml").write_text(yaml.safe_dump(sampled))
    job = write_job(tmp_path, model_folder, [*TASKS, "sampled"])
    assert night(job, "whole", "--previous", "none") == 0
    with monkeypatch.context() as patch:
        patch.setattr(TableRun, "results", interrupted(TableRun.results, after))
        assert night(job, "monday", "--previous", "none") == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "nights" / "monday").exists()
    assert night(job, "tuesday", "--previous", "none") == 0
    whole, tuesday = about(job, "whole"), about(job, "tuesday")
    assert after * 0.5 <= tuesday["answers_resumed"] <= after
    assert (tuesday["prompt_tokens"] < whole["prompt_tokens"]) == (tuesday["answers_resumed"] > 0)
    columns = ["task", "metric", "filter", "doc_id", "output"]
    assert read(job, "tuesday", "samples")[columns].equals(read(job, "whole", "samples")[columns])
    scores = read(job, "tuesday", "scores")["score"].to_list()
    assert scores == pytest.approx(read(job, "whole", "scores")["score"].to_list(), rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "nights").iterdir()) == ["tuesday", "whole"]


def interrupted(
    results: Callable[[TableRun], Iterator[Any]], after: int
) -> Callable[[TableRun], Iterator[Any]]:
    def few(run: TableRun) -> Iterator[Any]:
        yield from itertools.islice(results(run), after)
        raise KeyboardInterrupt

    return few
