"""`batchllm run-batch` that cannot start: one sentence, exit code 2, and everything as it was before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from batchllm.file_lock import FileLock
from batchllm.openai_batch import run
from batchllm.openai_batch.requests import COMPLETIONS, BadLine, parse_line
from tests.jobs import exit_code_of
from tests.test_openai_batch import read_lines, request

SHORT = {"temperature": 0, "max_tokens": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with requests in it."""
    monkeypatch.chdir(tmp_path)
    write_requests("in.jsonl", request("a", **SHORT), request("b", COMPLETIONS, **SHORT))
    return tmp_path


def write_requests(name: str, *requests: dict[str, Any]) -> None:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in requests))


def run_batch(model: Path, *arguments: object, source: str = "in.jsonl", target: str = "out.jsonl") -> int:
    settings = ("--model", model, "--set", "engine.kv_memory=16MiB", "--quiet", *arguments)
    return exit_code_of("run-batch", "-i", source, "-o", target, *settings)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def link(name: str) -> str:
    Path(name).symlink_to("in.jsonl")
    return name


def hard_link(name: str) -> str:
    os.link("in.jsonl", name)
    return name


@pytest.mark.parametrize("way", [lambda _: "in.jsonl", lambda _: "./in.jsonl", link, hard_link])
@pytest.mark.parametrize("command", ["run-batch", "convert-batch"])
def test_requests_are_not_overwritten(
    way: Any, command: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = way("other.parquet" if command == "convert-batch" else "other.jsonl")
    before = contents(folder)
    if command == "run-batch":
        assert run_batch(model_folder, target=name) == 2
    else:
        assert exit_code_of("convert-batch", "in.jsonl", name) == 2
    assert "is the file in.jsonl, which would be lost" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("input.limit=2", "input"),
        ("input={path: in.jsonl}", "input"),
        ("prompt.text=x", "prompt"),
        ("prompt.template_args={}", "prompt"),
        ("output.keep=[]", "output.keep"),
        ("output.path=elsewhere", "output.path"),
        ("output={path: elsewhere}", "output.path"),
        ("score.rolling=true", "score"),
        ("generate.logprobs=false", "generate.logprobs"),
        ("generate={max_tokens: 3}", "generate.logprobs"),
    ],
)
def test_what_requests_decide_cannot_be_set(
    override: str, key: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run_batch(model_folder, "--set", override) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"error: --set {override.partition('=')[0]}: the requests and -o decide what {key} is; remove it"
    ]
    assert contents(folder) == before


def test_other_keys_can_be_set(folder: Path, model_folder: Path) -> None:
    settings = ("generate.max_tokens=1", "output.part_rows=1", "engine.order=input", "plan.sample_rows=1")
    assert run_batch(model_folder, *(part for value in settings for part in ("--set", value))) == 0
    answers = read_lines(folder / "out.jsonl")
    assert [answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers] == [1, 1]
    assert run.run_batch(
        folder / "in.jsonl", folder / "b.jsonl", str(model_folder), overrides={"engine.order": "input"}, quiet=True
    ) == 0  # fmt: skip


CANNOT_START = tuple(  # found out when rows are there already
    part for value in ("column=prompt", "store=store", "reuse=off") for part in ("--set", f"chunks.{value}")
)


def test_a_run_that_cannot_start_leaves_nothing(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run_batch(model_folder, *CANNOT_START) == 2
    assert "chunks need a template" in capsys.readouterr().err
    assert contents(folder) == before
    assert run_batch(model_folder) == 0
    answered = contents(folder)
    assert run_batch(model_folder, *CANNOT_START) == 2  # what an earlier run has made stays
    assert contents(folder).keys() == answered.keys()
    assert (folder / "out.jsonl").read_bytes() == answered[folder / "out.jsonl"]


def test_two_runs_do_not_write_one_output(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_batch(model_folder) == 0
    write_requests("other.jsonl", request("c", **SHORT))
    lock = FileLock(folder / "out.jsonl.batch" / "lock", "{}")  # as a run has it
    before = contents(folder)
    assert run_batch(model_folder, source="other.jsonl") == 2
    assert f"another run-batch (process {os.getpid()}) is at work there" in capsys.readouterr().err
    assert contents(folder) == before
    lock.release()
    assert run_batch(model_folder, source="other.jsonl") == 0
    assert [answer["custom_id"] for answer in read_lines(folder / "out.jsonl")] == ["c"]


def test_rows_are_whole_or_those_from_before(
    folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_batch(model_folder) == 0
    rows = folder / "out.jsonl.batch" / "rows.parquet"
    before = rows.read_bytes()

    def killed(_requests: Any, path: Path) -> int:
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_rows", killed)
    assert run_batch(model_folder) == 130
    assert rows.read_bytes() == before


def test_max_tokens_of_the_command_is_what_min_tokens_is_held_against(
    folder: Path, model_folder: Path
) -> None:
    write_requests("in.jsonl", request("a", COMPLETIONS, min_tokens=280), request("b", min_tokens=301))
    assert run_batch(model_folder, "--max-tokens", "300") == 3
    long, refused = read_lines(folder / "out.jsonl")
    assert 280 <= long["response"]["body"]["usage"]["completion_tokens"] <= 300
    assert refused["error"]["message"] == "body.min_tokens 301 but max_tokens 300; lower min_tokens"


def params_of(**body: Any) -> dict[str, Any]:
    return dict(parse_line(json.dumps(request("a", **body)).encode(), 256).params)


def test_fields_that_ask_for_nothing_are_ignored() -> None:
    asks_for_nothing = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "parallel_tool_calls": False,
        "stream": False, "stream_options": None, "prediction": {"type": "content", "content": "x"},
        "safety_identifier": "u", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "medium",
        "modalities": ["text"], "tool_choice": "auto", "tools": [], "response_format": {"type": "text"},
        "logit_bias": {}, "stop": [], "logprobs": False, "n": 1,
    }  # fmt: skip
    plain = params_of()
    assert params_of(**asks_for_nothing) == {**plain, "logit_bias": (), "stop": (), "n": 1}


def test_the_newer_name_of_max_tokens_counts() -> None:
    assert params_of(max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7
    assert params_of(max_completion_tokens=7, max_tokens=5)["max_tokens"] == 7


def test_reasoning_effort_is_for_the_chat_template() -> None:
    line = json.dumps(request("a", reasoning_effort="low", chat_template_kwargs={"x": 1})).encode()
    assert json.loads(parse_line(line, 256).template_args or "") == {"x": 1, "reasoning_effort": "low"}


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize("where", ["guided_json", "chat_template_kwargs", "tools", "messages"])
def test_a_line_of_any_depth_is_a_request_or_refused(where: str) -> None:
    wrapped = {"tools": '[{"x": %s}]', "messages": '[{"role": "user", "content": "x", "y": %s}]'}
    codes = []
    for depth in (*range(100, 900, 200), *range(900, 1001)):
        line = json.dumps(request("a", **{where: "HERE"}))
        line = line.replace('"HERE"', wrapped.get(where, "%s") % nested(depth))
        try:
            parse_line(line.encode(), 256)
        except BadLine as error:
            codes.append(error.code)
    assert set(codes) <= {"invalid_json", "invalid_parameter"} and 0 < len(codes) < 105
