"""`batchllm plan`: its figures are those of the run that follows, nothing is written, advice comes when it is due."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchllm.planner.plan_file import read_plan
from tests.jobs import exit_code_of, make_job, questions, read_metrics, read_output, write_rows
from tests.tiny_tokenizer import byte_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def config_only(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: planning must not need them."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def plan(job: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert exit_code_of("plan", job, "--json", *arguments) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def warnings_of(job: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return "\n".join(plan(job, capsys, *arguments)["warnings"])


def test_what_is_planned_is_what_happens(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, questions(60), generate={"max_tokens": 6, "ignore_eos": True})
    found = plan(job, capsys)
    assert exit_code_of("run", job) == 0
    summary = capsys.readouterr().out
    metrics = read_metrics(tmp_path / "out")
    (device,) = found["devices"]
    assert found["rows"] == found["requests"] == 60
    assert found["prompt_tokens"] == metrics["prompt_tokens"]
    assert found["optimum_tokens"] == metrics["distinct_prompt_tokens"]
    assert found["computed_tokens"] == metrics["prompt_tokens_computed"]
    assert found["output_tokens"] == metrics["output_tokens"] == 6 * found["sequences"]
    assert device["steps"] == metrics["steps"]
    assert device["kv_peak_bytes"] == metrics["kv_peak_bytes"]
    predicted = metrics["predicted"]
    assert (predicted["steps"], predicted["output_tokens"]) == (metrics["steps"], metrics["output_tokens"])
    assert predicted["mean_output_tokens"] == metrics["mean_output_tokens"] == 6
    assert predicted["kv_peak_bytes"] == metrics["kv_peak_bytes"]
    assert predicted["prompt_tokens_computed"] == metrics["prompt_tokens_computed"]
    assert predicted["seconds"] > 0
    assert re.search(r"predicted \d+\.\d s.*, took \d+\.\d s \([+-]\d+%\)", summary)


def test_a_run_leaves_its_plan(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(20), generate={"max_tokens": 2})
    assert exit_code_of("run", job, "--quiet") == 0
    left = read_plan(tmp_path / "out" / "_run" / "plan.parquet")
    assert left.stats.planned_tokens == read_metrics(tmp_path / "out")["prompt_tokens_computed"]
    assert sorted(left.request.tolist()) == list(range(20))


def test_passages_that_would_share_more_in_another_order(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [f"Passage {number} is about the number {number} and nothing else." for number in range(3)]
    rows = [
        {"id": str(row), "passages": known[row % 3 :] + known[: row % 3], "question": f"What is {row}?"}
        for row in range(30)
    ]
    text = "{% for passage in passages %}{{ passage }} {% endfor %}{{ question }}"
    job = make_job(tmp_path, config_only, rows, prompt={"text": text})
    # Three passages are computed once instead of once for each of the three orders: 6 of 90 are gained.
    assert "prompt.reorder: passages would share 7% more of their text" in warnings_of(job, capsys)
    assert "prompt.reorder" not in warnings_of(job, capsys, "--set", "prompt.reorder=passages")


def test_columns_that_would_share_more_in_another_order(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": str(row), "name": f"Name {row}", "rule": "One long rule for all. " * 3} for row in range(30)
    ]
    job = make_job(tmp_path, config_only, rows, prompt={"text": "{{ name }} {{ rule }}"})
    assert re.search(r"prompt\.reorder: \[name, rule\] would share \d\d% more", warnings_of(job, capsys))
    job = make_job(tmp_path, config_only, rows, prompt={"text": "{{ rule }} {{ name }}"})
    assert not warnings_of(job, capsys)


def test_devices_and_workers_as_json(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, config_only, questions(20))
    one, eight = (
        plan(job, capsys, "--hardware", "h200", "--workers", workers)["devices"] for workers in (1, 8)
    )
    assert [device["name"] for device in eight] == [device["name"] for device in one]
    assert eight[1]["name"] == "H200 SXM"
    assert (one[1]["workers"], eight[1]["workers"]) == (1, 8)
    assert one[1]["seconds"] / 8 < eight[1]["seconds"] < one[1]["seconds"]
    # The beginning of all questions is computed eight times.
    assert eight[1]["computed_tokens"] > one[1]["computed_tokens"] + 7 * 30


def test_nothing_is_written_and_no_weights_are_needed(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, config_only, questions(20))
    before = sorted(tmp_path.rglob("*"))
    assert exit_code_of("plan", job, "--hardware", "h200,A100", "--workers", 4) == 0
    assert sorted(tmp_path.rglob("*")) == before
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert output.splitlines()[1].startswith("rows           20")
    assert "4 x H200 SXM" in output
    assert "4 x A100 SXM 80 GB" in output
    assert "nothing was written" in output


def test_a_run_is_not_given_up_because_it_cannot_be_foreseen(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no steps")

    monkeypatch.setattr("batchllm.execution.forecast_run", fail)
    job = make_job(tmp_path, model_folder, questions(4))
    assert exit_code_of("run", job) == 0
    captured = capsys.readouterr()
    assert "no prediction of time and memory: no steps" in captured.err
    assert "predicted" not in captured.out
    assert read_metrics(tmp_path / "out")["predicted"] == {}


def test_levels_and_prefixes(config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instructions, topics = "Read the text and answer. ", ["on harbours: ", "on rivers: ", "on clouds: "]
    prompts = [f"{instructions}{topic}{number}{number}" for topic in topics for number in range(1, 5)]
    rows = [{"id": str(number), "prompt": prompt} for number, prompt in enumerate(prompts)]
    found = plan(make_job(tmp_path, config_only, rows), capsys, "--set", "engine.min_shared_tokens=8")
    shared = len(instructions) + len("on ")
    assert [level["prefixes"] for level in found["levels"]] == [1, 3]
    assert found["levels"][0] == {
        "prefixes": 1, "sequences": 12, "tokens": shared, "saved_tokens": 11 * shared,
    }  # fmt: skip
    first, second, *_ = found["prefixes"]
    assert first["text"] == f"{instructions}on"
    assert (second["level"], second["sequences"]) == (1, 4)
    assert second["saved_tokens"] == 3 * second["own_tokens"]
    assert second["text"] in ("harbours:", "rivers:", "clouds:")


def test_history_gives_lengths_and_a_lower_limit(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, questions(20), generate={"max_tokens": 5, "ignore_eos": True})
    assert exit_code_of("run", job, "--quiet") == 0
    out = tmp_path / "out"
    again = ("--set", f"plan.history={out}", "--set", "generate.ignore_eos=false")
    # The answers were cut off at 5: with a higher limit they are taken to go on.
    assert plan(job, capsys, *again, "--set", "generate.max_tokens=64")["output_tokens"] == 20 * 64
    for part in out.glob("*.parquet"):
        _as_if_stopped(part)
    found = plan(job, capsys, *again, "--set", "generate.max_tokens=64")
    assert found["output_tokens"] == 20 * 5
    assert found["output_source"] == f"from {out}"
    assert (
        "generate.max_tokens is 64, and 99% of the earlier answers have at most 5 tokens"
        in found["warnings"][0]
    )
    assert not plan(job, capsys, *again, "--set", "generate.max_tokens=12")["warnings"]
    assert exit_code_of("plan", job, "--set", "plan.history=nowhere") == 2


def _as_if_stopped(part: Path) -> None:
    import polars as pl

    pl.read_parquet(part).with_columns(finish_reason=pl.lit("stop")).write_parquet(part)


def test_user_errors(config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path, config_only, questions(3))
    for arguments, message in (
        (["--hardware", "h20O"], "--hardware: h20O is not a device with a ready profile; did you mean h200?"),
        (["--set", "prompt.column=prompts"], "there is no column `prompts`"),
        (["--set", "model.path=./gone"], "model.path names no folder"),
    ):
        assert exit_code_of("plan", job, *arguments) == 2
        assert message in capsys.readouterr().err


# ---- advice


def test_constant_text_behind_what_varies(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = "Answer in one word, and do not explain what you think. " * 2
    rows = [{"id": str(number), "question": f"{number * 7919 % 10007}?"} for number in range(30)]
    job = make_job(tmp_path, config_only, rows, prompt={"text": "{{ question }} " + rules})
    said = warnings_of(job, capsys)
    assert re.search(
        rf"{{{{ question }}}} comes before {len(rules) + 1} characters .* put those first and 9\d%", said
    )
    assert "instead of" in said
    turned = make_job(tmp_path, config_only, rows, prompt={"text": rules + "{{ question }}"})
    assert warnings_of(turned, capsys) == ""


def test_a_chat_template_with_something_of_its_own_in_front(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [
        {"role": "system", "content": "You answer questions on ships, rivers and clouds in one word."},
        {"role": "user", "content": "{{ question }}"},
    ]
    rows = [{"id": str(number), "question": f"{number}?"} for number in range(10)]
    prompt = {"messages": messages}
    assert warnings_of(make_job(tmp_path, config_only, rows, prompt=prompt), capsys) == ""

    model = tmp_path / "model"
    shutil.copytree(config_only, model)
    body = byte_tokenizer().chat_template
    _set_template(model, "{{ messages[1]['content'] | length }}{{ messages[1]['content'] }}|" + body)
    said = warnings_of(make_job(tmp_path, model, rows, prompt=prompt), capsys)
    assert "the chat template puts something that differs" in said
    _set_template(model, "{{ strftime_now('%d %b %Y') }} " + body)
    said = warnings_of(make_job(tmp_path, model, rows, prompt=prompt), capsys)
    assert "writes today's date" in said


def _set_template(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)


def test_rows_that_do_not_fit(config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(number), "prompt": "x" * length} for number, length in enumerate([20, 505, 600, 300])]
    job = make_job(tmp_path, config_only, rows, generate={"max_tokens": 16})
    said = warnings_of(job, capsys)
    assert "1 rows cannot be answered; 1 because the prompt has 600 tokens" in said
    assert "1 rows leave room for fewer than max_tokens output tokens" in said
    said = warnings_of(job, capsys, "--set", "engine.kv_memory=65536")
    assert "2 prompts do not fit in the KV memory of CPU" in said


def test_weights_that_do_not_fit(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(config_only, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 32_768, "intermediate_size": 131_072, "num_hidden_layers": 10}
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": 256, "head_dim": 128}))
    job = make_job(tmp_path, model, questions(4), engine={"kv_memory": "auto"})
    assert exit_code_of("plan", job, "--hardware", "l40s") == 0
    output = capsys.readouterr().out
    assert "weights do not fit on L40S" in " ".join(output.split())
    assert re.search(r"L40S +no room: the weights take [\d.,]+ GiB", output)


def test_a_plan_refuses_the_rows_that_the_run_refuses(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For what they ask for, too."""
    rows = [
        {"id": str(number), "prompt": f"{number}?", "tokens": tokens, "pattern": pattern}
        for number, (tokens, pattern) in enumerate(
            [([65], "A*"), ([70_000], "A*"), ([65], "a(b"), ([66], "B+")]
        )
    ]
    generate = {"allowed_token_ids": {"column": "tokens"}, "regex": {"column": "pattern"}}
    job = make_job(tmp_path, model_folder, rows, generate=generate)
    found = plan(job, capsys)
    assert found["faulty_rows"] == 2
    assert any("2 rows cannot be answered" in warning for warning in found["warnings"])
    assert exit_code_of("run", job, "--quiet") == 3
    errors = read_output(tmp_path / "out")["error"].to_list()
    assert [error is None for error in errors].count(False) >= 2
    assert errors[1].startswith("generate.allowed_token_ids names token 70,000")
    assert errors[2].startswith("generate.regex cannot be used")


