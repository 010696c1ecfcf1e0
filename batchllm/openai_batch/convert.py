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
from batchllm.dataset.messages import parse_messages, without_nulls
from batchllm.dataset.rows import RowFault
from batchllm.dataset.values import python_values
from batchllm.durable import replacing
from batchllm.errors import InputError, first_line
from batchllm.job_errors import describe
from batchllm.openai_batch.requests import CHAT, COMPLETIONS, BadLine, parse_line
from batchllm.openai_batch.rows import write_rows
from batchllm.openai_batch.run import (
    bad_lines,
    check_apart,
    check_readable,
    check_target,
    read_requests,
    reading,
)

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
_READ = frozenset({"custom_id", "model", "prompt", "template_args", "echo", *asdict(SamplingParams())})


def convert(source: Path, target: Path, max_tokens: int = 256) -> list[tuple[str, BadLine]]:
    """By the names: .jsonl → .parquet, or .parquet → .jsonl. Returns what was left out, as no request: (place, why).

    A target that is there already is replaced by a whole one or stays. Raises InputError for other names and for a
    Parquet file that holds no requests, OutputError for a target that cannot be written.
    """
    check_readable(source)
    check_apart(source, target)
    kinds = (source.suffix, target.suffix)
    if kinds not in ((".jsonl", ".parquet"), (".parquet", ".jsonl")):
        raise InputError(f"{source} → {target}: one must be named .jsonl and the other .parquet")
    check_target(target, "the target")
    has_requests = source.suffix == ".jsonl" and not _is_responses(source)
    with replacing(target) as part:
        if has_requests:
            write_rows((request for _, request in read_requests(source, max_tokens)), part)
        elif source.suffix == ".jsonl":
            _write_answers(source, part)
        else:
            return _write_requests(source, part, max_tokens)
    bad = bad_lines(source, max_tokens) if has_requests else ()
    return [(f"line {number}", error) for number, error in bad]


def _write_requests(source: Path, target: Path, max_tokens: int) -> list[tuple[str, BadLine]]:
    """Returns the rows left out."""
    left_out = []
    with target.open("w", encoding="utf-8") as file:
        for number, row in enumerate(_read_table(source), start=1):
            try:
                file.write(_line(row, max_tokens) + "\n")
            except BadLine as error:
                left_out.append((f"row {number}", error))
    return left_out


def _is_responses(path: Path) -> bool:
    with reading(path) as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "response" in record and "body" not in record


def _write_answers(source: Path, target: Path) -> None:
    rows: list[dict[str, Any]] = []
    with reading(source) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    found = _answer_rows(json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8")))
                    pa.RecordBatch.from_pylist(found, schema=_ANSWERS)  # are its values of these types?
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    raise InputError(f"{source}: line {number} is no line of a batch output file") from None
                rows += found
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
    """What requests are made of, row by row; a value that cannot be read is a RowFault."""
    try:
        file = pq.ParquetFile(source)
        missing = next(
            (name for name in ("custom_id", "prompt") if name not in file.schema_arrow.names), None
        )
        if missing is not None:
            raise InputError(f"{source}: has no column `{missing}`, which requests need")
        names = [name for name in file.schema_arrow.names if name in _READ]
        for batch in file.iter_batches(columns=names):
            columns = [python_values(batch.column(name), name, nullable=True) for name in names]
            yield from (dict(zip(names, values)) for values in zip(*columns))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source}: cannot be read as Parquet ({first_line(error)})") from None


def _line(row: dict[str, Any], max_tokens: int) -> str:
    """The request of a row as `run-batch` reads it. Raises BadLine where it would refuse it."""
    fault = next((value for value in row.values() if isinstance(value, RowFault)), None)
    if fault is not None:
        raise BadLine("invalid_row", fault.reason)
    try:
        line = json.dumps(_record(row), ensure_ascii=False)
    except (TypeError, RecursionError) as error:  # dates, for example
        raise BadLine("invalid_row", f"a value cannot be written as JSON: {error}") from None
    parse_line(line.encode(errors="surrogatepass"), max_tokens)
    return line


def _record(row: dict[str, Any]) -> dict[str, Any]:
    defaults = asdict(SamplingParams())
    body: dict[str, Any] = {} if row.get("model") is None else {"model": row["model"]}
    prompt = row["prompt"]
    messages = _messages(prompt)
    body |= {"prompt": prompt} if messages is None else {"messages": messages}
    for name, default in defaults.items():
        value: Any = row.get(name)
        given = value is not None and (name in _ALWAYS or value != default) and value not in ([], "")
        if given and name not in ("logprobs", "top_logprobs"):
            parsed = _from_json(name, value) if name in ("logit_bias", "json_schema") else value
            body[_BODY_NAMES.get(name, name)] = parsed
    if row.get("logprobs"):
        top = row.get("top_logprobs") or 0
        body |= {"logprobs": top} if messages is None else {"logprobs": True, "top_logprobs": top}
    if row.get("echo"):
        body |= {"echo": True} if row["echo"] == "before" else {"echo": True, "max_tokens": 0}
        if row.get("logprobs"):
            body.pop("prompt_logprobs", None)  # which echo asks for
    args = _from_json("template_args", row.get("template_args") or {})
    if not isinstance(args, dict):
        raise BadLine("invalid_row", f"column `template_args` must hold a mapping, found {describe(args)}")
    if "tools" in args:
        body["tools"] = args.pop("tools")
    if args:
        body["chat_template_kwargs"] = args
    url = COMPLETIONS if messages is None else CHAT
    custom_id = None if row["custom_id"] is None else str(row["custom_id"])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def _messages(prompt: object) -> list[Any] | None:
    """The conversation that a prompt is, or None for a text."""
    messages = parse_messages(prompt) if isinstance(prompt, str) else without_nulls(prompt)
    if isinstance(messages, RowFault):
        raise BadLine("invalid_prompt", f"column `prompt`: {messages.reason}")
    if not isinstance(messages, list) and not isinstance(prompt, str):
        message = f"column `prompt` must hold a text or a list of messages, found {describe(prompt)}"
        raise BadLine("invalid_prompt", message)
    return messages


def _from_json(name: str, value: object) -> Any:
    """A mapping, whether the column holds it or JSON of it."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid_row", f"column `{name}` does not hold JSON: {error}") from None
