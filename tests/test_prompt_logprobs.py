"""`prompt_logprobs` in whole runs: job default, column, `LLM`, resume, the cache of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

import batchllm
from tests.jobs import exit_code_of, make_job, questions, read_metrics, read_output
from tests.tiny_tokenizer import byte_tokenizer

ROWS = [{**row, "top": top} for row, top in zip(questions(12), [None, 0, 2, None, 5, 1, 2, None, 3, 0, 1, 2])]


def dense(model: Path, prompt: str) -> np.ndarray:
    """[tokens - 1, vocabulary] by transformers, the prompt alone."""
    tokens = torch.tensor([byte_tokenizer()(prompt)["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(loaded(tokens).logits[0].double(), -1)[:-1].numpy()


def check(model: Path, row: dict[str, Any], top: int) -> None:
    """A row of the output with the column `prompt`."""
    tokens = byte_tokenizer()(row["prompt"])["input_ids"]
    expected = dense(model, row["prompt"])
    chosen, beside = row["prompt_logprobs"], row["prompt_top_logprobs"]
    assert [item["token"] for item in chosen] == tokens
    assert chosen[0]["logprob"] is None and beside[0] == []
    values = [item["logprob"] for item in chosen[1:]]
    np.testing.assert_allclose(values, expected[np.arange(len(expected)), tokens[1:]], atol=1e-4)
    assert {len(some) for some in beside[1:]} == {top}
    for some, logprobs in zip(beside[1:], expected):
        found = [item["logprob"] for item in some]
        np.testing.assert_allclose(found, -np.sort(-logprobs)[:top], atol=1e-4)
        np.testing.assert_allclose(found, logprobs[[item["token"] for item in some]], atol=1e-4)


def test_as_a_column_of_the_input(tmp_path: Path, model_folder: Path) -> None:
    duplicate = {**ROWS[2], "id": "again"}
    wrong = [{**ROWS[0], "id": "wrong", "top": 101}]
    sections = {"generate": {"prompt_logprobs": {"column": "top"}}, "output": {"keep": ["prompt", "top"]}}
    job = make_job(tmp_path, model_folder, [*ROWS, duplicate, *wrong], **sections)
    assert exit_code_of("run", job, "--quiet") == 3
    table = read_output(tmp_path / "out")
    plain = make_job(tmp_path / "plain", model_folder, ROWS)
    assert exit_code_of("run", plain, "--quiet") == 0
    texts = dict(read_output(tmp_path / "plain" / "out").select("id", "output").iter_rows())
    for row in table.iter_rows(named=True):
        if row["id"] == "wrong":
            assert row["error"].startswith(
                "column `top`: prompt_logprobs must be true, false or a whole number"
            )
        elif row["top"] is None:
            assert row["prompt_logprobs"] is row["prompt_top_logprobs"] is None
        else:
            check(model_folder, row, row["top"])
        assert row["id"] not in texts or row["output"] == texts[row["id"]]
    figures = read_metrics(tmp_path / "out")
    assert figures["prompt_tokens_computed"] == figures["distinct_prompt_tokens"]


@pytest.mark.parametrize(("given", "top"), [(True, 0), (3, 3)])
def test_as_the_default_of_a_job(tmp_path: Path, model_folder: Path, given: Any, top: int) -> None:
    sections = {"generate": {"prompt_logprobs": given, "n": 2, "temperature": 1.0}}
    job = make_job(tmp_path, model_folder, ROWS[:3], output={"keep": ["prompt"]}, **sections)
    assert exit_code_of("run", job, "--quiet") == 0
    table = read_output(tmp_path / "out")
    assert len(table) == 6
    for row in table.iter_rows(named=True):
        check(model_folder, row, top)


def test_answers_of_an_earlier_run_keep_theirs(tmp_path: Path, model_folder: Path) -> None:
    sections = {"generate": {"prompt_logprobs": 2}, "output": {"keep": ["prompt"], "cache": "cache"}}
    job = make_job(tmp_path, model_folder, ROWS, **sections)
    assert exit_code_of("run", job, "--quiet", "--set", "input.limit=5") == 0
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_metrics(tmp_path / "out")["rows_resumed"] == 5
    first = read_output(tmp_path / "out")
    for row in first.iter_rows(named=True):
        check(model_folder, row, 2)
    assert exit_code_of("run", job, "--quiet", "--set", "output.path=other") == 0
    other = read_output(tmp_path / "other")
    assert read_metrics(tmp_path / "other")["prompt_tokens_computed"] == 0  # all from the cache
    columns = ["id", "prompt_logprobs", "prompt_top_logprobs"]
    assert other.select(columns).equals(first.select(columns))
    # Without them it is another answer: nothing is carried over, and the columns go.
    assert exit_code_of("run", job, "--quiet", "--set", "generate.prompt_logprobs=false") == 0
    assert "prompt_logprobs" not in read_output(tmp_path / "out").columns


def test_from_python_as_vllm_gives_them(model_folder: Path) -> None:
    llm = batchllm.LLM(str(model_folder), min_shared_tokens=4)
    prompts = [row["prompt"] for row in ROWS[:4]]
    greedy = {"temperature": 0.0, "max_tokens": 3}
    asked = [batchllm.SamplingParams(**greedy, prompt_logprobs=top) for top in (2, None, 0, 2)]
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    assert outputs[1].prompt_logprobs is None
    for output, prompt, top in zip(outputs, prompts, (2, None, 0, 2)):
        if top is None:
            continue
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        expected = dense(model_folder, prompt)
        for token, found, logprobs in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], expected, strict=True
        ):
            assert found is not None and next(iter(found)) == token
            assert len(found) - top in (0, 1)
            assert {one.rank for one in found.values()} >= set(range(1, top + 1))
            for number, one in found.items():
                assert one.logprob == pytest.approx(logprobs[number], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"generate.prompt_logprobs": "many"},
            "generate.prompt_logprobs must be true, false or a whole number",
        ),
        ({"output.keep": "[prompt_logprobs]"}, "has the name of a column that the run adds"),
        (
            {"chunks.column": "passages", "chunks.store": "store"},
            "prompt_logprobs and chunks do not go together",
        ),
    ],
)
def test_what_does_not_go_together_is_said(
    tmp_path: Path,
    model_folder: Path,
    settings: dict[str, str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{**row, "prompt_logprobs": 1, "passages": ["x"]} for row in ROWS]
    job = make_job(tmp_path, model_folder, rows, generate={"prompt_logprobs": 1})
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    assert exit_code_of("run", job, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_empty_columns_are_readable(tmp_path: Path, model_folder: Path) -> None:
    """All rows are errors: the columns are there, and null."""
    sections = {"generate": {"prompt_logprobs": 1, "allowed_token_ids": [9999]}}
    job = make_job(tmp_path, model_folder, ROWS[:2], **sections)
    assert exit_code_of("run", job, "--quiet") == 3
    assert read_output(tmp_path / "out")["prompt_logprobs"].dtype == pl.List(
        pl.Struct({"token": pl.Int32, "logprob": pl.Float32})
    )
