"""A whole job: right answers in input order, whatever the schedule; and what a change between runs does."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import batchllm
from batchllm.executor.engine import Engine
from batchllm.report.progress import Stage
from tests.executor.test_model_folder import one_weight
from tests.jobs import (
    KV_TOKEN_BYTES,
    exit_code_of,
    make_job,
    questions,
    read_metrics,
    read_output,
    texts,
    write_rows,
)
from tests.tiny_tokenizer import EOS, byte_tokenizer

ROWS = 24
SAMPLING: Mapping[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "n": 2, "max_tokens": 16}
GREEDY: Mapping[str, Any] = {"max_tokens": 16}
LONGEST = max(len(row["prompt"]) for row in questions(ROWS)) + 16


def run(job: Path, *arguments: object, code: int = 0) -> dict[tuple[str, int], str]:
    assert exit_code_of("run", job, "--quiet", *arguments) == code
    return texts(job.parent / "out")


# ---- right answers


def test_greedy_answers_are_those_of_transformers(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS), generate=GREEDY)
    run(job)
    table = read_output(tmp_path / "out")
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for row, answer in zip(questions(ROWS), table.iter_rows(named=True), strict=True):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
        expected = output[0, ids.shape[1] :].tolist()
        assert answer["id"] == row["id"]
        assert answer["output_tokens"] == expected
        assert answer["output"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["finish_reason"] == ("stop" if expected[-1] == EOS else "length")
        assert answer["prompt_tokens"] == ids.shape[1]


def test_chat_goes_through_the_chat_template(model_folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ prompt }}"}]
    chat = make_job(tmp_path / "chat", model_folder, questions(4), prompt={"messages": messages})
    template = "[system] Be brief.\n[user] {{ prompt }}\n[assistant] "
    text = make_job(tmp_path / "text", model_folder, questions(4), prompt={"text": template})
    assert run(chat) == run(text)


def test_kept_columns_and_what_the_metrics_say(model_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "gold": number} for number, row in enumerate(questions(ROWS))]
    job = make_job(tmp_path, model_folder, rows, output={"keep": ["gold"], "part_rows": 10})
    run(job)
    table, metrics = read_output(tmp_path / "out"), read_metrics(tmp_path / "out")
    assert table["gold"].to_list() == list(range(ROWS))
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert metrics["rows_ok"] == ROWS
    assert metrics["output_tokens"] == table["output_tokens"].list.len().sum()
    assert metrics["prompt_tokens"] == table["prompt_tokens"].sum()
    assert metrics["prompt_tokens_computed"] == metrics["predicted"]["prompt_tokens_computed"]
    saved = metrics["prompt_tokens"] - metrics["prompt_tokens_computed"]
    assert saved == table["shared_tokens"].sum() > 0
    assert set(metrics["seconds"]) == {"load", "tokenize", "plan", "run", "write"}
    assert 0 < metrics["kv_peak_bytes"] <= metrics["kv_budget_bytes"] == 4 * 2**20
    resolved = yaml.safe_load((tmp_path / "out" / "_run" / "job.yaml").read_text())
    assert resolved["generate"]["max_tokens"] == 8


def test_the_python_call(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(6))
    result = batchllm.run(job, {"generate.max_tokens": 3}, quiet=True)
    table = result.table.collect()
    assert table["id"].to_list() == [f"row-{number}" for number in range(6)]
    assert table["output_tokens"].list.len().max() <= 3
    assert (result.exit_code, result.metrics.rows_ok) == (0, 6)


def test_ctrl_c_stops_the_script_that_called(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, model_folder, questions(6), engine={"max_step_tokens": 16})

    def interrupted(engine: Engine, original: Any = Engine.run) -> Iterator[list[Any]]:
        for finished in original(engine):
            yield finished
            if finished:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batchllm.run(job, quiet=True)
    assert 0 < len(texts(tmp_path / "out")) < 6
    assert batchllm.run(job, quiet=True).metrics.rows_ok == 6


# ---- the schedule changes nothing


@pytest.fixture(params=["sampled", "greedy"])
def generate(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    return SAMPLING if request.param == "sampled" else GREEDY


def test_samples_differ_and_seeds_count(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS), generate=SAMPLING)
    answers = run(job)
    assert len(answers) == 2 * ROWS
    assert sum(answers[id_, 0] != answers[id_, 1] for id_, sample in answers if not sample) > ROWS * 0.8
    other_seed = run(job, "--overwrite", "--set", "generate.seed=1")
    assert sum(answers[key] != other_seed[key] for key in answers) > 2 * ROWS * 0.8


def test_the_order_of_rows_changes_no_answer(
    model_folder: Path, tmp_path: Path, generate: Mapping[str, Any]
) -> None:
    rows = questions(ROWS)
    expected = run(make_job(tmp_path / "in-order", model_folder, rows, generate=generate))
    random.Random(3).shuffle(rows)
    job = make_job(tmp_path / "shuffled", model_folder, rows, generate=generate)
    assert run(job) == expected
    samples = generate.get("n", 1)
    in_input_order = [row["id"] for row in rows for _ in range(samples)]
    assert read_output(job.parent / "out")["id"].to_list() == in_input_order


@pytest.mark.parametrize(
    "engine",
    [
        {"kv_memory": 3 * LONGEST * KV_TOKEN_BYTES},
        {"kv_memory": (LONGEST + 24) * KV_TOKEN_BYTES},
        {"max_step_tokens": 7},
        {"max_step_tokens": 33, "min_shared_tokens": 1000, "order": "input"},
    ],
    ids=["less memory", "least memory", "tiny steps", "nothing shared"],
)
def test_memory_and_step_size_change_no_answer(
    model_folder: Path, tmp_path: Path, generate: Mapping[str, Any], engine: Mapping[str, Any]
) -> None:
    expected = run(make_job(tmp_path / "wide", model_folder, questions(ROWS), generate=generate))
    job = make_job(tmp_path / "narrow", model_folder, questions(ROWS), generate=generate, engine=engine)
    assert run(job) == expected
    metrics = read_metrics(job.parent / "out")
    assert metrics["kv_peak_bytes"] <= metrics["kv_budget_bytes"]


def test_stepping_back_changes_no_answer(
    model_folder: Path, tmp_path: Path, generate: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is overbooked because every output is expected to end at once."""
    from batchllm.planner.lengths import LengthEstimator

    expected = run(make_job(tmp_path / "wide", model_folder, questions(ROWS), generate=generate))
    monkeypatch.setattr(LengthEstimator, "estimate", lambda self, params, decoded, *others: decoded * 0 + 1)
    engine = {"kv_memory": 2 * LONGEST * KV_TOKEN_BYTES}
    job = make_job(tmp_path / "narrow", model_folder, questions(ROWS), generate=generate, engine=engine)
    assert run(job) == expected
    assert read_metrics(job.parent / "out")["preemptions"] > 0


