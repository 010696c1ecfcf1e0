"""Input files as people have them, from the file to the answers: unreadable ones, and ones to which a row was added."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs import exit_code_of, make_job, read_metrics, read_output

SAMPLED = {"max_tokens": 6, "temperature": 1.0}


def job_on(folder: Path, model: Path, name: str, content: str | bytes = "", **sections: Any) -> Path:
    """A job whose input is a file of that name."""
    job = make_job(folder, model, [], **{**sections, "input": {"path": name, **sections.get("input", {})}})
    if content:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return job


def answers(folder: Path) -> dict[str, str]:
    table = read_output(folder / "out")
    assert table["error"].is_null().all()
    return dict(zip(table["id"].cast(str), table["output"], strict=True))


# No line yields a column


@pytest.mark.parametrize(
    ("content", "limit", "reasons"),
    [
        ('{"q": \n', None, ["rows.jsonl, line 1 is not valid JSON: Expecting value (column 6)"]),
        ("{}\n{}\n", None, ["the row has no columns"] * 2),
        ("[]\n\n3\n", None, [f"rows.jsonl, line {number} is not a JSON object" for number in (1, 3)]),
        (
            'no\n{"id": "a", "prompt": "What?"}\n',
            1,
            ["rows.jsonl, line 1 is not valid JSON: Expecting value"],
        ),
    ],
)
def test_a_file_in_which_no_line_can_be_read(
    model_folder: Path, tmp_path: Path, content: str, limit: int | None, reasons: list[str]
) -> None:
    job = job_on(
        tmp_path,
        model_folder,
        "rows.jsonl",
        content,
        input={"id": "id", "limit": limit},
        output={"keep": ["prompt", "other"]},
        prompt={"text": "{{ prompt }}"},
        generate={"temperature": {"column": "t"}},
    )
    assert exit_code_of("plan", job) == 0
    for resumed in (0, len(reasons)):
        assert exit_code_of("run", job, "--quiet") == 3
        assert read_metrics(tmp_path / "out")["rows_resumed"] == resumed
    table = read_output(tmp_path / "out")
    assert table.columns[:3] == ["id", "prompt", "other"]
    for error, reason in zip(table["error"], reasons, strict=True):
        assert error.startswith(reason)


@pytest.mark.parametrize("score", [{"rolling": True}, {"continuation": " {{ x }}"}])
def test_a_score_job_in_which_no_line_can_be_read(
    model_folder: Path, tmp_path: Path, score: dict[str, Any]
) -> None:
    job = job_on(tmp_path, model_folder, "rows.jsonl", "{}\n", score=score)
    job.write_text(job.read_text().replace("generate:\n  max_tokens: 8\n", ""))
    assert exit_code_of("run", job, "--quiet") == 3
    assert read_output(tmp_path / "out")["error"].to_list() == ["the row has no columns"]


def test_a_file_that_is_mended_is_answered(model_folder: Path, tmp_path: Path) -> None:
    job = job_on(tmp_path, model_folder, "rows.jsonl", "no\n", output={"keep": "all"})
    assert exit_code_of("run", job, "--quiet") == 3
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "prompt": "What?"}\n')
    assert exit_code_of("run", job, "--quiet") == 0
    assert list(answers(tmp_path)) == ["1"]


# One added row changes the type of the id column


def csv_text(ids: list[object]) -> str:
    return "id,prompt\n" + "".join(f"{id_},Question {id_} of many?\n" for id_ in ids)


def json_text(ids: list[object]) -> str:
    return "".join(json.dumps({"id": id_, "prompt": f"Question {id_} of many?"}) + "\n" for id_ in ids)


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("rows.csv", "A7"),
        ("rows.csv", "007"),
        ("rows.csv", str(2**62)),
        ("rows.jsonl", "x"),
        ("rows.jsonl", 1.5),
    ],
)
def test_an_added_id_of_another_type_leaves_every_answer(
    model_folder: Path, tmp_path: Path, name: str, added: object
) -> None:
    text_of = csv_text if name == "rows.csv" else json_text
    ids: list[object] = list(range(1, 21))
    job = job_on(tmp_path, model_folder, name, text_of(ids), generate=SAMPLED)
    assert exit_code_of("run", job, "--quiet") == 0
    before = answers(tmp_path)
    (tmp_path / name).write_text(text_of([*ids, added]))
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_metrics(tmp_path / "out")["rows_resumed"] == 20
    after = {id_.removesuffix(".0"): text for id_, text in answers(tmp_path).items()}
    assert after.pop(str(added))
    assert after == before
    assert len(set(after.values())) > 1


def test_scores_keep_their_rows_when_the_type_of_ids_changes(model_folder: Path, tmp_path: Path) -> None:
    job = job_on(tmp_path, model_folder, "rows.csv", csv_text([1, 2]), score={"rolling": True})
    job.write_text(job.read_text().replace("generate:\n  max_tokens: 8\n", ""))
    assert exit_code_of("run", job, "--quiet") == 0
    (tmp_path / "rows.csv").write_text(csv_text([1, 2, "A7"]))
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_metrics(tmp_path / "out")["rows_resumed"] == 2


# Values that Python, or the type of the whole input, cannot hold


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1_500_000_000_123_456_789, 1_500_000_000_123_456_000], pa.timestamp("ns")),
        pa.array([1_500_000_000_123_456_789, None, 7], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([date(2024, 2, 29), None], pa.date32())
        .cast(pa.int32())
        .fill_null(2**31 - 1)
        .cast(pa.date32()),
    ],
    ids=["nanoseconds", "time zone", "year 5881580"],
)
def test_times_that_python_cannot_hold_are_ids(
    model_folder: Path, tmp_path: Path, ids: pa.Array, score: bool
) -> None:
    rows = pa.table({"id": ids, "prompt": ["What is it?"] * len(ids)})
    job = make_job(
        tmp_path, model_folder, rows, generate=SAMPLED, **({"score": {"rolling": True}} if score else {})
    )
    if score:
        job.write_text(job.read_text().replace("generate:\n  max_tokens: 6\n  temperature: 1.0\n", ""))
    for resumed in (0, len(ids)):
        assert exit_code_of("run", job, "--quiet") == (3 if ids.null_count else 0)
        assert read_metrics(tmp_path / "out")["rows_resumed"] == resumed
    assert (
        pq.read_table(tmp_path / "out" / "part-00000.parquet")["id"].to_numpy().tolist()
        == ids.to_numpy(zero_copy_only=False).tolist()
    )


def test_a_value_that_does_not_fit_costs_its_row(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    prompts = ["What is it?", "Is it?"]
    pq.write_table(pa.table({"id": ["a", "b"], "prompt": prompts, "x": [2**60 + 1, 2]}), folder / "a.parquet")
    pq.write_table(pa.table({"id": ["c", "d"], "prompt": prompts, "x": [0.5, None]}), folder / "b.parquet")
    job = job_on(tmp_path, model_folder, "rows", output={"keep": ["x"]})
    assert exit_code_of("run", job, "--quiet") == 3
    table = read_output(tmp_path / "out")
    assert table["error"].to_list() == ["column `x` holds a value that is no double", None, None, None]
    assert table["x"].to_list() == [None, 2.0, 0.5, None]
    assert exit_code_of("run", job, "--quiet", "--overwrite", "--set", "output.keep=[]") == 0
