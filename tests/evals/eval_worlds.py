"""Small tasks over files made on the spot, tasks of the repository over ../shared/data, and both model classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
PASSAGES_MODEL = ROOT / "examples" / "passages" / "model"

_CHOICES = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Facts: {{facts}}\nQuestion: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
}
_ANSWERS = {
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{options[gold]}}",
    "generation_kwargs": {"until": ["\n", "e"], "do_sample": False, "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
_DOCUMENTS = {
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{facts}}",
    "metric_list": [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in (
            ("word_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ],
}
SMALL_TASKS = {"choices": _CHOICES, "answers": _ANSWERS, "documents": _DOCUMENTS}


def write_small_tasks(folder: Path, documents: int = 12) -> Path:
    """`choices`, `answers` and `documents`, and their rows.jsonl; a third of the facts is longer than the model."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(documents):
        facts = f"Box {number % 3} is on shelf {number % 3 + 4}. " * (20 if number % 3 == 0 else 3)
        options = [f" shelf {number % 3 + 4}", f" shelf {number}", " nowhere", " A"][: 3 + number % 2]
        rows.append(
            {"facts": facts, "question": f"Where is box {number}?", "options": options, "gold": number % 3}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in SMALL_TASKS.items():
        whole = {"task": name, **task, "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder


def nightly_tasks() -> list[dict[str, Any]]:
    job = yaml.safe_load((ROOT / "jobs" / "nightly_eval.yaml").read_text(encoding="utf-8"))
    return [{"task": task} if isinstance(task, str) else task for task in job["eval"]["tasks"]]


@cache
def harness_model(folder: Path, batch_size: int = 8) -> Any:
    """The harness's own model class, in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=batch_size)


@cache
def our_model(folder: Path) -> Any:
    from batchllm_lm import BatchLM

    return BatchLM(str(folder), dtype="float32")


def samples_of(results: dict[str, Any]) -> list[tuple[str, int, str, Sequence[Any]]]:
    """(task, document, filter, answers), in order."""
    return [
        (task, sample["doc_id"], sample["filter"], sample["filtered_resps"])
        for task, samples in sorted(results["samples"].items())
        for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"]))
    ]
