"""Whole commands from cold processes: `batchllm run` against a vLLM script, on the same Parquet file.

    python -m benchmarks.startup --vllm-python VLLM/bin/python --pairs 3

Two jobs: one row and one token (start-up: process start to first step, writing and exit included), and 500 questions
about SQuAD's paragraphs. vLLM runs both with its compiler (its default) and without (it starts sooner and computes
more slowly). Files are in the page cache, and what either keeps between runs (vLLM's compiled graphs, BatchLLM's timing
of the device) is there from the second run on.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from batchllm.versions import versions
from benchmarks import real_workloads
from benchmarks.engines import EngineFailed, Interpreters
from benchmarks.model import make_model

_RESULTS = Path(__file__).parent / "results"
_RUN = "import sys; from batchllm.cli import main; sys.exit(main())"


@click.command()
@click.option(
    "--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None, help="Python of vLLM's environment"
)
@click.option("--pairs", default=3, help="runs of each command")
@click.option("--rows", default=500)
@click.option("--max-tokens", default=16)
@click.option("--data", type=click.Path(path_type=Path), default=real_workloads.DATA)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-startup.json"
)
def main(
    vllm_python: str | None, pairs: int, rows: int, max_tokens: int, data: Path, out: Path | None
) -> None:
    """Prints seconds and ratios of both jobs."""
    if not data.is_dir():
        raise click.ClickException(f"no data in {data}; --data names another place")
    interpreters = Interpreters(vllm_python)
    texts = real_workloads.text_rows(data, rows)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model")
        for file in real_workloads.tokenizer_files(data):
            shutil.copy(file, model)
        found = [
            _measure(Path(scratch), model, "one row", texts[:1], 1, interpreters, pairs),
            _measure(Path(scratch), model, f"{len(texts)} rows", texts, max_tokens, interpreters, pairs),
        ]
    report = {"date": date.today().isoformat(), "versions": dict(versions()), "jobs": found}
    target = out or _RESULTS / f"{report['date']}-startup.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"written to {target}")


def _measure(
    scratch: Path,
    model: Path,
    name: str,
    texts: Sequence[str],
    max_tokens: int,
    interpreters: Interpreters,
    pairs: int,
) -> dict[str, object]:
    prompts = scratch / "prompts.parquet"
    pq.write_table(pa.table({"prompt": list(texts)}), prompts)
    job = scratch / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(model)},
                "input": {"path": str(prompts)},
                "prompt": {"column": "prompt"},
                "generate": {"max_tokens": max_tokens, "ignore_eos": True},
                "output": {"path": str(scratch / "ours")},
            }
        )
    )
    theirs = ["-m", "benchmarks.job_vllm", str(model), str(prompts), str(scratch / "theirs.parquet")]
    commands = {
        "batchllm": ["-c", _RUN, "run", str(job), "--overwrite"],
        "vllm": [*theirs, str(max_tokens), "0"],
        "vllm eager": [*theirs, str(max_tokens), "1"],
    }
    seconds: dict[str, list[float]] = {engine: [] for engine in commands}
    for _ in range(pairs):
        for engine, arguments in commands.items():
            if engine == "batchllm" or interpreters.vllm:
                seconds[engine].append(_wall_seconds(engine.split()[0], arguments, interpreters))
    ours = statistics.median(seconds["batchllm"])
    result: dict[str, object] = {"job": name, "seconds": {e: _rounded(s) for e, s in seconds.items()}}
    for engine, theirs_seconds in seconds.items():
        if theirs_seconds:
            ratios = sorted(s / mine for mine, s in zip(seconds["batchllm"], theirs_seconds))
            median = statistics.median(theirs_seconds)
            result[f"{engine} / batchllm"] = round(statistics.median(ratios), 2)
            spread = f"[{ratios[0]:.2f}-{ratios[-1]:.2f}]"
            click.echo(f"{name:<10}{engine:<12}{median:>8.2f} s{median / ours:>7.2f} {spread}")
    return result


def _wall_seconds(engine: str, arguments: list[str], interpreters: Interpreters) -> float:
    python, environment = interpreters.of(engine)
    started = time.monotonic()
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - started
    if done.returncode:
        raise EngineFailed(f"{engine}: {done.stderr[-2000:]}")
    return seconds


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


if __name__ == "__main__":
    main()
