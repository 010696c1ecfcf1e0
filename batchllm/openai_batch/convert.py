"""Batch files to Parquet and back: requests both ways, responses to a table of answers.

A Parquet file of requests has `custom_id`, `prompt` (a text, or messages as JSON), `template_args` and a column for
every sampling parameter, so that a job can read it: it is what `run-batch` runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.core import SamplingParams
from batchllm.dataset.messages import parse_messages
from batchllm.durable import replacing
from batchllm.errors import InputError, first_line
from batchllm.openai_batch.requests import CHAT, COMPLETIONS, BadLine
from batchllm.openai_batch.rows import write_rows
from batchllm.openai_batch.run import bad_lines, check_readable, check_target, read_requests, reading

_ANSWERS = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("sample", pa.int32()),
        pa.field("output", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("error", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),  # of all samples
    ]
)
_BODY_NAMES = {
    "include_stop": "include_stop_str_in_output",
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}
_ALWAYS = ("temperature", "max_tokens")  # whose defaults here are not OpenAI's


def convert(source: Path, target: Path, max_tokens: int = 256) -> list[tuple[int, BadLine]]:
    """By the names: .jsonl → .parquet, or .parquet → .jsonl. Returns lines left out because they are no requests.

    A target that is there already is replaced by a whole one or stays. Raises InputError for other names and for a
    Parquet file that holds no requests, OutputError for a target that cannot be written.
    """
    check_readable(source)
    kinds = (source.suffix, target.suffix)
    if kinds not in ((".jsonl", ".parquet"), (".parquet", ".jsonl")):
        raise InputError(f"{source} → {target}: one must be named .jsonl and the other .parquet")
    check_target(target, "the target")
    has_requests = source.suffix == ".jsonl" and not _is_responses(source)
    with replacing(target) as part:
        if has_requests:
            write_rows((request for _, request in read_requests(source)), part, max_tokens)
        elif source.suffix == ".jsonl":
            _write_answers(source, part)
        else:
            _write_requests(source, part)
    return list(bad_lines(source)) if has_requests else []


def _write_requests(source: Path, target: Path) -> None:
    with target.open("w", encoding="utf-8") as file:
        for row in _read_table(source):
            file.write(json.dumps(_record(row), ensure_ascii=False) + "\n")


def _is_responses(path: Path) -> bool:
    with reading(path) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and "response" in record and "body" not in record


def _write_answers(source: Path, target: Path) -> None:
    rows: list[dict[str, Any]] = []
    with reading(source) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows += _answer_rows(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(f"{source}: line {number} is no line of a batch output file") from None
    pq.write_table(pa.Table.from_pylist(rows, schema=_ANSWERS), target)


def _answer_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    row = {"custom_id": record["custom_id"], "sample": 0}
    if record["response"] is None:
        return [{**row, "finish_reason": "error", "error": record["error"]["message"]}]
    body = record["response"]["body"]
    if "choices" not in body:
        return [{**row, "finish_reason": "error", "error": str(body.get("error", body))}]
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return [
        {
            **row,
            **usage,
            "sample": choice["index"],
            "output": choice["message"]["content"] if "message" in choice else choice["text"],
            "finish_reason": choice["finish_reason"],
        }
        for choice in body["choices"]
    ]


def _read_table(source: Path) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(source)
        missing = next(
            (name for name in ("custom_id", "prompt") if name not in file.schema_arrow.names), None
        )
        if missing is not None:
            raise InputError(f"{source}: has no column `{missing}`, which requests need")
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source}: cannot be read as Parquet ({first_line(error)})") from None


def _record(row: dict[str, Any]) -> dict[str, Any]:
    defaults = asdict(SamplingParams())
    body: dict[str, Any] = {} if row.get("model") is None else {"model": row["model"]}
    messages = row["prompt"] if isinstance(row["prompt"], list) else parse_messages(row["prompt"])
    body |= {"prompt": row["prompt"]} if messages is None else {"messages": messages}
    for name, default in defaults.items():
        value: Any = row.get(name)
        given = value is not None and (name in _ALWAYS or value != default) and value not in ([], "")
        if given and name not in ("logprobs", "top_logprobs"):
            parsed = json.loads(value) if name in ("logit_bias", "json_schema") else value
            body[_BODY_NAMES.get(name, name)] = parsed
    if row.get("logprobs"):
        top = row.get("top_logprobs") or 0
        body |= {"logprobs": top} if messages is None else {"logprobs": True, "top_logprobs": top}
    if row.get("echo"):
        body |= {"echo": True} if row["echo"] == "before" else {"echo": True, "max_tokens": 0}
        if row.get("logprobs"):
            body.pop("prompt_logprobs", None)  # which echo asks for
    template_args: Any = row.get("template_args")
    args = json.loads(template_args) if template_args else {}
    if "tools" in args:
        body["tools"] = args.pop("tools")
    if args:
        body["chat_template_kwargs"] = args
    url = COMPLETIONS if messages is None else CHAT
    return {"custom_id": str(row["custom_id"]), "method": "POST", "url": url, "body": body}
