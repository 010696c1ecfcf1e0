"""Every document's score as rows of a table: one for each task, metric, filter and document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

SCHEMA = {
    "task": pl.String,
    "metric": pl.String,
    "filter": pl.String,
    "doc_id": pl.Int64,
    "doc_hash": pl.String,  # of the document, its prompt and its target: what must be equal for two nights to compare
    "prompt": pl.String,
    "target": pl.String,
    "output": pl.String,  # the text chosen or generated; None for a document whose probability is the score
    "answers": pl.String,  # JSON: what the model said to each request
    "value": pl.Float64,  # of this document; of a perplexity, its log-likelihood by weight
    "weight": pl.Float64,  # of this document in the score: words or bytes for a perplexity, else 1
}
PAIR = ["task", "metric", "filter", "doc_id"]  # what names a value


def sample_table(results: Mapping[str, Any]) -> pl.DataFrame:
    """The samples of one `lm_eval.evaluate`."""
    rows = [
        _row(task, metric, sample)
        for task, samples in results["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
    ]
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(task: str, metric: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments = sample["arguments"]
    answers = sample["filtered_resps"]
    value, weight = _value(sample[metric])
    return {
        "task": task,
        "metric": metric,
        "filter": sample["filter"],
        "doc_id": int(sample["doc_id"]),
        "doc_hash": "-".join(sample[name][:16] for name in ("doc_hash", "prompt_hash", "target_hash")),
        "prompt": str(arguments[0][0]),
        "target": str(sample["target"]),
        "output": _output(arguments, answers),
        "answers": json.dumps(answers, default=str, ensure_ascii=False),
        "value": value,
        "weight": weight,
    }


def _output(arguments: Sequence[Sequence[Any]], answers: Sequence[Any]) -> str | None:
    """What the model said: of choices the most probable."""
    if isinstance(answers[0], str):
        return str(answers[0])
    if isinstance(answers[0], Sequence) and len(answers[0]) == 2:
        best = max(range(len(answers)), key=lambda index: float(answers[index][0]))
        return str(arguments[best][1])
    return None


def _value(value: Any) -> tuple[float | None, float | None]:
    """A number and its weight; of a pair (log-likelihood, weight), as perplexities are made of, the first by weight."""
    if isinstance(value, bool | int | float):
        return float(value), 1.0
    if isinstance(value, Sequence) and len(value) == 2:
        try:
            return float(value[0]) / float(value[1]), float(value[1])
        except (TypeError, ValueError, ZeroDivisionError):
            return None, None
    return None, None
