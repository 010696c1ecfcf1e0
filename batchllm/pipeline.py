"""One job from end to end: read → plan → execute → write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchllm.answers import answers_of, error_of, faults_of
from batchllm.core import Plan, PlanStats, PromptTable, RequestTable
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import load_rows, validate_columns
from batchllm.dataset.parts import parquet_files
from batchllm.dataset.reader import open_input
from batchllm.dataset.results import ResultStore, claim_output
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import JobError
from batchllm.executor.gate import check_lengths
from batchllm.executor.model_folder import check_model_folder, fingerprint
from batchllm.forecast import Forecast, forecast_run, plan_for_model, plan_options
from batchllm.history import seeded_estimator
from batchllm.job import JobSpec
from batchllm.limits import longest_sequence, refuse_long_prompts, refuse_unknown_tokens
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.plan import draft_plan
from batchllm.planner.plan_file import write_plan
from batchllm.planner.simulate import SimulationOptions
from batchllm.report.metrics import RunMetrics, write_metrics
from batchllm.report.progress import Progress, Stage
from batchllm.report.stopwatch import Stopwatch, rss_peak_bytes
from batchllm.report.summary import summary_text

if TYPE_CHECKING:
    import polars as pl

    from batchllm.executor.engine import Engine, EngineOptions, EngineStats
    from batchllm.executor.gate import LengthLimit
    from batchllm.executor.model import ModelRunner

_NOTHING = PlanStats(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class RunSummary:
    """What a run came to. `exit_code`: 0 every row answered, 3 some rows failed, 130 interrupted."""

    path: Path
    exit_code: int
    metrics: RunMetrics
    text: str

    @property
    def table(self) -> pl.LazyFrame:
        """The whole result in input order."""
        import polars as pl

        return pl.scan_parquet(self.path / "*.parquet")


class _Loaded(NamedTuple):
    model: ModelRunner
    kv_tokens: int


@dataclass
class _Run:
    """What the stages of one run share, and what its metrics are made from."""

    job: JobSpec
    tokenizer: Any
    progress: Progress
    watch: Stopwatch
    prompts: PromptTable
    requests: RequestTable
    store: ResultStore
    model: _Loaded | None  # None: not loaded yet
    lengths: LengthEstimator
    plan: PlanStats = _NOTHING
    forecast: Forecast | None = None
    engine: EngineStats | None = None
    reordering_saves: int = 0
    kv_token_bytes: int = 0
    kv_budget_bytes: int = 0


def run_job(job: JobSpec, *, overwrite: bool = False, quiet: bool = False) -> RunSummary:
    """Answers every row of the job's input. Raises UserError, with nothing written, when the job cannot start.

    Ctrl-C keeps every answer found so far; the same call then goes on from there.
    """
    progress, watch = Progress(quiet=quiet), Stopwatch()
    config, limit = _check_model(job)
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    data = open_input(job.input, job.source)
    validate_columns(job, data.schema)
    identity = json.dumps({"input": job.input.path, "format": job.input.format})
    with claim_output(job.output.path, identity, overwrite) as claim:
        with watch.time("tokenize"), progress.stage("tokenizing", data.num_rows) as stage:
            rows = load_rows(job, data, tokenizer, claim.work_dir, stage)
        prompts = refuse_long_prompts(rows.prompts, _text_size(config, "max_position_embeddings"))
        prompts = refuse_unknown_tokens(prompts, _text_size(config, "vocab_size"))
        check_lengths(limit, longest_sequence(prompts), config.model_type)
        lengths = seeded_estimator(job.plan.history, prompts.params, job.source)
        configuration = _configuration(job)
        ids = rows.kept.column(job.input.id) if job.input.id else None
        requests = make_requests(prompts, ids, configuration)
        # When the model turns out not to run, nothing may be left in a new folder and nothing of another job's
        # results may be lost, so it is loaded first.
        is_new = overwrite or not parquet_files(job.output.path)
        model = _load_model(job, watch) if is_new and len(prompts.faults) < prompts.num_rows else None
        with ResultStore.open(
            job.output.path,
            identity,
            requests,
            rows.kept,
            configuration=configuration,
            logprobs=any(params.logprobs for params in prompts.params),
            fault_rows=prompts.faults.keys(),
            part_rows=job.output.part_rows,
            flush_seconds=job.output.flush_seconds,
            resolved_job=job.resolved(),
            overwrite=overwrite,
            claim=claim,
        ) as store:
            run = _Run(job, tokenizer, progress, watch, prompts, requests, store, model, lengths)
            run.reordering_saves = rows.reordering_saves
            interrupted = _answer_and_finish(run)
            return _summary(run, interrupted)


def _check_model(job: JobSpec) -> tuple[Any, LengthLimit | None]:
    from batchllm.executor.model_config import load_config

    if job.engine.device == "cuda":
        raise JobError(
            f"{job.source}: engine.device: this version runs on the CPU only; set it to cpu or auto."
        )
    check_model_folder(job.model.path, job.model.trust_remote_code)
    return load_config(job.model.path, job.model.trust_remote_code)


def _answer_and_finish(run: _Run) -> bool:
    """Returns whether Ctrl-C ended it early."""
    for note in run.store.notes:
        run.progress.note(note)
    try:
        _answer_all(run)
        with run.watch.time("write"):
            run.store.finish()
    except KeyboardInterrupt:
        run.store.flush()
        return True
    return False


def _answer_all(run: _Run) -> None:
    """Adds an answer for every request that has none yet."""
    job, store, prompts, requests = run.job, run.store, run.prompts, run.requests
    store.add(faults_of(~store.done, prompts, requests))
    if store.done.all():
        return
    from batchllm.executor.budget import step_tokens, too_long

    model, kv_tokens = run.model or _load_model(job, run.watch)
    hopeless, reason = too_long(prompts, requests, ~store.done, kv_tokens)
    store.add([error_of(int(request), reason, prompts, requests) for request in np.flatnonzero(hopeless)])
    with run.watch.time("plan"), run.progress.stage("planning", int((~store.done).sum())) as stage:
        draft = draft_plan(prompts, requests, ~store.done, plan_options(job, run.lengths))
        memory = SimulationOptions(kv_tokens, step_tokens(job.engine.max_step_tokens))
        plan, reason = plan_for_model(model, fingerprint(job.model.path), draft, job.engine.order, memory)
        stage.advance(plan.stats.requests, plan.stats.prompt_tokens)
    run.plan = plan.stats
    run.progress.note(f"order: {reason}")
    if plan.num_sequences:
        write_plan(plan, job.output.path / "_run" / "plan.parquet")
        _execute(run, model, plan, kv_tokens)


def _execute(run: _Run, model: ModelRunner, plan: Plan, kv_tokens: int) -> None:
    """Runs the plan and writes answers as they come."""
    from batchllm.executor.budget import engine_options
    from batchllm.executor.engine import Engine
    from batchllm.executor.kv_pool import bytes_per_token
    from batchllm.executor.stopping import StopRules, end_of_sequence_ids

    rules = StopRules(end_of_sequence_ids(model.model.generation_config, run.tokenizer), run.tokenizer)
    options = engine_options(plan, run.prompts, kv_tokens, run.job.engine.max_step_tokens)
    run.forecast = _forecast(run, model, plan, options)
    engine = Engine(model, plan, run.prompts, run.requests, rules, options, run.lengths)
    run.engine = engine.stats
    run.kv_token_bytes = bytes_per_token(model.layers, model.dtype)
    run.kv_budget_bytes = kv_tokens * run.kv_token_bytes
    done = int(run.store.done.sum())
    with run.watch.time("run"), run.progress.stage("running", len(run.requests), done) as stage:
        for finished in engine.run():
            answers = answers_of(finished, plan, run.prompts, run.requests)
            done += len(answers)
            with run.watch.time("write"):
                run.store.add(answers)
            _show(stage, done, engine, options.kv_tokens, plan.stats)


def _forecast(run: _Run, model: ModelRunner, plan: Plan, options: EngineOptions) -> Forecast | None:
    """None when it fails: a run is not given up because it could not be foreseen."""
    with run.watch.time("plan"):
        try:
            return forecast_run(
                model, fingerprint(run.job.model.path), plan, run.prompts, run.lengths, options
            )
        except Exception as error:
            run.progress.note(f"no prediction of time and memory: {error or type(error).__name__}")
            return None


def _show(stage: Stage, done: int, engine: Engine, kv_tokens: int, plan: PlanStats) -> None:
    stage.update(
        rows_done=done,
        prompt_tokens_done=engine.stats.prompt_tokens_computed,
        output_tokens=engine.stats.output_tokens,
        kv_used_fraction=engine.stats.kv_tokens_used / kv_tokens,
        saved_fraction=1.0 - plan.planned_tokens / max(1, plan.prompt_tokens),
    )


def _load_model(job: JobSpec, watch: Stopwatch) -> _Loaded:
    """The model, checked, and the tokens that its KV memory holds."""
    from batchllm.executor.budget import kv_token_budget
    from batchllm.executor.model import load_model
    from batchllm.executor.parity import check_parity

    with watch.time("load"):
        model = load_model(job.model.path, job.model.dtype, job.model.trust_remote_code)
        check_parity(model)
    return _Loaded(model, kv_token_budget(model, job.engine.kv_memory))


def _configuration(job: JobSpec) -> bytes:
    """Everything outside the rows that decides the text of an answer."""
    return json.dumps({"model": fingerprint(job.model.path), "dtype": job.model.dtype}).encode()


def _text_size(config: Any, name: str) -> int | None:
    return getattr(config.get_text_config(), name, None)


def _summary(run: _Run, interrupted: bool) -> RunSummary:
    store, engine, plan, path = run.store, run.engine, run.plan, run.job.output.path
    metrics = RunMetrics(
        rows_ok=int(store.done.sum()) - store.num_errors,
        rows_error=store.num_errors,
        rows_resumed=store.num_resumed,
        prompt_tokens=plan.prompt_tokens,
        prompt_tokens_computed=engine.prompt_tokens_computed if engine else 0,
        distinct_prompt_tokens=plan.distinct_tokens,
        output_tokens=engine.output_tokens if engine else 0,
        steps=engine.steps if engine else 0,
        wall_seconds=run.watch.wall_seconds,
        seconds=run.watch.seconds(),
        kv_budget_bytes=run.kv_budget_bytes,
        kv_peak_bytes=(engine.kv_tokens_peak if engine else 0) * run.kv_token_bytes,
        rss_peak_bytes=rss_peak_bytes(),
        preemptions=engine.preemptions if engine else 0,
        prompt_tokens_saved_by_reordering=run.reordering_saves,
        mean_output_tokens=engine.output_tokens / max(1, plan.sequences) if engine else 0.0,
        predicted=run.forecast.figures() if run.forecast and not interrupted else {},
    )
    write_metrics(path / "_run" / "metrics.json", metrics)
    code = 130 if interrupted else 3 if store.num_errors else 0
    return RunSummary(path, code, metrics, summary_text(metrics, path))
