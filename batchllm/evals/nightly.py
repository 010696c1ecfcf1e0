"""One evaluation from end to end: tasks → one planned run → samples and scores → comparison with an earlier night."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from batchllm import exit_codes
from batchllm.errors import JobError
from batchllm.evals.compare import CHANGES, Comparison, Night, compare, previous_night, read_night
from batchllm.evals.eval_job import EvalJob
from batchllm.evals.harness_model import BatchLM
from batchllm.evals.harness_run import TaskRuns, run_tasks
from batchllm.evals.kept_answers import KeptAnswers
from batchllm.evals.night_folder import check_night, write_night
from batchllm.evals.report import report_text
from batchllm.evals.samples import sample_table
from batchllm.evals.score_table import error_table, score_table
from batchllm.evals.tasks import LoadedTasks, load_tasks
from batchllm.executor.model_folder import fingerprint
from batchllm.llm import LLM
from batchllm.report.progress import Progress
from batchllm.versions import batchllm_version, versions


@dataclass(frozen=True)
class EvalSummary:
    """`exit_code`: OK, SOME_FAILED where tasks or documents could not be evaluated, REGRESSION."""

    path: Path
    exit_code: int
    text: str
    scores: pl.DataFrame
    comparison: Comparison | None


def run_eval(job: EvalJob, *, overwrite: bool = False, quiet: bool = False) -> EvalSummary:
    """Raises UserError, with nothing written, when no task can run, or the folder may not be written. It gets

    scores.parquet   a row for each task and metric, with its 95% confidence interval; written last
    samples.parquet  a row for each document
    changes.parquet, flips.parquet   against the previous night: each score; each document that came out otherwise
    report.txt, run.json

    Interrupted, answers are kept beside the folder, and the same call goes on from there.
    """
    path = Path(job.output.path)
    check_night(path, overwrite)
    previous = _previous(job, path)
    loaded = load_tasks(job.eval)
    if not loaded.tasks:
        raise JobError(next(iter(loaded.errors.values())))
    model = _model(job, quiet)
    model.kept = kept = KeptAnswers(path.parent, _configuration(job))
    try:
        runs = run_tasks(model, loaded.tasks, job.eval)
        samples, scores = _tables(runs, loaded)
        comparison = None if previous is None else compare(scores, samples, previous, job.compare)
        faults = [*loaded.errors.values(), *runs.errors.values(), *model.faults]
        text = report_text(scores, comparison, faults)
        about = {**_about(job, comparison), **_figures(model, runs), "answers_resumed": kept.taken}
        write_night(path, _files(scores, samples, comparison, text, about))
        kept.remove()
    finally:
        kept.close()
    return EvalSummary(path, _exit_code(comparison, faults), text, scores, comparison)


def _previous(job: EvalJob, path: Path) -> Night | None:
    chosen = job.compare.previous
    if chosen == "none":
        return None
    folder = previous_night(path) if chosen == "auto" else Path(chosen)
    return None if folder is None else read_night(folder)


def _configuration(job: EvalJob) -> bytes:
    """All that decides answers beside requests. The software too: an evaluation looks for what it changes."""
    about = {
        "model": fingerprint(job.model.path, job.model.quantize),
        "dtype": job.model.dtype,
        "device": job.engine.device,
        "versions": dict(versions()),
    }
    return json.dumps(about).encode()


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


def _tables(runs: TaskRuns, loaded: LoadedTasks) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(samples, scores), with a row for each task that has none."""
    samples = pl.concat(
        [sample_table(results) for results in runs.results.values()] or [sample_table({"samples": {}})]
    )
    scores = [score_table(results, samples) for results in runs.results.values()]
    return samples, pl.concat([*scores, error_table({**loaded.errors, **runs.errors})])


def _exit_code(comparison: Comparison | None, faults: list[str]) -> int:
    if comparison is not None and len(comparison.regressions):
        return exit_codes.REGRESSION
    return exit_codes.SOME_FAILED if faults else exit_codes.OK


def _figures(model: BatchLM, runs: TaskRuns) -> dict[str, Any]:
    run = model.llm.last_run
    return {
        "engine_runs": model.runs,
        "prompt_tokens": 0 if run is None else run.prompt_tokens,
        "prompt_tokens_computed": 0 if run is None else run.computed_tokens,
        "task_versions": {task: results["versions"].get(task) for task, results in runs.results.items()},
    }


def _about(job: EvalJob, comparison: Comparison | None) -> dict[str, Any]:
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "batchllm": batchllm_version(),
        "model_fingerprint": fingerprint(job.model.path, job.model.quantize),
        "previous": None if comparison is None else str(comparison.previous),
        "job": job.model_dump(mode="json"),
    }


def _files(
    scores: pl.DataFrame,
    samples: pl.DataFrame,
    comparison: Comparison | None,
    text: str,
    about: dict[str, Any],
) -> dict[str, bytes]:
    """The files of the folder, by name."""
    tables = {
        "changes": pl.DataFrame(schema=CHANGES) if comparison is None else comparison.changes,
        "samples": samples,
        "scores": scores,
    }
    if comparison is not None:
        tables["flips"] = comparison.flips
    return {
        **{f"{name}.parquet": _parquet(table) for name, table in tables.items()},
        "run.json": json.dumps(about, indent=1, ensure_ascii=False).encode(),
        "report.txt": f"{text}\n".encode(),
    }


def _parquet(table: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()
