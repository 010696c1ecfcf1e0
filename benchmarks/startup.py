"""Whole commands from cold processes: `batchllm run` against a vLLM script, on the same Parquet file.

    python -m benchmarks.startup --vllm-python VLLM/bin/python --pairs 3
    python -m benchmarks.startup --jobs rows --engines vllm --pairs 1      # one part of it, added to the same report

Two jobs: one row and one token (start-up: process start to first step, writing and exit included), and 500 questions
about SQuAD's paragraphs. vLLM runs both with its compiler (its default) and without (it starts sooner and computes
more slowly). Files are in the page cache, and what either keeps between runs (vLLM's compiled graphs, BatchLLM's timing
of the device and its compiled kernels) is there from the second run on. `--python` names an environment with
BatchLLM's own dependencies only: transformers imports torchao, scipy and others where they are installed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

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
_ENGINES = ("batchllm", "vllm", "vllm-eager")
_JOBS = ("one", "rows")


@click.command()
@click.option(
    "--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None, help="Python of vLLM's environment"
)
@click.option("--python", default=sys.executable, help="Python that runs batchllm")
@click.option("--jobs", default=",".join(_JOBS), help=f"comma-separated: {', '.join(_JOBS)}")
@click.option("--engines", default=",".join(_ENGINES), help=f"comma-separated: {', '.join(_ENGINES)}")
@click.option("--pairs", default=3, help="runs of each command, added to those in the report")
@click.option("--replace", is_flag=True, help="drop earlier runs of these jobs and engines")
@click.option("--rows", default=500)
@click.option("--max-tokens", default=16)
@click.option("--data", type=click.Path(path_type=Path), default=real_workloads.DATA)
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-startup.json"
)
def main(
    vllm_python: str | None,
    python: str,
    jobs: str,
    engines: str,
    pairs: int,
    replace: bool,
    rows: int,
    max_tokens: int,
    data: Path,
    out: Path | None,
) -> None:
    """Prints seconds and ratios of the jobs."""
    if not data.is_dir():
        raise click.ClickException(f"no data in {data}; --data names another place")
    chosen, engine_names = _chosen(jobs, _JOBS, "--jobs"), _chosen(engines, _ENGINES, "--engines")
    target = out or _RESULTS / f"{date.today().isoformat()}-startup.json"
    report = json.loads(target.read_text()) if target.exists() else {"jobs": {}}
    with tempfile.TemporaryDirectory() as scratch:
        commands = Commands(Path(scratch), data, python, Interpreters(vllm_python))
        for job in chosen:
            name, count, tokens = ("one row", 1, 1) if job == "one" else (f"{rows} rows", rows, max_tokens)
            arguments = commands.of(count, tokens)
            seconds: dict[str, list[float]] = report["jobs"].setdefault(name, {"seconds": {}})["seconds"]
            for engine in engine_names if replace else ():
                seconds.pop(engine, None)
            for _ in range(pairs):
                for engine in engine_names:
                    seconds.setdefault(engine, []).append(commands.wall_seconds(engine, arguments[engine]))
                    report["jobs"][name] = figures(seconds)
                    report |= {"date": date.today().isoformat(), "versions": dict(versions())}
                    target.write_text(json.dumps(report, indent=1) + "\n")
            click.echo("\n".join(lines(name, report["jobs"][name])))
    click.echo(f"written to {target}")


def _chosen(given: str, known: tuple[str, ...], option: str) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    return names


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """All runs of a job, and medians over ours. The ratio's spread: between the runs that lie furthest apart."""
    found: dict[str, Any] = {
        "seconds": {engine: [round(value, 2) for value in values] for engine, values in seconds.items()},
        "median_seconds": {engine: round(statistics.median(values), 2) for engine, values in seconds.items()},
    }
    ours = seconds.get("batchllm")
    if ours:
        found["ratio"] = {
            engine: {
                "median": round(statistics.median(values) / statistics.median(ours), 2),
                "spread": [round(min(values) / max(ours), 2), round(max(values) / min(ours), 2)],
            }
            for engine, values in seconds.items()
            if engine != "batchllm"
        }
    return found


def lines(name: str, job: dict[str, Any]) -> list[str]:
    """A line for each engine."""
    found = []
    for engine, median in job["median_seconds"].items():
        ratio = job.get("ratio", {}).get(engine)
        text = f"{ratio['median']:>7.2f} [{ratio['spread'][0]:.2f}-{ratio['spread'][1]:.2f}]" if ratio else ""
        found.append(f"{name:<10}{engine:<12}{median:>8.2f} s{len(job['seconds'][engine]):>3} runs{text}")
    return found


class Commands:
    """The command lines of each job, with the files that they need."""

    def __init__(self, scratch: Path, data: Path, python: str, interpreters: Interpreters):
        self._scratch, self._data, self._python, self._interpreters = scratch, data, python, interpreters
        self._model = make_model(scratch / "model")
        for file in real_workloads.tokenizer_files(data):
            shutil.copyfile(file, self._model / file.name)

    def of(self, rows: int, max_tokens: int) -> dict[str, list[str]]:
        """Arguments for the interpreter, by engine."""
        model, prompts = str(self._model), str(self._scratch / f"prompts-{rows}.parquet")
        pq.write_table(pa.table({"prompt": list(real_workloads.text_rows(self._data, rows))}), prompts)
        job = self._scratch / f"job-{rows}.yaml"
        job.write_text(
            yaml.safe_dump(
                {
                    "model": {"path": model},
                    "input": {"path": prompts},
                    "prompt": {"column": "prompt"},
                    "generate": {"max_tokens": max_tokens, "ignore_eos": True},
                    "output": {"path": str(self._scratch / f"ours-{rows}")},
                }
            )
        )
        theirs = ["-m", "benchmarks.job_vllm", model, prompts, str(self._scratch / "theirs.parquet")]
        return {
            "batchllm": ["-c", _RUN, "run", str(job)],
            "vllm": [*theirs, str(max_tokens), "0"],
            "vllm-eager": [*theirs, str(max_tokens), "1"],
        }

    def wall_seconds(self, engine: str, arguments: list[str]) -> float:
        """From process start to its end. Raises EngineFailed."""
        for answers in self._scratch.glob("ours-*"):  # a run would go on from these
            shutil.rmtree(answers)
        python, environment = self._interpreters.of(engine.split("-")[0])
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # else our modules are compiled every time: theirs are not
        if engine == "batchllm":
            python = self._python
        started = time.monotonic()
        done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment)
        seconds = time.monotonic() - started
        if done.returncode:
            raise EngineFailed(f"{engine}: {done.stderr[-2000:]}")
        return seconds


if __name__ == "__main__":
    main()