def test_what_the_generation_config_would_do_is_said(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run and in it, unless the job says how it wants it."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    stated = {"repetition_penalty": 1.05, "suppress_tokens": [5, 6], "forced_eos_token_id": 0}
    (model / "generation_config.json").write_text(json.dumps({**stated, "temperature": 0.7, "top_k": 20}))
    job = make_job(tmp_path / "job", model, questions(3))
    sentences = [
        "The model's generation_config.json states repetition_penalty 1.05, which transformers' generate applies "
        "and BatchLLM does not; generate.repetition_penalty sets it.",
        "The model's generation_config.json states suppress_tokens, which transformers' generate applies and "
        "BatchLLM does not; generate.logit_bias sets it.",
        "The model's generation_config.json states forced_eos_token_id 0, which transformers' generate applies and "
        "BatchLLM does not; there is no parameter for it.",
    ]
    assert plan(job, capsys)["warnings"] == sentences
    assert exit_code_of("run", job) == 0
    said = capsys.readouterr().err
    assert all(sentence in said for sentence in sentences)
    assert plan(job, capsys, "--set", "generate.repetition_penalty=1")["warnings"] == sentences[1:]


# ---- a real set


@pytest.mark.skipif(not (DATA / "bbh").is_dir(), reason="../shared/data has no bbh")
def test_bbh_first_screen(tmp_path: Path) -> None:
    """A tenth of the rows, in a process of its own, as a person would run it."""
    from transformers import Phi3Config

    from tests.test_sharing_bbh import TOKENIZER, shuffled_rows

    rows = shuffled_rows()
    write_rows(tmp_path / "rows.parquet", rows)
    config = Phi3Config(num_hidden_layers=2, hidden_size=64, intermediate_size=64, pad_token_id=0)
    config.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, tmp_path / "model" / name)
    job = {
        "model": {"path": "model"},
        "input": {"path": "rows.parquet"},
        "prompt": {"column": "prompt"},
        "output": {"path": "out"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "batchllm.cli", "plan", str(tmp_path / "job.yaml"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"rows           {len(rows)}")
    assert re.search(r"to compute .*\((8[5-9]|9\d)\.\d% saved by sharing\)", lines[3])
    assert (
        len([line for line in lines if "..." in line]) >= 10
    )  # the biggest prefixes, with their first words
    assert not (tmp_path / "out").exists()
