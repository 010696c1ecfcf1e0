"""Compares engines on the same prompts, alternating, and prints one table of ratios.

    python -m benchmarks.compare --workloads groups --engines transformers --pairs 3

Each run is a process of its own; loading the model is not timed. A ratio is the other engine's whole-job time over
ours in the same pair, so that a machine whose speed drifts disturbs both. Results go to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import click

from batchllm.versions import versions
from benchmarks import result, workloads
from benchmarks.model import make_model

_ENGINES = {"transformers": "benchmarks.engine_transformers"}
_RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option("--workloads", "names", default="groups", help=f"comma-separated: {', '.join(workloads.NAMES)}")
@click.option("--engines", default="transformers", help=f"comma-separated: {', '.join(_ENGINES)}")
@click.option("--pairs", default=3, help="runs of each engine")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="JSON file; default: results/DATE-cpu.json"
)
def main(names: str, engines: str, pairs: int, out: Path | None) -> None:
    """Runs every workload on BatchLLM and on each engine in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model")
        for name in names.split(","):
            for engine in engines.split(","):
                rows.append(_compare(model, name, engine, pairs, Path(scratch)))
                click.echo(_line(rows[-1]))
    report = {"date": date.today().isoformat(), "versions": dict(versions()), "rows": rows}
    target = out or _RESULTS / f"{report['date']}-cpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


def _compare(model: Path, name: str, engine: str, pairs: int, scratch: Path) -> dict[str, object]:
    workload_path = scratch / f"{name}.json"
    workloads.save(workloads.make(name), workload_path)
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(_run("benchmarks.engine_batchllm", model, workload_path, scratch))
        theirs.append(_run(_ENGINES[engine], model, workload_path, scratch))
    ratios = sorted(other.seconds / mine.seconds for mine, other in zip(ours, theirs))
    return {
        "workload": name,
        "engine": theirs[0].engine,
        "ours_seconds": round(statistics.median(run.seconds for run in ours), 2),
        "their_seconds": round(statistics.median(run.seconds for run in theirs), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "equal_tokens": round(result.equal_tokens(ours[0], theirs[0]), 3),
    }


def _run(module: str, model: Path, workload: Path, scratch: Path) -> result.EngineResult:
    answer = scratch / "answer.json"
    command = [sys.executable, "-m", module, str(model), str(workload), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{module} failed:\n{done.stderr[-2000:]}")
    return result.load(answer)


def _line(row: dict[str, object]) -> str:
    seconds = f"ours {row['ours_seconds']:>8} s  theirs {row['their_seconds']:>8} s"
    ratio = f"ratio {row['ratio']:>6} {row['ratio_spread']}"
    return f"{row['workload']:<14} {row['engine']:<24} {seconds}   {ratio}   equal tokens {row['equal_tokens']:.1%}"


if __name__ == "__main__":
    main()
