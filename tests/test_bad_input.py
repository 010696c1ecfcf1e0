"""One bad row never stops a job; one bad job never starts, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import torch
import transformers as hf

from batchllm.executor import attention_cpu
from tests.executor.test_gate import dynamic_rope, llama4, longrope
from tests.executor.test_model_folder import DAMAGES, Damage
from tests.executor.tiny_models import COMMON, make_model
from tests.jobs import (
    KV_TOKEN_BYTES,
    MODEL,
    exit_code_of,
    make_job,
    questions,
    read_metrics,
    read_output,
    save_model,
    texts,
)
from tests.tiny_tokenizer import byte_tokenizer

GOOD = ["What is it?", "Is it?"]


def run_rows(
    folder: Path, model: Path, prompts: list[Any], code: int = 3, **sections: Mapping[str, Any]
) -> pl.DataFrame:
    """Runs prompts between two good ones and checks that those are answered; returns the others' rows."""
    rows = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate([GOOD[0], *prompts, GOOD[1]])]
    job = make_job(folder, model, rows, **sections)
    assert exit_code_of("run", job, "--quiet") == code
    table = read_output(folder / "out")
    assert table["id"].to_list() == [row["id"] for row in rows]
    good, bad = table[[0, -1]], table[1:-1]
    assert good["finish_reason"].is_in(["stop", "length"]).all()
    assert good["error"].is_null().all() and good["output"].is_not_null().all()
    metrics = read_metrics(folder / "out")
    assert metrics["rows_ok"] == (table["finish_reason"] != "error").sum()
    assert metrics["rows_error"] == (table["finish_reason"] == "error").sum()
    return bad


def check_errors(bad: pl.DataFrame, reason: str) -> None:
    assert (bad["finish_reason"] == "error").all()
    assert bad["output"].is_null().all()
    assert (bad["output_tokens"].list.len() == 0).all()
    assert bad["error"].str.contains(reason).all(), bad["error"].to_list()


def test_null(model_folder: Path, tmp_path: Path) -> None:
    check_errors(run_rows(tmp_path, model_folder, [None, None]), "`prompt` is null")


def test_empty_prompt(model_folder: Path, tmp_path: Path) -> None:
    check_errors(run_rows(tmp_path, model_folder, [""]), "the prompt is empty")


def test_prompt_longer_than_the_model(model_folder: Path, tmp_path: Path) -> None:
    limit = MODEL["max_position_embeddings"]
    bad = run_rows(tmp_path, model_folder, ["x" * limit, "y" * 5000])
    check_errors(bad, "the model reads at most 511")
    assert bad["prompt_tokens"].to_list() == [limit, 5000]


def test_the_longest_prompt_the_model_reads_is_answered(model_folder: Path, tmp_path: Path) -> None:
    longest = "x" * (MODEL["max_position_embeddings"] - 1)
    answered = run_rows(tmp_path, model_folder, [longest], code=0)
    assert answered["output_tokens"].list.len().to_list() == [1]


def test_prompt_longer_than_kv_memory(model_folder: Path, tmp_path: Path) -> None:
    bad = run_rows(tmp_path, model_folder, ["x" * 150], engine={"kv_memory": 100 * KV_TOKEN_BYTES})
    check_errors(bad, "does not fit in KV memory, which holds 100 tokens; raise engine.kv_memory")


def test_output_that_outgrows_kv_memory(model_folder: Path, tmp_path: Path) -> None:
    """The prompt fits, and its answer does not."""
    bad = run_rows(
        tmp_path,
        model_folder,
        ["x" * 90],
        engine={"kv_memory": 100 * KV_TOKEN_BYTES},
        generate={"max_tokens": 40, "ignore_eos": True},
    )
    check_errors(bad, "KV memory")


def test_invalid_utf8(model_folder: Path, tmp_path: Path) -> None:
    raw = [GOOD[0].encode(), b"caf\xe9 \xff\xfe", GOOD[1].encode()]
    text = pa.Array.from_buffers(pa.string(), 3, pa.array(raw, pa.binary()).buffers())
    rows = pa.table({"id": ["0", "1", "2"], "prompt": text})
    job = make_job(tmp_path, model_folder, rows)
    assert exit_code_of("run", job, "--quiet") == 3
    table = read_output(tmp_path / "out")
    check_errors(table[1:2], "not valid UTF-8")
    assert table["finish_reason"].to_list().count("error") == 1


def test_template_error(model_folder: Path, tmp_path: Path) -> None:
    bad = run_rows(
        tmp_path,
        model_folder,
        ["x"],
        prompt={"text": "{% if prompt == 'x' %}{{ 1 / 0 }}{% endif %}{{ prompt }}"},
    )
    check_errors(bad, "zero")


