"""Multiple-choice scoring against lm-evaluation-harness's `hf` model class and against vLLM, on the same requests.

    python -m benchmarks.evals --vllm-python VLLM/bin/python

AGIEval's questions with five solved ones before each, the same five for all of a task: as MMLU asks (options in the
prompt, a letter to score) and as ARC does (the text of each option to score). `hf` runs with the batch size that is
best on a part of the requests. vLLM is asked as the harness's `vllm` class asks it: each pair as a prompt, with the
log-probabilities of its tokens. Times are of the whole call; vLLM is given tokens, the others text.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click

from batchllm.versions import versions
from benchmarks.model import make_model
from benchmarks.real_workloads import DATA

_RESULTS = Path(__file__).parent / "results"
_SHOTS = 5
_PROBED = 24  # requests with which batch sizes are tried
LETTERS = "ABCDE"


def task_pairs(file: Path, style: str, documents: int) -> list[list[tuple[str, str]]]:
    """(context, continuation) of every option of each document; the last rows of the file are the solved ones."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    solved = "".join(
        f"{_asked(row, style)} {_options(row, style)[LETTERS.index(row['label'])]}\n\n"
        for row in rows[-_SHOTS:]
    )
    asked = rows[: max(1, min(documents, len(rows) - _SHOTS))]
    return [[(solved + _asked(row, style), f" {option}") for option in _options(row, style)] for row in asked]


def _asked(row: dict[str, Any], style: str) -> str:
    options = "\n".join(row["options"]) + "\n" if style == "letters" else ""
    passage = f"Passage: {row['passage']}\n\n" if row.get("passage") else ""
    return f"{passage}Question: {row['question']}\n{options}Answer:"


def _options(row: dict[str, Any], style: str) -> Sequence[str]:
    return LETTERS[: len(row["options"])] if style == "letters" else [text[3:] for text in row["options"]]


def instances(documents: Sequence[Sequence[tuple[str, str]]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    pairs = [pair for document in documents for pair in document]
    return [
        Instance("loglikelihood", {}, pair, number, ("bench", number, 1)) for number, pair in enumerate(pairs)
    ]


def timed(model: Any, requests: Sequence[Any]) -> tuple[float, list[float]]:
    """Seconds of the whole call, and the log-likelihoods."""
    started = time.perf_counter()
    answers = model.loglikelihood(list(requests), disable_tqdm=True)
    return time.perf_counter() - started, [answer[0] for answer in answers]


def best_batch_size(model: Any, requests: Sequence[Any], sizes: Sequence[int]) -> int:
    """Of the harness's hf class, on some of the requests."""
    probed = requests[:: max(1, len(requests) // _PROBED)]
    seconds = {}
    for size in sizes:
        model.batch_size_per_gpu = size
        seconds[size] = timed(model, probed)[0]
    return min(seconds, key=lambda size: seconds[size])


def run_vllm(
    python: str, model: Path, pairs: Sequence[tuple[list[int], list[int]]], scratch: Path
) -> dict[str, Any]:
    """In its own interpreter: {seconds, logprobs}."""
    asked, answered = scratch / "pairs.json", scratch / "scores.json"
    asked.write_text(json.dumps(pairs))
    command = [python, "-m", "benchmarks.evals_vllm", str(model), str(asked), str(answered)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


def agreement(
    documents: Sequence[Sequence[Any]], ours: Sequence[float], theirs: Sequence[float]
) -> dict[str, float]:
    """Largest difference of a log-likelihood, and the share of documents where the same option is best."""
    same, first = 0, 0
    for document in documents:
        options = range(first, first + len(document))
        same += max(options, key=lambda index: ours[index]) == max(options, key=lambda index: theirs[index])
        first += len(document)
    return {
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "same_choice": same / len(documents),
    }


@click.command()
@click.option("--tasks", default="aqua-rat:letters,sat-math:letters,aqua-rat:texts,sat-math:texts")
@click.option("--documents", default=12, help="of each task")
@click.option("--batch-sizes", default="1,4,8", help="that hf tries")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=None, help="a model; default: 168M, random weights"
)
@click.option("--data", type=click.Path(path_type=Path), default=DATA)
@click.option(
    "--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None, help="Python of vLLM's environment"
)
@click.option("--dtype", default="auto")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-evals.json")
def main(
    tasks: str,
    documents: int,
    batch_sizes: str,
    folder: Path | None,
    data: Path,
    vllm_python: str | None,
    dtype: str,
    out: Path | None,
) -> None:
    """Prints the seconds of each and their ratios, and writes them to a file."""
    from lm_eval.models.huggingface import HFLM

    from batchllm_lm import BatchLM

    asked = [task.split(":") for task in tasks.split(",")]
    found = [
        document
        for name, style in asked
        for document in task_pairs(data / "agieval" / f"{name}.jsonl", style, documents)
    ]
    requests = instances(found)
    with tempfile.TemporaryDirectory() as scratch:
        model = folder or _model_with_tokenizer(Path(scratch) / "model", data)
        theirs = HFLM(str(model), dtype=dtype, device="cpu", batch_size=1)
        ours = BatchLM(str(model), dtype=dtype)
        timed(ours, requests[:2])
        size = best_batch_size(theirs, requests, [int(size) for size in batch_sizes.split(",")])
        theirs.batch_size_per_gpu = size
        before, scores = timed(ours, requests)
        hf_seconds, hf_scores = timed(theirs, requests)
        after, _ = timed(ours, requests)
        our_seconds = (before + after) / 2
        report: dict[str, Any] = {
            "date": date.today().isoformat(),
            "versions": versions(),
            "cpus": os.cpu_count(),
            "tasks": tasks,
            "documents": len(found),
            "requests": len(requests),
            "prompt_tokens": ours.llm.last_run.prompt_tokens,
            "prompt_tokens_computed": ours.llm.last_run.computed_tokens,
            "seconds": {"batchllm": [before, after], "hf": hf_seconds},
            "hf_batch_size": size,
            "ratio_hf": hf_seconds / our_seconds,
            "against_hf": agreement(found, scores, hf_scores),
        }
        _say(
            f"batchllm {before:.1f} and {after:.1f} s; hf (batches of {size}) {hf_seconds:.1f} s: "
            f"{report['ratio_hf']:.1f}x; {report['against_hf']}"
        )
        if vllm_python:
            pairs = [ours._encode_pair(*request.args) for request in requests]
            answered = run_vllm(vllm_python, model, pairs, Path(scratch))
            report["seconds"]["vllm"] = answered["seconds"]
            report["ratio_vllm"] = answered["seconds"] / our_seconds
            report["against_vllm"] = agreement(found, scores, answered["logprobs"])
            _say(f"vllm {answered['seconds']:.1f} s: {report['ratio_vllm']:.1f}x; {report['against_vllm']}")
    target = out or _RESULTS / f"{report['date']}-evals.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    _say(f"written to {target}")


def _model_with_tokenizer(folder: Path, data: Path) -> Path:
    make_model(folder)
    for file in (data / "tokenizers" / "phi-3-mini").iterdir():
        shutil.copy(file, folder)
    return folder


def _say(text: str) -> None:
    click.echo(text)


if __name__ == "__main__":
    main()
