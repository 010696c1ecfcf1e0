"""Requests of a batch file as a Parquet file that a job reads, and the sections of that job."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.core import SamplingParams
from batchllm.openai_batch.requests import BatchRequest

_TEXTS = pa.list_(pa.string())
_PARAM_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(
        ("max_tokens", "top_k", "n", "seed", "top_logprobs", "prompt_logprobs", "best_of", "min_tokens"),
        pa.int64(),
    ),
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
        ),
        pa.float64(),
    ),
    **dict.fromkeys(("ignore_eos", "logprobs", "include_stop", "skip_special_tokens"), pa.bool_()),
    **dict.fromkeys(("stop", "bad_words", "choice"), _TEXTS),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), pa.list_(pa.int64())),
    **dict.fromkeys(("logit_bias", "regex", "json_schema", "grammar"), pa.string()),
}
SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("url", pa.string()),
        pa.field("model", pa.string()),
        pa.field("prompt", pa.string()),  # text, or messages as JSON
        pa.field("template_args", pa.string()),  # JSON
        pa.field("echo", pa.string()),  # what of the prompt is in the response; jobs do not read it
        *(pa.field(name, type_) for name, type_ in _PARAM_TYPES.items()),
    ]
)
_ROWS = 4096
_DEFAULTS = SamplingParams()
assert set(_PARAM_TYPES) == {field.name for field in fields(SamplingParams)}


def write_rows(requests: Iterable[BatchRequest], path: Path) -> int:
    """One row a request, every parameter written out; the number of rows."""
    rows = map(_row, requests)
    count = 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for batch in _batches(rows):
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
            count += len(batch)
    return count


def job_sections(rows: Path, output: Path) -> dict[str, dict[str, Any]]:
    """input, prompt, generate and output of the job that answers such a file."""
    return {
        "input": {"path": str(rows), "id": "custom_id"},
        "prompt": {
            "column": "prompt",
            "template_args": {"column": "template_args"},
            "unknown_template_args": "ignore",  # as vLLM's run-batch does
        },
        "generate": {name: {"column": name} for name in _PARAM_TYPES},
        "output": {"path": str(output), "keep": ["url", "model"]},
    }


def _row(request: BatchRequest) -> dict[str, Any]:
    params = {name: request.params.get(name, getattr(_DEFAULTS, name)) for name in _PARAM_TYPES}
    params["logit_bias"] = json.dumps(dict(params["logit_bias"])) if params["logit_bias"] else None
    return {
        "custom_id": request.custom_id,
        "url": request.url,
        "model": request.model,
        "prompt": request.content,
        "echo": request.echo,
        "template_args": request.template_args,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in params.items()},
    }


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, _ROWS)):
        yield batch
