"""One evaluation from end to end: tasks → one planned run → samples and scores → comparison with an earlier night."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from batchllm.errors import JobError, OutputError
from batchllm.evals.compare import CHANGES, Comparison, compare, previous_night
from batchllm.evals.eval_job import EvalJob
from batchllm.evals.harness_model import BatchLM
from batchllm.evals.harness_run import TaskRuns, run_tasks
from batchllm.evals.report import report_text
from batchllm.evals.samples import sample_table
from batchllm.evals.score_table import error_table, score_table
from batchllm.evals.tasks import load_tasks
from batchllm.executor.model_folder import fingerprint
from batchllm.llm import LLM
from batchllm.report.progress import Progress
from batchllm.versions import batchllm_version

EXIT_OK, EXIT_FAULTS, EXIT_REGRESSION = 0, 3, 4


@dataclass(frozen=True)
class EvalSummary:
    """`exit_code`: 0 all is well, 3 some tasks or documents could not be evaluated, 4 a regression."""

    path: Path
    exit_code: int
    text: str
    scores: pl.DataFrame
    comparison: Comparison | None


def run_eval(job: EvalJob, *, overwrite: bool = False, quiet: bool = False) -> EvalSummary:
    """Raises UserError, with nothing written, when no task can run. The folder gets

    scores.parquet   a row for each task and metric, with its 95% confidence interval; written last
    samples.parquet  a row for each document
    changes.parquet, flips.parquet   against the previous night: each score; each document that came out otherwise
    report.txt, run.json
    """
    path = Path(job.output.path)
    if (path / "scores.parquet").exists() and not overwrite:
        raise OutputError(f"{path} holds an evaluation already; set another output.path or give --overwrite")
    previous = _previous(job, path)
    loaded = load_tasks(job.eval)
    if not loaded.tasks:
        raise JobError(next(iter(loaded.errors.values())))
    model = _model(job, quiet)
    runs = run_tasks(model, loaded.tasks, job.eval)
    samples = pl.concat(
        [sample_table(results) for results in runs.results.values()] or [sample_table({"samples": {}})]
    )
    errors = {**loaded.errors, **runs.errors}
    tables = [score_table(results, samples) for results in runs.results.values()]
    scores = pl.concat([*tables, error_table(errors)])
    comparison = None if previous is None else compare(scores, samples, previous, job.compare)
    text = report_text(scores, comparison, [*errors.values(), *model.faults])
    _write(path, job, scores, samples, comparison, text, _figures(model, runs))
    return EvalSummary(path, _exit_code(comparison, [*errors, *model.faults]), text, scores, comparison)


def _previous(job: EvalJob, path: Path) -> Path | None:
    chosen = job.compare.previous
    if chosen == "none":
        return None
    return previous_night(path) if chosen == "auto" else Path(chosen)


def _model(job: EvalJob, quiet: bool) -> BatchLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "device: auto")  # said as every command says it
        llm = LLM(
            job.model.path,
            dtype=job.model.dtype,
            device=job.engine.device,
            quantize=job.model.quantize,
            trust_remote_code=job.model.trust_remote_code,
            kv_memory=job.engine.kv_memory,
            max_step_tokens=job.engine.max_step_tokens,
            min_shared_tokens=job.engine.min_shared_tokens,
        )
    if llm.device_note:
        Progress(quiet=quiet).note(llm.device_note)
    return BatchLM(llm, quiet=quiet)


def _exit_code(comparison: Comparison | None, faults: list[str]) -> int:
    if comparison is not None and len(comparison.regressions):
        return EXIT_REGRESSION
    return EXIT_FAULTS if faults else EXIT_OK


def _figures(model: BatchLM, runs: TaskRuns) -> dict[str, Any]:
    run = model.llm.last_run
    return {
        "engine_runs": model.runs,
        "prompt_tokens": 0 if run is None else run.prompt_tokens,
        "prompt_tokens_computed": 0 if run is None else run.computed_tokens,
        "task_versions": {task: results["versions"].get(task) for task, results in runs.results.items()},
    }


def _write(
    path: Path,
    job: EvalJob,
    scores: pl.DataFrame,
    samples: pl.DataFrame,
    comparison: Comparison | None,
    text: str,
    figures: dict[str, Any],
) -> None:
    """Everything beside the folder first: it is there whole or not at all."""
    scratch = path.parent / f".{path.name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    changes = pl.DataFrame(schema=CHANGES) if comparison is None else comparison.changes
    changes.write_parquet(scratch / "changes.parquet")
    if comparison is not None:
        comparison.flips.write_parquet(scratch / "flips.parquet")
    samples.write_parquet(scratch / "samples.parquet", compression="zstd")
    about = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "batchllm": batchllm_version(),
        "model_fingerprint": fingerprint(job.model.path, job.model.quantize),
        "previous": None if comparison is None else str(comparison.previous),
        "job": job.model_dump(mode="json"),
        **figures,
    }
    (scratch / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    (scratch / "report.txt").write_text(text + "\n", encoding="utf-8")
    scores.write_parquet(scratch / "scores.parquet")
    if path.exists():
        if not (path / "scores.parquet").exists() and any(path.iterdir()):
            shutil.rmtree(scratch)
            raise OutputError(f"{path} holds files that are no evaluation; set another output.path")
        shutil.rmtree(path)
    scratch.rename(path)