def test_a_run_in_two_halves_changes_no_answer(
    model_folder: Path, tmp_path: Path, generate: Mapping[str, Any]
) -> None:
    expected = run(make_job(tmp_path / "whole", model_folder, questions(ROWS), generate=generate))
    job = make_job(tmp_path / "halves", model_folder, questions(ROWS), generate=generate)
    run(job, "--limit", 11)
    assert run(job) == expected
    assert read_metrics(job.parent / "out")["rows_resumed"] == 11 * generate.get("n", 1)


def test_more_samples_keep_those_already_there(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(6), generate=SAMPLING)
    two = run(job)
    three = run(job, "--set", "generate.n=3")
    assert {key: three[key] for key in two} == two
    assert len(three) == 18
    assert read_metrics(tmp_path / "out")["rows_resumed"] == 12


@pytest.mark.parametrize("engine", [{}, {"min_shared_tokens": 1000}])
def test_the_tokens_of_a_run_come_to_what_was_foreseen(
    model_folder: Path, tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int | None]] = []
    update = Stage.update

    def noted(self: Stage, *args: Any, **options: Any) -> None:
        update(self, *args, **options)
        seen.append((self.tokens, self.total_tokens))

    monkeypatch.setattr(Stage, "update", noted)
    run(make_job(tmp_path, model_folder, questions(ROWS), generate={"max_tokens": 9}, engine=engine))
    metrics = read_metrics(tmp_path / "out")
    computed = metrics["prompt_tokens_computed"] + metrics["output_tokens"]
    assert seen[-1] == (computed, computed)
    assert computed <= seen[0][1] <= metrics["prompt_tokens_computed"] + 9 * ROWS


# ---- answers beside the input