def test_token_that_the_model_does_not_know(tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings, as after adding tokens to it."""
    model = save_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<<new>>"])
    tokenizer.save_pretrained(model)
    bad = run_rows(tmp_path, model, ["a <<new>> word"])
    check_errors(bad, "token id 262; the model knows 262 tokens")


def test_tokens_that_only_the_tokenizer_knows_ban_nothing(tmp_path: Path) -> None:
    """A word of such a token, a stop token and an end of text beyond the vocabulary: they never come anyway."""
    model = save_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<<new>>"])
    tokenizer.save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 128_009]}))
    rows = [
        {"id": "0", "prompt": GOOD[0], "words": ["<<new>>"], "ends": [1], "least": 0},
        {"id": "1", "prompt": GOOD[0], "words": ["q"], "ends": [128_010], "least": 1},
        {"id": "2", "prompt": GOOD[1], "words": ["q"], "ends": [1], "least": 2},
    ]
    columns = {"bad_words": "words", "stop_token_ids": "ends", "min_tokens": "least"}
    generate = {name: {"column": column} for name, column in columns.items()}
    code = exit_code_of("run", make_job(tmp_path / "job", model, rows, generate=generate), "--quiet")
    assert code == 0, read_output(tmp_path / "job" / "out")["error"].to_list()


def test_everything_at_once_and_again(model_folder: Path, tmp_path: Path) -> None:
    prompts = [None, "", "x" * 600, "fine"]
    bad = run_rows(tmp_path, model_folder, [*prompts, "y" * 700])
    assert bad["finish_reason"].to_list()[:3] == ["error"] * 3
    reasons = read_metrics(tmp_path / "out")["errors"]
    assert sorted(reasons.values()) == [1, 1, 2]
    assert max(reasons, key=reasons.__getitem__) == bad["error"][2], "two that differ in a number are one"
    assert exit_code_of("run", tmp_path / "job.yaml", "--quiet") == 3, "errors stay errors"
    assert read_metrics(tmp_path / "out")["errors"] == reasons
    assert len(read_output(tmp_path / "out")) == 7


def test_only_bad_rows_need_no_model(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, pa.table({"id": ["a"], "prompt": pa.array([None], pa.string())}))
    assert exit_code_of("run", job, "--quiet") == 3
    check_errors(read_output(tmp_path / "out"), "null")


@pytest.mark.parametrize("limit", [None, 0])
def test_no_rows_are_a_valid_empty_result(model_folder: Path, tmp_path: Path, limit: int | None) -> None:
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    rows = schema.empty_table() if limit is None else questions(3)
    job = make_job(tmp_path, model_folder, rows, input={"limit": limit})
    assert exit_code_of("run", job, "--quiet") == 0
    table = read_output(tmp_path / "out")
    assert len(table) == 0
    assert table.schema["output"] == pl.String
    assert table.schema["output_tokens"] == pl.List(pl.Int32)
    assert read_metrics(tmp_path / "out")["rows_ok"] == 0
    assert exit_code_of("run", job, "--quiet") == 0, "running it again changes nothing"


# ---- jobs that must not start


def refused(job: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Runs a job that cannot start; returns the one sentence it is refused with."""
    before = sorted(job.parent.rglob("*"))
    capfd.readouterr()
    assert exit_code_of("run", job, "--quiet") == 2
    assert sorted(job.parent.rglob("*")) == before, "something was written"
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_model_folder_that_cannot_be_used(
    model_folder: Path, tmp_path: Path, damage: Damage, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    damage(model)
    sentence = refused(make_job(tmp_path / "job", model, questions(3), output={"path": "deep/er/out"}), capfd)
    assert "model.path: " in sentence
    assert not (tmp_path / "job" / "deep").exists()


def test_a_bad_model_leaves_the_results_of_another_job_alone(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_job(tmp_path / "first", model_folder, questions(3), output={"path": str(tmp_path / "out")})
    assert exit_code_of("run", tmp_path / "first" / "job.yaml", "--quiet") == 0
    before = read_output(tmp_path / "out")
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"nothing")
    job = make_job(tmp_path / "second", model, questions(2), output={"path": str(tmp_path / "out")})
    assert exit_code_of("run", job, "--quiet", "--overwrite") == 2
    assert read_output(tmp_path / "out").equals(before)


@pytest.mark.parametrize(
    ("make_config", "reason"), [(llama4, "chunked attention"), (longrope, "longrope RoPE")]
)
def test_a_row_beyond_the_length_that_the_model_is_exact_for(
    tmp_path: Path, make_config: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An error of its own; the job is refused where no row is left."""
    config = make_config()
    model = saved(tmp_path / "model", config)
    # The tokenizer writes single bytes, and these models know 97 tokens: digits are among them.
    rows = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(["12", "1" * 44, None, "3"])]
    assert exit_code_of("run", make_job(tmp_path / "mixed", model, rows), "--quiet") == 3
    short, long, empty, other = read_output(tmp_path / "mixed" / "out")["error"]
    assert short is None and other is None and empty == "column `prompt` is null"
    assert long.startswith("prompt and max_tokens come to 52 tokens; model type ")
    assert "exact only up to 48 tokens" in long and reason in long
    assert long.endswith("shorten the prompt or lower generate.max_tokens")
    sentence = refused(make_job(tmp_path / "long", model, rows[1:3]), capfd)
    assert f"model type {config.model_type} is exact only up to 48 tokens" in sentence
    assert "this job needs up to 52" in sentence


def test_a_model_that_is_exact_up_to_its_own_length_refuses_no_row(tmp_path: Path) -> None:
    """Outputs end there, whatever max_tokens is."""
    model = saved(tmp_path / "model", dynamic_rope())
    rows = [{"id": "0", "prompt": "12"}, {"id": "1", "prompt": "1" * 44}]
    job = make_job(tmp_path / "job", model, rows, generate={"max_tokens": 400, "ignore_eos": True})
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_output(tmp_path / "job" / "out")["output_tokens"].list.len().to_list() == [46, 4]


def saved(folder: Path, config: Any) -> Path:
    make_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_type_that_is_never_exact(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", config=hf.DiffLlamaConfig(**COMMON))
    sentence = refused(make_job(tmp_path / "job", model, questions(2)), capfd)
    assert "model type diffllama cannot run exactly" in sentence


def test_a_model_that_fails_the_parity_check(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "add_product", lambda *args: None)
    assert "differ from transformers' own" in refused(make_job(tmp_path, model_folder, questions(2)), capfd)


@pytest.mark.parametrize("change", ["model.path=../other", "generate.max_tokens=3"])
def test_a_changed_job_whose_model_cannot_run_leaves_the_results_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    save_model(tmp_path / "other", seed=1)
    job, out = make_job(tmp_path / "job", model_folder, questions(5)), tmp_path / "job" / "out"
    assert exit_code_of("run", job, "--quiet") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(attention_cpu, "add_product", lambda *args: None)
    assert exit_code_of("run", job, "--quiet", "--set", change) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_kv_memory_that_holds_no_token(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, questions(2), engine={"kv_memory": KV_TOKEN_BYTES - 1})
    assert "engine.kv_memory" in refused(job, capfd)


def test_the_results_of_another_job(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused, unless --overwrite says otherwise."""
    out = {"path": str(tmp_path / "out")}
    first = make_job(tmp_path / "first", model_folder, questions(4), output=out)
    assert exit_code_of("run", first, "--quiet") == 0
    before = read_output(tmp_path / "out")
    other = make_job(tmp_path / "second", model_folder, questions(2), output=out)
    assert "another job" in refused(other, capfd)
    assert read_output(tmp_path / "out").equals(before)
    assert exit_code_of("run", other, "--quiet", "--overwrite") == 0
    assert read_output(tmp_path / "out")["id"].to_list() == ["row-0", "row-1"]


ORIGINAL_OPEN, ORIGINAL_FILE = Path.open, pa.OSFile


def opened_full(path: Path, *how: Any, **options: Any) -> Any:
    return ORIGINAL_OPEN(Path("/dev/full") if path.name == "prompts.tokens" else path, *how, **options)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("file", "call", "on_a_full_disk"),
    [
        ("work/prompts.tokens", "pathlib.Path.open", opened_full),
        ("work/prompts.tokens", "batchllm.dataset.tokens.np.save", refuse),
        ("work/kept.arrow", "batchllm.dataset.load.pa.OSFile", lambda *_: ORIGINAL_FILE("/dev/full", "wb")),
        ("plan.parquet", "batchllm.planner.plan_file.pq.write_table", refuse),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_next_run_finishes(
    model_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    call: str,
    on_a_full_disk: Any,
) -> None:
    job, out = make_job(tmp_path, model_folder, questions(6)), tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr(call, on_a_full_disk)
        assert exit_code_of("run", job, "--quiet") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {out / '_run' / file}: cannot be written (No space left on device)")
    assert not list(tmp_path.rglob("*.tmp"))
    assert exit_code_of("run", job, "--quiet") == 0
    assert len(texts(out)) == 6


def test_a_fault_of_ours_is_told_apart(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, answers found so far are kept, and the next run goes on."""
    job = make_job(tmp_path, model_folder, questions(6))
    attend, calls = attention_cpu.CpuStepAttention.attend, []

    def failing(self: Any, layer: int, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(layer)
        if len(calls) == 40:
            raise RuntimeError("out of luck")
        return attend(self, layer, *args, **options)

    monkeypatch.setattr(attention_cpu.CpuStepAttention, "attend", failing)
    assert exit_code_of("run", job, "--quiet", "--set", "engine.max_step_tokens=16") == 1
    assert "out of luck" in capfd.readouterr().err
    assert len(calls) == 40
    assert exit_code_of("run", job, "--quiet") == 0
    assert len(read_output(tmp_path / "out")) == 6
    assert json.loads((tmp_path / "out" / "_run" / "manifest.json").read_text())["status"] == "finished"
