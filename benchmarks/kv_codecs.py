"""KV codecs: bytes, error, speed, and what they do to the answers of the example model.

    python -m benchmarks.kv_codecs

Error is the root of the mean squared error over that of the states. Answers: each prompt's documents are computed,
their KV is written by the codec and read back, K once before RoPE (as the store holds it) and once after (as a prefix
in memory would hold it), and the question is answered on that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import torch
from torch import Tensor

from batchllm.chunkcache.codecs import CODEC_NAMES, Codec, Kind, bytes_per_token, codec_named, encode
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.request_kv import RequestKv
from batchllm.executor.model import ModelRunner, load_model

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_RESULTS = Path(__file__).parent / "results"
_NEW_TOKENS = 16
sys.path.insert(0, str(_EXAMPLES / "passages"))


@dataclass(frozen=True)
class Question:
    documents: str
    question: str
    gold: str


@dataclass
class Error:
    squared: float = 0.0
    states: float = 0.0

    def add(self, states: Tensor, back: Tensor) -> None:
        self.squared += float((back - states).square().sum())
        self.states += float(states.square().sum())

    @property
    def relative(self) -> float:
        return (self.squared / self.states) ** 0.5


def questions(limit: int) -> Iterator[Question]:
    table = pl.read_parquet(_EXAMPLES / "quickstart" / "questions.parquet")
    for row in table.head(limit).iter_rows(named=True):
        yield Question(row["documents"], row["question"], row["gold"])


class Worker:
    """The example model, its rotation and its tokenizer."""

    def __init__(self) -> None:
        from tokenizer import END, load_tokenizer

        self.model: ModelRunner = load_model(str(_EXAMPLES / "passages" / "model"), "float32")
        self.rotation: KeyRotation = find_rotation(self.model)
        self.tokenizer = load_tokenizer()
        self.end = self.tokenizer.token_to_id(END)

    def prefix(self, documents: str) -> tuple[Tensor, RequestKv]:
        from tokenizer import prefix_text

        tokens = torch.tensor(self.tokenizer.encode(prefix_text(documents)).ids)
        kv = RequestKv(self.model, len(tokens) + 200)
        kv.compute(tokens, torch.arange(len(tokens)))
        return tokens, kv

    def answer(self, kv: RequestKv, position: int, question: str) -> str:
        from tokenizer import question_text

        tokens = torch.tensor(self.tokenizer.encode(question_text(question)).ids)
        found: list[int] = []
        while len(found) < _NEW_TOKENS and (not found or found[-1] != self.end):
            logits = kv.compute(tokens, torch.arange(position, position + len(tokens)))
            position += len(tokens)
            found.append(int(logits.argmax()))
            tokens = torch.tensor(found[-1:])
        return str(self.tokenizer.decode(found, skip_special_tokens=True)).strip()


def through(
    codec: Codec, kv: RequestKv, count: int, rotation: KeyRotation | None, errors: dict[str, Error]
) -> None:
    """Replaces the first `count` tokens' KV by what the codec makes of it; K before RoPE with a `rotation`."""
    placed = rotation.at(torch.arange(count)) if rotation else None
    for layer in range(len(kv.keys)):
        key, value = kv.keys[layer][:count].clone(), kv.values[layer][:count].clone()
        plain = placed.undo(layer, key) if placed else key
        back = encode(codec, plain, "key").decode(torch.float32)
        errors["key" if placed else "turned key"].add(plain, back)
        kv.keys[layer][:count] = placed.apply(layer, back) if placed else back
        kv.values[layer][:count] = encode(codec, value, "value").decode(torch.float32)
        errors["value"].add(value, kv.values[layer][:count])


def measure(worker: Worker, name: str, rows: list[Question]) -> dict[str, Any]:
    codec = codec_named(name, torch.float32)
    errors = {"key": Error(), "turned key": Error(), "value": Error()}
    right = {"before": 0, "after": 0}
    encoded = tokens_seen = 0
    kept: dict[str, tuple[Tensor, RequestKv]] = {}
    for row in rows:
        if row.documents not in kept:
            kept[row.documents] = worker.prefix(row.documents)
        tokens, full = kept[row.documents]
        for where, rotation in (("before", worker.rotation), ("after", None)):
            kv = RequestKv(worker.model, len(tokens) + 200)
            for layer in range(len(kv.keys)):
                kv.place(layer, 0, full.keys[layer][: len(tokens)], full.values[layer][: len(tokens)])
            through(codec, kv, len(tokens), rotation, errors)
            right[where] += worker.answer(kv, len(tokens), row.question) == row.gold
        for kind in ("key", "value"):
            shape = worker.model.layers[0]
            encoded += codec.num_bytes(len(tokens), shape.heads, shape.key_dim, kind) * len(
                worker.model.layers
            )
        tokens_seen += len(tokens)
    return {
        "codec": name,
        "bytes_per_token": round(encoded / tokens_seen, 1),
        "key_error": errors["key"].relative,
        "turned_key_error": errors["turned key"].relative,
        "value_error": errors["value"].relative,
        "exact_match": round(100 * right["before"] / len(rows), 1),
        "exact_match_turned": round(100 * right["after"] / len(rows), 1),
        **random_states(codec),
    }


def random_states(codec: Codec) -> dict[str, float]:
    """Normal numbers in the shape of a layer of a model of 8 billion parameters, some channels ten times larger."""
    states = torch.randn(2048, 8, 128, generator=torch.Generator().manual_seed(0))
    states[:, :, ::32] *= 10
    found: dict[str, float] = {"bytes_per_token_8b": bytes_per_token(codec, 8, 128, 128) * 32}
    kinds: tuple[Kind, ...] = ("key", "value")
    for kind in kinds:
        begin = time.thread_time()
        encoded = encode(codec, states, kind)
        middle = time.thread_time()
        back = encoded.decode(torch.float32)
        end = time.thread_time()
        error = Error()
        error.add(states, back)
        found[f"random_{kind}_error"] = error.relative
        found[f"encode_{kind}_gb_s"] = round(states.nbytes / 2 / 1e9 / max(middle - begin, 1e-9), 2)
        found[f"decode_{kind}_gb_s"] = round(states.nbytes / 2 / 1e9 / max(end - middle, 1e-9), 2)
    return found


@click.command()
@click.option("--questions", "count", default=200)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-kv-codecs.json"
)
def main(count: int, out: Path | None) -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    worker, rows = Worker(), list(questions(count))
    click.echo(
        "| codec | bytes per token | of bf16 | error K | error K after RoPE | error V | exact match | after RoPE | "
        "8B model: KiB per token | random K, V |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    report = []
    with torch.inference_mode():
        found = {name: measure(worker, name, rows) for name in CODEC_NAMES}
    plain = found["bf16"]["bytes_per_token"]
    for name, row in found.items():
        report.append(row)
        click.echo(
            f"| {name} | {row['bytes_per_token']:,.0f} | {row['bytes_per_token'] / plain:.2f} | "
            f"{row['key_error']:.4f} | {row['turned_key_error']:.4f} | {row['value_error']:.4f} | "
            f"{row['exact_match']} | {row['exact_match_turned']} | {row['bytes_per_token_8b'] / 1024:.1f} | "
            f"{row['random_key_error']:.4f}, {row['random_value_error']:.4f} |"
        )
    target = out or _RESULTS / f"{date.today().isoformat()}-kv-codecs.json"
    target.write_text(
        json.dumps({"date": date.today().isoformat(), "questions": count, "codecs": report}, indent=2)
    )
    click.echo(f"written to {target}")
    assert np.isfinite([row["key_error"] for row in report]).all()


if __name__ == "__main__":
    main()
