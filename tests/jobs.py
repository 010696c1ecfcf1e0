"""Small jobs on a tiny random model: folders with model, input and job file, and how to run and read them."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

from batchllm.cli import main
from tests.executor.tiny_models import COMMON, make_model
from tests.tiny_tokenizer import EOS, PAD, VOCABULARY, byte_tokenizer

MODEL = {**COMMON, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "eos_token_id": EOS, "pad_token_id": PAD}
KV_TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head size, float32


def save_model(folder: Path, seed: int = 0, config: Any = None) -> Path:
    """A float32 Llama that reads up to 512 bytes of text, with its tokenizer."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    make_model(config or LlamaConfig(**MODEL), seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def questions(count: int) -> list[dict[str, Any]]:
    """Rows whose prompts share two levels of prefix, and a few that share nothing."""
    rows = []
    for number in range(count):
        system = "Answer in one word. " if number % 5 else f"{number} "
        topic = f"The topic is number {number % 3}, as was agreed before. "
        rows.append({"id": f"row-{number}", "prompt": f"{system}{topic}Question {number * 37 % 101}?"})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]] | pa.Table) -> Path:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
    pq.write_table(table, path)
    return path


def make_job(
    folder: Path, model: Path, rows: Sequence[Mapping[str, Any]] | pa.Table, **sections: Mapping[str, Any]
) -> Path:
    """Writes rows.parquet and job.yaml into `folder`; `sections` add to or replace the sections given here."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.parquet", rows)
    job: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "input": {"path": "rows.parquet", "id": "id"},
        "prompt": {"column": "prompt"},
        "generate": {"max_tokens": 8},
        "output": {"path": "out"},
        "engine": {"device": "cpu", "kv_memory": "4MiB", "min_shared_tokens": 4},
    }
    for name, values in sections.items():
        job[name] = dict(values) if name == "prompt" else {**job.get(name, {}), **values}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def read_output(out: Path) -> pl.DataFrame:
    """What a user reads: every part at once."""
    return pl.read_parquet(out / "*.parquet")


def read_metrics(out: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((out / "_run" / "metrics.json").read_text())
    return metrics


def texts(out: Path) -> dict[tuple[str, int], str]:
    """(id, sample) → text. Fails when an answer is there twice."""
    table = read_output(out)
    samples = table["sample"] if "sample" in table.columns else [0] * len(table)
    answers = dict(zip(zip(table["id"], samples), table["output"]))
    assert len(answers) == len(table), "an answer is there twice"
    return answers


def exit_code_of(*arguments: object) -> int:
    """What the command `batchllm ARGUMENTS` exits with, run in this process."""
    handler = signal.getsignal(signal.SIGTERM)  # the command sets its own
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("the command did not exit")
