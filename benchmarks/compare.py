"""Compares engines on the same prompts, alternating, and prints one table of ratios.

    python -m benchmarks.compare --workloads groups,no_sharing --engines vllm,transformers --pairs 5

Every engine is a process that loads the model once and is stopped while another one works; see benchmarks/README.md
for vLLM's. A ratio is the other engine's whole-job time over ours in the same pair, so that a machine whose speed
drifts disturbs both. The least time for the matrix products alone is measured before each pair. Results go to
benchmarks/results/ as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import click

from batchllm.versions import versions
from benchmarks import real_workloads, table, workloads
from benchmarks.engines import MODULES, EngineFailed, Interpreters, Workers, save_workload
from benchmarks.floor import Floor, products
from benchmarks.measured import OURS, Measured
from benchmarks.model import kv_bytes_per_token, make_model
from benchmarks.worker import Settings
from benchmarks.workloads import KV_BYTES, Workload

_RESULTS = Path(__file__).parent / "results"
_MAX_LENGTH = 4096
_FLOOR_STEP = 2048
ALL = [name for name in (*workloads.NAMES, *real_workloads.NAMES) if name != "tiny"]


@click.command()
@click.option("--workloads", "names", default=",".join(ALL), help=f"comma-separated: {', '.join(ALL)}")
@click.option(
    "--engines",
    default="vllm",
    help=f"comma-separated: {', '.join(name for name in MODULES if name != OURS)}",
)
@click.option("--pairs", default=5, help="runs of each engine")
@click.option(
    "--transformers-pairs", default=1, help="runs of transformers, which takes ten times as long as others"
)
@click.option(
    "--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None, help="Python of vLLM's environment"
)
@click.option("--vllm-env", multiple=True, help="NAME=VALUE for vLLM's process; may be given several times")
@click.option("--vllm-step-tokens", default=0, help="most tokens in one of vLLM's steps; 0: 4096")
@click.option("--data", type=click.Path(path_type=Path), default=real_workloads.DATA, help="real text")
@click.option("--memory/--no-memory", default=True, help="one run more in a fresh process, for its peak")
@click.option(
    "--traces", type=click.Path(path_type=Path), default=None, help="folder for our steps as Parquet"
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-cpu.json")
def main(names: str, engines: str | None, out: Path | None, data: Path, **options: Any) -> None:
    """Runs every workload on BatchLLM and on each engine in turn."""
    if engines is None:
        engines = "vllm" if options["vllm_python"] else "transformers"
    chosen = [name for name in engines.split(",") if name]
    for name in chosen:
        if name not in MODULES or name == OURS:
            raise click.BadParameter(f"no engine {name}", param_hint="--engines")
    interpreters = Interpreters(options["vllm_python"], options["vllm_env"])
    click.echo(table.HEADER)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Workers(interpreters, Path(scratch)) as workers:
        comparison = Comparison(workers, Path(scratch), chosen, options)
        for name in names.split(","):
            try:
                workload = _make(name, data)
            except FileNotFoundError as error:
                click.echo(f"{name:<14} left out: {error}")
                continue
            rows.append(comparison.of(workload).figures())
            click.echo("\n".join(table.lines(rows[-1])))
        starts = {engine: sorted(seconds) for engine, seconds in workers.startup_seconds.items()}
        click.echo("\n".join(table.startup_lines(starts)))
        report = {
            "date": date.today().isoformat(),
            "versions": {**versions(), "engines": workers.versions},
            "cpus": os.cpu_count(),
            "startup_seconds": {e: [round(s, 2) for s in seconds] for e, seconds in starts.items()},
            "rows": rows,
        }
    target = out or _RESULTS / f"{report['date']}-cpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(f"written to {target}")


def _make(name: str, data: Path) -> Workload:
    return real_workloads.make(name, data) if name in real_workloads.NAMES else workloads.make(name)


class Comparison:
    """Runs workloads on all engines."""

    def __init__(self, workers: Workers, scratch: Path, engines: list[str], options: dict[str, Any]):
        self._workers, self._scratch, self._engines, self._options = workers, scratch, engines, options
        self._floors: dict[str, Floor] = {}

    def of(self, workload: Workload) -> Measured:
        model = make_model(self._scratch / workload.model, workload.model)
        kv_bytes = workload.kv_tokens * kv_bytes_per_token(workload.model) if workload.kv_tokens else KV_BYTES
        traces = self._options["traces"]
        settings = Settings(str(model), kv_bytes, _MAX_LENGTH, traces=str(traces) if traces else "")
        path = save_workload(workload, self._scratch)
        found = Measured(workload, products(workload), settings, kv_bytes_per_token(workload.model))
        failed: set[str] = set()
        for pair in range(self._options["pairs"]):
            found.floor_seconds.append(self._floor(workload.model, model).seconds(found.products))
            todo = [OURS, *(engine for engine in self._due(pair) if engine not in failed)]
            for engine in reversed(todo) if pair % 2 else todo:
                try:
                    found.add(engine, self._workers.run(engine, self._settings(engine, settings), path))
                except EngineFailed as error:
                    if engine == OURS:
                        raise click.ClickException(str(error)) from None
                    found.failures[engine] = str(error)
                    failed.add(engine)
        if self._options["memory"]:
            found.rss_peak_bytes = int(
                self._workers.run_fresh(OURS, settings, path).figures["rss_peak_bytes"]
            )
        return found

    def _due(self, pair: int) -> list[str]:
        few = self._options["transformers_pairs"]
        return [e for e in self._engines if pair < few or not e.startswith("transformers")]

    def _settings(self, engine: str, settings: Settings) -> Settings:
        if engine != "vllm":
            return settings
        return Settings(**{**vars(settings), "step_tokens": self._options["vllm_step_tokens"]})

    def _floor(self, name: str, model: Path) -> Floor:
        if name not in self._floors:
            self._floors[name] = Floor(str(model), _FLOOR_STEP)
        return self._floors[name]


if __name__ == "__main__":
    main()
