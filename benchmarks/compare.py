"""Compares engines on the same prompts, alternating, and prints one table of ratios.

    python -m benchmarks.compare --workloads groups,no_sharing --engines vllm,transformers --pairs 5

Every engine is a process that loads the model once and is stopped while another one works; see benchmarks/README.md
for vLLM's. A ratio is the other engine's whole-job time over ours in the same pair, so that a machine whose speed
drifts disturbs both. The least time for the matrix products alone is measured before each pair. Pairs are added to
those in the report, a JSON file in benchmarks/results/: workloads and engines may be run one at a time.
"""

from __future__ import annotations

import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import click

from benchmarks import real_workloads, table, workloads
from benchmarks.engines import MODULES, EngineFailed, Interpreters, Workers, save_workload
from benchmarks.floor import Floor, products
from benchmarks.measured import OURS, pair_of
from benchmarks.model import kv_bytes_per_token, make_model
from benchmarks.report import Report
from benchmarks.result import EngineResult
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
@click.option("--pairs", default=5, help="runs of each engine, added to those in the report")
@click.option(
    "--transformers-pairs", default=1, help="runs of transformers, which takes ten times as long as others"
)
@click.option(
    "--vllm-python", envvar="BATCHLLM_VLLM_PYTHON", default=None, help="Python of vLLM's environment"
)
@click.option("--vllm-env", multiple=True, help="NAME=VALUE for vLLM's process; may be given several times")
@click.option("--vllm-step-tokens", default=0, help="most tokens in one of vLLM's steps; 0: 4096")
@click.option("--data", type=click.Path(path_type=Path), default=real_workloads.DATA, help="real text")
@click.option(
    "--traces", type=click.Path(path_type=Path), default=None, help="folder for our steps as Parquet"
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-cpu.json")
@click.option("--replace", is_flag=True, help="drop earlier pairs of these workloads")
def main(
    names: str, engines: str | None, out: Path | None, replace: bool, data: Path, **options: Any
) -> None:
    """Runs every workload on BatchLLM and on each engine in turn."""
    if engines is None:
        engines = "vllm" if options["vllm_python"] else "transformers"
    chosen = [name for name in engines.split(",") if name]
    for name in chosen:
        if name not in MODULES or name == OURS:
            raise click.BadParameter(f"no engine {name}", param_hint="--engines")
    interpreters = Interpreters(options["vllm_python"], options["vllm_env"])
    try:
        dropped = names.split(",") if replace else []
        report = Report(out or _RESULTS / f"{date.today().isoformat()}-cpu.json", dropped)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table.HEADER)
    with tempfile.TemporaryDirectory() as scratch, Workers(interpreters, Path(scratch)) as workers:
        comparison = Comparison(workers, Path(scratch), chosen, options, report)
        for name in names.split(","):
            try:
                workload = _make(name, data)
            except FileNotFoundError as error:
                click.echo(f"{name:<14} left out: {error}")
                continue
            try:
                click.echo("\n".join(table.lines(comparison.of(workload))))
            except ValueError as error:
                raise click.ClickException(str(error)) from None
        click.echo("\n".join(table.startup_lines(report.startup_seconds)))
    click.echo(f"written to {report.path}")


def _make(name: str, data: Path) -> Workload:
    return real_workloads.make(name, data) if name in real_workloads.NAMES else workloads.make(name)


class Comparison:
    """Runs workloads on all engines."""

    def __init__(
        self, workers: Workers, scratch: Path, engines: list[str], options: dict[str, Any], report: Report
    ):
        self._workers, self._scratch, self._engines, self._options = workers, scratch, engines, options
        self._report = report
        self._floors: dict[str, Floor] = {}

    def of(self, workload: Workload) -> dict[str, Any]:
        """Adds the pairs to the report and returns the workload's row of it."""
        model = make_model(self._scratch / workload.model, workload.model)
        each = kv_bytes_per_token(workload.model)
        kv_bytes = workload.kv_tokens * each if workload.kv_tokens else KV_BYTES
        traces = self._options["traces"]
        settings = Settings(str(model), kv_bytes, _MAX_LENGTH, traces=str(traces) if traces else "")
        path, work = save_workload(workload, self._scratch), products(workload)
        described = {
            "workload": workload.name,
            "rows": len(workload.prompts),
            "prompt_tokens": workload.prompt_tokens,
            "distinct_prompt_tokens": work.distinct_prompt_tokens,
            "output_tokens": len(workload.prompts) * workload.max_tokens,
            "kv_budget_bytes": kv_bytes,
            "kv_token_bytes": each,
            "weights_bytes": (model / "model.safetensors").stat().st_size,
        }
        failed: dict[str, str] = {}
        row: dict[str, Any] = {}
        for number in range(self._options["pairs"]):
            floor_seconds = self._floor(workload.model, model).seconds(work)
            todo = [OURS, *(engine for engine in self._due(number) if engine not in failed)]
            runs: dict[str, EngineResult] = {}
            for engine in reversed(todo) if number % 2 else todo:
                try:
                    runs[engine] = self._workers.run(engine, self._settings(engine, settings), path)
                except EngineFailed as error:
                    if engine == OURS:
                        raise click.ClickException(str(error)) from None
                    failed[engine] = str(error)
            self._report.note_starts(self._workers.startup_seconds, self._workers.versions)
            row = self._report.add(described, pair_of(runs, failed, floor_seconds))
        return row

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