@pytest.mark.parametrize("path", ["data", "data/**", "."])
@pytest.mark.parametrize("format", ["parquet", "ndjson", "csv"])
def test_answers_inside_the_input_folder_are_no_input(
    model_folder: Path, tmp_path: Path, format: str, path: str
) -> None:
    expected = run(make_job(tmp_path / "apart", model_folder, questions(6)))
    output = {"path": "data/answers", "cache": "data/cache"}
    job = make_job(tmp_path / "job", model_folder, questions(6), input={"path": path}, output=output)
    (tmp_path / "job" / "rows.parquet").unlink()
    (tmp_path / "job" / "data").mkdir()
    getattr(pl.DataFrame(questions(6)), f"write_{format}")(tmp_path / f"job/data/rows.{format}")
    for arguments, count in ((["--limit", 3], 3), ([], 6), ([], 6)):
        assert exit_code_of("run", job, "--quiet", *arguments) == 0
        assert texts(tmp_path / "job" / "data" / "answers") == dict([*expected.items()][:count])
    assert read_metrics(tmp_path / "job" / "data" / "answers")["rows_resumed"] == 6
    assert exit_code_of("plan", job, "--quiet") == 0


# ---- what changes between runs into the same folder


def notes_of(job: Path, capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert exit_code_of("run", job, *arguments) == 0
    output = capfd.readouterr()
    return output.out + output.err


def check_all_anew(job: Path, fresh: Path, notes: str, answers: int = ROWS) -> None:
    """The folder holds what a run into a new folder gives, and the change was noticed."""
    assert f"{answers} earlier answers no longer match" in notes
    assert read_metrics(job.parent / "out")["rows_resumed"] == 0
    shutil.copytree(job.parent, fresh, ignore=shutil.ignore_patterns("out"))
    assert run(fresh / "job.yaml") == texts(job.parent / "out")


def change(job: Path, section: str, **values: Any) -> None:
    content = yaml.safe_load(job.read_text())
    content.setdefault(section, {}).update(values)
    job.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("generate", {"max_tokens": 5}),
        ("generate", {"temperature": 0.9}),
        ("generate", {"top_k": 3}),
        ("generate", {"seed": 8}),
        ("generate", {"stop": ["a"]}),
        ("prompt", {"column": None, "text": "{{ prompt }} Answer:"}),
        ("model", {"dtype": "bfloat16"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_changed_setting_is_noticed(
    model_folder: Path,
    tmp_path: Path,
    section: str,
    values: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    generate = {"temperature": 0.7, "max_tokens": 6}
    job = make_job(tmp_path / "job", model_folder, questions(ROWS), generate=generate)
    before = run(job)
    change(job, section, **values)
    notes = notes_of(job, capfd)
    check_all_anew(job, tmp_path / "fresh", notes)
    assert texts(job.parent / "out") != before


def test_a_changed_model_is_noticed(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    job = make_job(tmp_path / "job", model, questions(ROWS))
    run(job)
    one_weight(model)
    check_all_anew(job, tmp_path / "fresh", notes_of(job, capfd))


def test_a_changed_prompt_costs_only_its_row(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, rows = make_job(tmp_path, model_folder, questions(ROWS)), questions(ROWS)
    before = run(job)
    rows[3]["prompt"] = "Something else entirely."
    write_rows(tmp_path / "rows.parquet", rows)
    assert "1 earlier answers no longer match" in notes_of(job, capfd)
    after = texts(tmp_path / "out")
    assert {key for key in after if after[key] != before[key]} == {("row-3", 0)}
    assert read_metrics(tmp_path / "out")["rows_resumed"] == ROWS - 1


def test_nothing_changed_nothing_is_said_or_computed(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS))
    run(job)
    assert "no longer match" not in notes_of(job, capfd)
    assert read_metrics(tmp_path / "out")["prompt_tokens_computed"] == 0


@pytest.mark.parametrize("detour", [["--limit", 3], ["--set", "generate.max_tokens=3"]])
def test_the_way_back_from_a_detour_costs_nothing(
    model_folder: Path, tmp_path: Path, detour: list[Any]
) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS))
    answers = run(job)
    there = run(job, *detour)
    assert len(there) == (3 if "--limit" in detour else ROWS)
    assert run(job) == answers
    metrics = read_metrics(tmp_path / "out")
    assert metrics["rows_resumed"] == ROWS
    assert "load" not in metrics["seconds"], "the model is not needed"
    assert run(job, *detour) == there
    assert "load" not in read_metrics(tmp_path / "out")["seconds"]


@pytest.mark.parametrize("engine", [{"max_step_tokens": 9}, {"kv_memory": "1MiB"}, {"order": "input"}])
def test_the_schedule_may_change_between_runs(
    model_folder: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """It is no part of the answer, so nothing is computed again."""
    job = make_job(tmp_path, model_folder, questions(6))
    run(job)
    change(job, "engine", **engine)
    run(job)
    assert read_metrics(tmp_path / "out")["rows_resumed"] == 6
