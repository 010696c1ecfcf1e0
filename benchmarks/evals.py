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
_PROBED = 8  # requests with which batch sizes are tried
LETTERS = "ABCDE"
FILES = ("aqua-rat", "sat-math", "lsat-ar")


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
@click.option(
    "--tasks", default=",".join(f"{name}:{style}" for style in ("letters", "texts") for name in FILES)
)
@click.option(
    "--engines", default="hf,vllm", help="compared with; vllm is left out where there is no --vllm-python"
)
@click.option("--documents", default=8, help="of each task")
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
    tasks: str, documents: int, folder: Path | None, data: Path, out: Path | None, **options: Any
) -> None:
    """Prints the seconds of each and their ratios, and writes them to a file."""
    found = [
        document
        for name, style in (task.split(":") for task in tasks.split(","))
        for document in task_pairs(data / "agieval" / f"{name}.jsonl", style, documents)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        model = folder or _model_with_tokenizer(Path(scratch) / "model", data)
        report = {
            "date": date.today().isoformat(),
            "versions": versions(),
            "cpus": os.cpu_count(),
            "tasks": tasks,
        }
        target = out or _RESULTS / f"{report['date']}-evals.json"
        report |= _compared(found, model, Path(scratch), options)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"written to {target}")


def _compared(
    documents: Sequence[Sequence[tuple[str, str]]], model: Path, scratch: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Ours before and after each of the others; a ratio is the other's seconds over the mean of both."""
    from batchllm_lm import BatchLM

    engines = options["engines"].split(",")
    requests = instances(documents)
    ours = BatchLM(str(model), dtype=options["dtype"])
    timed(ours, requests[:2])
    before, scores = timed(ours, requests)
    run = ours.llm.last_run
    report: dict[str, Any] = {
        "documents": len(documents),
        "requests": len(requests),
        "prompt_tokens": run.prompt_tokens,
        "prompt_tokens_computed": run.computed_tokens,
    }
    click.echo(f"batchllm {before:.1f} s: {run.prompt_tokens:,} tokens, computed {run.computed_tokens:,}")
    for engine in engines:
        if engine == "hf":
            seconds, answers, about = _hf(model, requests, options)
        elif options["vllm_python"]:
            pairs = [ours._encode_pair(*request.args) for request in requests]
            answered = run_vllm(options["vllm_python"], model, pairs, scratch)
            seconds, answers, about = answered["seconds"], answered["logprobs"], {}
        else:
            continue
        after = timed(ours, requests)[0]
        ratio = 2 * seconds / (before + after)
        report[engine] = {
            "seconds": seconds,
            "our_seconds": [before, after],
            "ratio": ratio,
            **about,
            **agreement(documents, scores, answers),
        }
        click.echo(f"{engine} {seconds:.1f} s, batchllm again {after:.1f} s: {ratio:.1f}x")
        before = after
    _print_table(report, [engine for engine in engines if engine in report])
    return report


def _print_table(report: dict[str, Any], engines: Sequence[str]) -> None:
    """Our row has the mean of all our runs."""
    ours = [seconds for engine in engines for seconds in report[engine]["our_seconds"]]
    rows = [(engine, report[engine]["seconds"], f"{report[engine]['ratio']:.1f}x") for engine in engines]
    if ours:
        rows.append(("batchllm", sum(ours) / len(ours), ""))
    click.echo(f"{'engine':10}{'seconds':>9}{'tokens/s':>10}{'ours is':>9}")
    for name, seconds, ratio in rows:
        click.echo(f"{name:10}{seconds:9.1f}{report['prompt_tokens'] / seconds:10,.0f}{ratio:>9}")


def _hf(
    model: Path, requests: Sequence[Any], options: dict[str, Any]
) -> tuple[float, list[float], dict[str, Any]]:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(model), dtype=options["dtype"], device="cpu", batch_size=1)
    size = best_batch_size(theirs, requests, [int(size) for size in options["batch_sizes"].split(",")])
    theirs.batch_size_per_gpu = size
    return *timed(theirs, requests), {"batch_size": size}


def _model_with_tokenizer(folder: Path, data: Path) -> Path:
    make_model(folder)
    for file in (data / "tokenizers" / "phi-3-mini").iterdir():
        shutil.copy(file, folder)
    return folder


if __name__ == "__main__":
    main()
