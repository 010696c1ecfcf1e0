"""Jobs with a `score` section: continuations, choices and whole documents, resumed and with bad rows."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from batchllm import score_job as score_job_module
from batchllm.core import PromptTable, SamplingParams
from batchllm.dataset.keys import make_requests
from batchllm.dataset.results import ResultStore
from batchllm.score_rows import ScoreRows
from batchllm.scoring import TokenSpan, joined_tables, mixed_table
from tests.executor.test_gate import longrope
from tests.jobs import exit_code_of, make_job, read_metrics, read_output, save_model
from tests.tiny_tokenizer import EOS, VOCABULARY, byte_tokenizer

PROMPT = "Everybody agreed on this before. Question {{ number }}: where is it? Answer:"


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "id": f"row-{number}",
            "number": number,
            "options": [" here", " there", f" at {number}"],
            "gold": f" {number}",
        }
        for number in range(count)
    ]


def context(number: int) -> str:
    return PROMPT.replace("{{ number }}", str(number))


def dense(model: Path, tokens: list[int], first: int) -> tuple[np.ndarray, bool]:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = torch.log_softmax(plain(torch.tensor([tokens[:-1]])).logits[0].double(), -1)[first - 1 :]
    target = torch.tensor(tokens[first:])
    return logprobs.gather(1, target[:, None])[:, 0].numpy(), bool((logprobs.argmax(-1) == target).all())


def score_job(folder: Path, model: Path, score: dict[str, Any], table: Any = None, **sections: Any) -> Path:
    sections.setdefault("prompt", {"text": PROMPT})
    job = make_job(folder, model, table or rows(), score=score, **sections)
    values = yaml.safe_load(job.read_text())
    del values["generate"]
    job.write_text(yaml.safe_dump(values, sort_keys=False))
    return job


def output(job: Path) -> pl.DataFrame:
    return read_output(job.parent / "out")


def metrics(job: Path) -> dict[str, Any]:
    return read_metrics(job.parent / "out")


def test_choices_become_rows_with_their_scores(model_folder: Path, tmp_path: Path) -> None:
    job = score_job(tmp_path, model_folder, {"choices": "options", "token_logprobs": True})
    assert exit_code_of("run", str(job), "--quiet") == 0
    table = output(job)
    assert table["choice"].to_list() == [choice for row in rows() for choice in row["options"]]
    assert table["choice_index"].to_list() == [0, 1, 2] * 6
    tokenizer = byte_tokenizer()
    for answer in table.iter_rows(named=True):
        number = int(answer["id"].removeprefix("row-"))
        before = tokenizer(context(number))["input_ids"]
        tokens = tokenizer(context(number) + answer["choice"])["input_ids"]
        logprobs, greedy = dense(model_folder, tokens, len(before))
        np.testing.assert_allclose(answer["logprobs"], logprobs, atol=1e-4)
        assert answer["logprob"] == pytest.approx(logprobs.sum(), abs=1e-4)
        assert answer["is_greedy"] == greedy
        assert answer["output"] == answer["choice"]
        assert answer["output_tokens"] == tokens[len(before) :]
        assert answer["finish_reason"] == "scored"
        assert answer["prompt_tokens"] == len(before)
    assert metrics(job)["prompt_tokens_computed"] < metrics(job)["prompt_tokens"] / 3


def test_a_continuation_of_columns_and_a_prompt_column(model_folder: Path, tmp_path: Path) -> None:
    one = score_job(tmp_path / "one", model_folder, {"continuation": "{{ gold }}!"})
    assert exit_code_of("run", str(one), "--quiet") == 0
    table = [{**row, "prompt": context(row["number"])} for row in rows()]
    other = score_job(
        tmp_path / "other", model_folder, {"continuation": "{{ gold }}!"}, table, prompt={"column": "prompt"}
    )
    assert exit_code_of("run", str(other), "--quiet") == 0
    assert output(one)["output"].to_list() == [f" {number}!" for number in range(6)]
    assert output(one)["logprob"].to_list() == pytest.approx(output(other)["logprob"].to_list())
    assert "logprobs" not in output(one).columns


def test_a_continuation_of_a_conversation(model_folder: Path, tmp_path: Path) -> None:
    prompt = {"messages": [{"role": "user", "content": "Where is {{ number }}?"}]}
    job = score_job(tmp_path, model_folder, {"continuation": "{{ gold }}."}, prompt=prompt)
    assert exit_code_of("run", str(job), "--quiet") == 0
    tokenizer = byte_tokenizer()
    for number, answer in enumerate(output(job).iter_rows(named=True)):
        asked = [{"role": "user", "content": f"Where is {number}?"}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        after = tokenizer(f" {number}.")["input_ids"]
        logprobs, greedy = dense(model_folder, [*before, *after], len(before))
        assert answer["output"] == f" {number}."
        assert answer["logprob"] == pytest.approx(logprobs.sum(), abs=1e-4)
        assert answer["is_greedy"] == greedy


def test_documents_are_scored_from_their_first_token(model_folder: Path, tmp_path: Path) -> None:
    table = [
        {"id": str(number), "text": f"Document {number}. " * (60 if number else 4)} for number in range(3)
    ]
    job = score_job(tmp_path, model_folder, {"rolling": True}, table, prompt={"column": "text"})
    assert exit_code_of("run", str(job), "--quiet") == 0
    found = output(job)
    tokenizer = byte_tokenizer()
    for row, answer in zip(table, found.iter_rows(named=True), strict=True):
        assert answer["output_tokens"] == tokenizer(row["text"])["input_ids"]
    short = tokenizer(table[0]["text"])["input_ids"]
    expected, _ = dense(model_folder, [tokenizer.eos_token_id, *short], 1)
    assert found["logprob"][0] == pytest.approx(expected.sum(), abs=1e-3)


def test_bad_rows_say_why_and_the_others_are_scored_once(model_folder: Path, tmp_path: Path) -> None:
    table = rows()
    table[1]["options"] = []
    table[2]["options"] = [" here", ""]
    table[3]["options"] = [" x" * 400, " here"]
    table[4]["options"] = None
    job = score_job(tmp_path, model_folder, {"choices": "options"}, table)
    assert exit_code_of("run", str(job), "--quiet") == 3
    found = output(job)
    errors = {
        (answer["id"], answer["choice_index"]): answer["error"]
        for answer in found.iter_rows(named=True)
        if answer["error"]
    }
    assert set(errors) == {("row-1", None), ("row-2", 1), ("row-3", 0), ("row-4", None)}
    assert errors["row-1", None] == "column `options` has no choices"
    assert errors["row-2", 1].startswith("score.continuation: the continuation adds no token")
    assert "the model can score at most" in errors["row-3", 0]
    assert "null" in errors["row-4", None]
    assert found.filter(pl.col("error").is_null())["logprob"].is_not_null().all()
    assert exit_code_of("run", str(job), "--quiet") == 3  # nothing is left to do
    assert metrics(job)["rows_resumed"] == len(found)
    assert metrics(job)["steps"] == 0


def test_an_interrupted_job_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = score_job(
        tmp_path,
        model_folder,
        {"choices": "options"},
        rows(30),
        engine={"kv_memory": "64KiB", "max_step_tokens": 64},
    )
    add = ResultStore.add

    def interrupt(self: ResultStore, results: Any) -> None:
        add(self, results)
        if self.done.sum() >= 20:
            answered.append(int(self.done.sum()))
            raise KeyboardInterrupt

    answered: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "add", interrupt)
        assert exit_code_of("run", str(job), "--quiet") == 130
    assert exit_code_of("run", str(job), "--quiet") == 0
    assert [metrics(job)["rows_resumed"]] == answered and answered[0] < 90
    whole = score_job(tmp_path / "whole", model_folder, {"choices": "options"}, rows(30))
    assert exit_code_of("run", str(whole), "--quiet") == 0
    np.testing.assert_allclose(output(job)["logprob"], output(whole)["logprob"], atol=1e-4)
    assert output(job)["choice"].to_list() == output(whole)["choice"].to_list()


def documents(lengths: list[int]) -> list[dict[str, str]]:
    """In sentences of about 12 tokens."""
    return [
        {"id": str(number), "text": f"Document {number}. " * length} for number, length in enumerate(lengths)
    ]


def test_rows_in_chunks_are_scored_as_in_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folder, tokens in (("one", 1 << 20), ("chunks", 700), ("each", 1)):
        monkeypatch.setattr(score_job_module, "_CHUNK_TOKENS", tokens)
        table = documents([4, 60, 100, 1, 50])
        job = score_job(tmp_path / folder, model_folder, {"rolling": True}, table, prompt={"column": "text"})
        assert exit_code_of("run", str(job), "--quiet") == 0
        found.append(output(job))
    np.testing.assert_allclose(found[1]["logprob"], found[0]["logprob"], atol=1e-4)
    np.testing.assert_allclose(found[2]["logprob"], found[0]["logprob"], atol=1e-4)
    assert found[1].drop("logprob", "shared_tokens").equals(found[0].drop("logprob", "shared_tokens"))


def test_joined_tables_are_the_table_of_all() -> None:
    spans = [
        TokenSpan([1, 2, 3], 1),
        TokenSpan([4, 99], 1),
        TokenSpan([5, 6], 1),
        TokenSpan([7, 8, 9, 98], 2),
    ]
    whole, scored = mixed_table(spans, 8, 50)
    parts = [mixed_table(spans[start:end], 8, 50) for start, end in ((0, 1), (1, 1), (1, 3), (3, 4))]
    joined, joined_scored = joined_tables(parts)
    for field in ("tokens", "offsets", "params_of"):
        np.testing.assert_array_equal(getattr(joined, field), getattr(whole, field))
        assert getattr(joined, field).dtype == getattr(whole, field).dtype
    assert (joined.params, joined.faults, sorted(joined.faults)) == (whole.params, whole.faults, [1, 3])
    np.testing.assert_array_equal(joined_scored.first, scored.first)
    np.testing.assert_array_equal(joined_scored.last, scored.last)


def test_spans_take_little_memory() -> None:
    """Less than Python's own numbers for the tokens would."""
    rows, length = 2000, 1000
    tokens = np.arange(rows * length, dtype=np.int32) % 1000 + 1000
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    table = PromptTable(tokens, offsets, (SamplingParams(),), np.zeros(rows, np.int32), {})
    kept = pa.table({"id": range(rows)})
    score_rows = ScoreRows(table, np.full(rows, length - 1), kept, kept.column("id"))
    requests = make_requests(table, None, b"")
    tracemalloc.start()
    spans = score_job_module._Spans(score_rows, requests, np.ones(rows, dtype=bool), 0, length, 2000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spans.table.num_rows == rows
    assert held < 8 * len(tokens)


def test_answers_are_written_when_old_and_not_when_the_next_one_comes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is asked after every step, also when no document has ended in it."""
    counts: list[int] = []
    add = ResultStore.add

    def counted(self: ResultStore, results: Any) -> None:
        counts.append(len(results))
        add(self, results)

    monkeypatch.setattr(ResultStore, "add", counted)
    engine = {"max_step_tokens": 64}
    table, prompt = documents([2, 60]), {"column": "text"}
    job = score_job(tmp_path, model_folder, {"rolling": True}, table, prompt=prompt, engine=engine)
    assert exit_code_of("run", str(job), "--quiet") == 0
    assert len(counts) >= metrics(job)["steps"] > 5
    assert counts.count(1) == 2


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"output": {"keep": ["logprob"]}}, "output.keep: the input column 'logprob' has the name"),
        ({"output": {"keep": ["output"]}}, "output.keep: the input column 'output' has the name"),
        ({"input": {"id": "output"}}, "input.id: the column 'output', which is copied to the output, has"),
    ],
)
def test_columns_with_names_of_ours_are_refused_before_anything_is_read(
    sections: dict[str, Any],
    sentence: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = [{**row, "logprob": 1.0, "output": "x"} for row in rows()]
    job = score_job(tmp_path, model_folder, {"choices": "options"}, table, **sections)
    monkeypatch.setattr(score_job_module, "load_score_rows", None)
    assert exit_code_of("run", str(job), "--quiet") == 2
    assert f"error: {job}: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("score", "sections", "sentence"),
    [
        ({}, {}, "score must have rolling: true, or continuation or choices, found neither"),
        ({"rolling": True, "choices": "options"}, {}, "found both"),
        ({"choices": "optoins"}, {}, "score.choices: there is no column `optoins`; did you mean"),
        ({"choices": "gold"}, {}, "score.choices: `gold` holds string, and choices are a list of texts"),
        ({"continuation": "{{ glod }}"}, {}, "uses `glod`, which is no column"),
        ({"choice": "options"}, {}, "score.choice is not a known key; did you mean score.choices?"),
        (
            {"choices": "options"},
            {"prompt": {"text": "{{ number }}{{ options }}", "reorder": ["number", "options"]}},
            "prompt.reorder cannot",
        ),
        ({"choices": "options"}, {"plan": {"sample_rows": 3}}, "plan cannot be together with score"),
    ],
)
def test_a_score_job_that_cannot_start(
    score: dict[str, Any],
    sections: dict[str, Any],
    sentence: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = score_job(tmp_path, model_folder, score, **sections)
    assert exit_code_of("run", str(job), "--quiet") == 2
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_scoring_does_not_go_with_generation(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, rows(), prompt={"text": PROMPT}, score={"choices": "options"})
    assert exit_code_of("run", str(job), "--quiet") == 2
    assert "generate cannot be together with score" in capsys.readouterr().err
    assert exit_code_of("plan", str(job)) == 2


def test_what_a_model_is_exact_for_bounds_windows_and_pairs(tmp_path: Path) -> None:
    """A long text stops no job; a long document is scored in windows that are exact."""
    config = longrope()  # up to 48 tokens
    config.vocab_size = VOCABULARY
    model = save_model(tmp_path / "model", config=config)
    documents = [{"id": str(n), "number": n, "text": "a long story " * n} for n in (2, 8)]
    prompt = {"text": "{{ text }}"}
    job = score_job(tmp_path / "rolling", model, {"rolling": True}, documents, prompt=prompt)
    assert exit_code_of("run", job, "--quiet") == 0
    tokens = byte_tokenizer()(documents[1]["text"])["input_ids"]
    windows_of = [([EOS, *tokens[:48]], 1), (tokens[47:96], 1), (tokens[-49:], 49 - (len(tokens) - 96))]
    expected = sum(dense(model, window, first)[0].sum() for window, first in windows_of)
    assert output(job)["logprob"][1] == pytest.approx(expected, abs=1e-3)
    pairs = score_job(
        tmp_path / "pairs", model, {"continuation": " end"}, documents, prompt={"text": "{{ text }}|"}
    )
    assert exit_code_of("run", pairs, "--quiet") == 3
    short, long = output(pairs)["error"]
    assert short is None and "the model can score at most 49" in long
