"""`batchllm convert-batch` with files that hold what no request and no response is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs import exit_code_of
from tests.test_openai_batch import read_lines, request

USER = [{"role": "user", "content": "x"}]


def converted(
    folder: Path, table: pa.Table, capsys: pytest.CaptureFixture[str]
) -> tuple[list[Any], list[str]]:
    """The requests that a table becomes, and what is said of the rows that were left out."""
    source, target = folder / "rows.parquet", folder / "out.jsonl"
    pq.write_table(table, source)
    code = exit_code_of("convert-batch", source, target)
    said = [line.removeprefix(f"{source}, ") for line in capsys.readouterr().err.splitlines()]
    assert code == (3 if said else 0)
    return read_lines(target), said


def requests_table(prompts: Sequence[Any], **columns: Sequence[Any] | pa.Array) -> pa.Table:
    ids = [f"id {number}" for number in range(len(prompts))]
    return pa.table({"custom_id": ids, "prompt": prompts, **columns})


def test_prompts_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [
        "a",
        None,
        "",
        '{"role": "user", "content": "x"}',
        "[]",
        '[{"content": "x"}]',
        json.dumps(USER),
    ]
    found, said = converted(tmp_path, requests_table(prompts), capsys)
    assert [line["custom_id"] for line in found] == ["id 0", "id 6"]
    assert [line["body"] for line in found] == [{"prompt": "a"}, {"messages": USER}]
    assert said == [
        "row 2: column `prompt` must hold a text or a list of messages, found nothing",
        "row 3: body.prompt must be a text that is not empty, found the text ``",
        "row 4: column `prompt`: one message stands alone; put it into a list",
        "row 5: body.messages: the conversation has no messages",
        "row 6: body.messages: message 1 has no role",
    ]


def test_prompts_of_other_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structs = [USER, [{"role": "tool", "content": "x", "tool_call_id": "1"}]]
    found, said = converted(tmp_path, requests_table(structs), capsys)
    assert [line["body"]["messages"] for line in found] == structs and said == []
    _, said = converted(tmp_path, requests_table([1, 2]), capsys)
    assert said[0] == "row 1: column `prompt` must hold a text or a list of messages, found the number 1"
    found, said = converted(tmp_path, requests_table(pa.array([b"\xc3\xa4", b"\xff"])), capsys)
    assert found[0]["body"]["prompt"] == "ä"
    assert said == ["row 2: column `prompt` is not valid UTF-8 text"]
    broken = pa.array([b"good", b"\xff"]).view(pa.string())
    found, said = converted(tmp_path, requests_table(broken), capsys)
    assert len(found) == 1 and said == ["row 2: column `prompt` is not valid UTF-8 text"]


def test_ids_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = requests_table(["a", "b", "c"]).set_column(0, "custom_id", [["1", None, ""]])
    found, said = converted(tmp_path, table, capsys)
    assert [line["custom_id"] for line in found] == ["1"]
    assert said == [
        "row 2: custom_id must be text that names the request, found none",
        "row 3: custom_id must be text that names the request, found the text ``",
    ]
    found, said = converted(tmp_path, table.set_column(0, "custom_id", [[7, 8, 9]]), capsys)
    assert [line["custom_id"] for line in found] == ["7", "8", "9"] and said == []


@pytest.mark.parametrize(
    ("column", "good", "bad", "words"),
    [
        ("template_args", '{"x": 1}', "[1]", "must hold a mapping, found a list"),
        ("template_args", '{"x": 1}', "x", "column `template_args` does not hold JSON"),
        ("template_args", '{"x": 1}', "[" * 100_000, "column `template_args` does not hold JSON"),
        ("template_args", '{"x": 1}', '{"tokenize": true}', "tokenize cannot be set"),
        ("template_args", '{"x": 1}', r'{"x": "\ud83d"}', "not valid UTF-8 text"),
        ("json_schema", "{}", "x", "column `json_schema` does not hold JSON"),
        ("logit_bias", '{"5": 1}', '{"x": 1}', "body.logit_bias must have token ids as keys"),
        ("temperature", 0.5, -1.0, "body.temperature must be at least 0"),
        ("max_tokens", 5, 0, "body.max_tokens must be at least 1"),
        ("seed", 5, date(2026, 1, 1), "a value cannot be written as JSON"),
        ("stop", ["a"], [""], "body.stop must not contain an empty text"),
    ],
)  # fmt: skip
def test_other_columns(
    column: str, good: Any, bad: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = json.dumps(USER)
    values = [bad, None] if isinstance(bad, date) else [good, bad, None]
    found, said = converted(tmp_path, requests_table([chat] * len(values), **{column: values}), capsys)
    assert len(found) == len(values) - 1
    (sentence,) = said
    assert sentence.startswith(f"row {values.index(bad) + 1}: ") and words in sentence
    assert len(sentence) < 300


def test_mappings_as_structs_have_their_own_fields_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = json.dumps(USER)
    table = requests_table(
        [chat, chat, chat],
        logit_bias=[{"5": 1.5}, {"6": -1.0}, None],
        template_args=[{"x": 1}, {"y": "z"}, None],
        json_schema=[{"type": "object"}, {"enum": ["a"]}, None],
    )
    found, said = converted(tmp_path, table, capsys)
    assert said == []
    assert [line["body"].get("logit_bias") for line in found] == [{"5": 1.5}, {"6": -1.0}, None]
    assert [line["body"].get("chat_template_kwargs") for line in found] == [{"x": 1}, {"y": "z"}, None]
    schemas = [line["body"].get("guided_json") for line in found]
    assert schemas == [{"type": "object"}, {"enum": ["a"]}, None]


def test_max_tokens_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, rows, back = (tmp_path / name for name in ("in.jsonl", "rows.parquet", "back.jsonl"))
    source.write_text(json.dumps(request("a", min_tokens=500)))
    assert exit_code_of("convert-batch", source, rows) == 3
    assert "line 1: body.min_tokens 500 but max_tokens 256; lower min_tokens" in capsys.readouterr().err
    assert exit_code_of("convert-batch", source, rows, "--max-tokens", 1000) == 0
    assert pl.read_parquet(rows)["max_tokens"].to_list() == [1000]
    assert exit_code_of("convert-batch", rows, back) == 0
    assert [line["body"]["max_tokens"] for line in read_lines(back)] == [1000]


def response(custom_id: Any = "a", **choice: Any) -> bytes:
    choices = [{"index": 0, "text": "ä", "finish_reason": "stop", **choice}]
    body = {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    record = {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}
    return json.dumps(record).encode()


def test_responses_with_a_byte_order_mark(tmp_path: Path) -> None:
    source, target = tmp_path / "responses.jsonl", tmp_path / "answers.parquet"
    source.write_bytes(b"\xef\xbb\xbf" + response("a") + b"\n\n" + response("b") + b"\r\n")
    assert exit_code_of("convert-batch", source, target) == 0
    table = pl.read_parquet(target)
    assert table["custom_id"].to_list() == ["a", "b"] and table["output"].to_list() == ["ä", "ä"]


@pytest.mark.parametrize(
    "line",
    [
        response().replace(b"\\u00e4", b"\xff"),
        response().replace(b"\\u00e4", b"\\ud83d"),
        response(index="x"),
        response(text=5),
        response(custom_id=5),
        response(index=2**40),
        b"[" * 100_000,
        b"[1]",
        b'{"custom_id": "a", "response": null, "error": null}',
    ],
)
def test_what_is_no_response(line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "responses.jsonl", tmp_path / "answers.parquet"
    source.write_bytes(response() + b"\n" + line + b"\n")
    assert exit_code_of("convert-batch", source, target) == 2
    assert capsys.readouterr().err == f"error: {source}: line 2 is no line of a batch output file\n"
    assert not target.exists()
