"""One job from end to end: read → plan → execute → write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchllm.answers import answers_of, error_of, faults_of
from batchllm.core import Plan, PlanStats, PromptTable, RequestTable
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import LoadedRows, load_rows, validate_columns
from batchllm.dataset.reader import open_input
from batchllm.dataset.results import ResultStore, check_output
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import JobError
from batchllm.executor.model_folder import check_model_folder, fingerprint
from batchllm.job import JobSpec
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.report.metrics import RunMetrics, write_metrics
from batchllm.report.progress import Progress
from batchllm.report.stopwatch import Stopwatch, rss_peak_bytes
from batchllm.report.summary import summary_text

if TYPE_CHECKING:
    import polars as pl

    from batchllm.executor.engine import EngineStats
    from batchllm.executor.gate import LengthLimit
    from batchllm.executor.model import ModelRunner

_AUTO_SHARED_TOKENS = 32
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


@dataclass
class _Totals:
    """What the metrics are made from, filled in as the stages go by."""

    plan: PlanStats = _NOTHING
    engine: EngineStats | None = None
    kv_token_bytes: int = 0
    kv_budget_bytes: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)


def run_job(job: JobSpec, *, overwrite: bool = False, quiet: bool = False) -> RunSummary:
    """Answers every row of the job's input. Raises UserError, with nothing written, when the job cannot start.

    Ctrl-C keeps every answer found so far; the same call then goes on from there.
    """
    totals, progress = _Totals(), Progress(quiet=quiet)
    config, limit = _check_model(job)
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    data = open_input(job.input)
    validate_columns(job, data.schema)
    identity = json.dumps({"input": job.input.path, "format": job.input.format})
    check_output(job.output.path, identity, overwrite)

    with ExitStack() as cleanup:
        work_dir = cleanup.enter_context(_work_dir(job.output.path))
        with totals.watch.time("tokenize"), progress.stage("tokenizing", data.num_rows) as stage:
            rows = load_rows(job, data, tokenizer, work_dir, stage)
        prompts = _refuse_long_prompts(rows.prompts, config)
        _check_lengths(prompts, limit, config)
        configuration = _configuration(job)
        ids = rows.kept.column(job.input.id) if job.input.id else None
        requests = make_requests(prompts, ids, configuration)
        store = ResultStore.open(
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
        )
        cleanup.enter_context(store)
        for note in store.notes:
            progress.note(note)
        interrupted = False
        try:
            _answer_all(job, prompts, requests, store, tokenizer, progress, totals)
            with totals.watch.time("write"):
                store.finish()
        except KeyboardInterrupt:
            interrupted = True
            store.flush()
        return _summary(job, store, rows, totals, interrupted)


def _check_model(job: JobSpec) -> tuple[Any, LengthLimit | None]:
    from batchllm.executor.model import load_config

    if job.engine.device == "cuda":
        raise JobError(f"{job.source}: engine.device: this version runs on the CPU only; set it to cpu or auto.")
    check_model_folder(job.model.path, job.model.trust_remote_code)
    return load_config(job.model.path, job.model.trust_remote_code)


def _answer_all(
    job: JobSpec,
    prompts: PromptTable,
    requests: RequestTable,
    store: ResultStore,
    tokenizer: Any,
    progress: Progress,
    totals: _Totals,
) -> None:
    """Adds an answer for every request that has none yet."""
    store.add(faults_of(~store.done, prompts, requests))
    if store.done.all():
        return
    from batchllm.executor.budget import kv_token_budget, too_long

    with totals.watch.time("load"):
        model = _load_model(job)
    kv_tokens = kv_token_budget(model, job.engine.kv_memory)
    hopeless, reason = too_long(prompts, requests, ~store.done, kv_tokens)
    store.add([error_of(int(request), reason, prompts, requests) for request in np.flatnonzero(hopeless)])
    with totals.watch.time("plan"), progress.stage("planning", int((~store.done).sum())) as stage:
        plan = build_plan(prompts, requests, ~store.done, _plan_options(job))
        stage.advance(plan.stats.requests, plan.stats.prompt_tokens)
    totals.plan = plan.stats
    if plan.num_sequences:
        _execute(job, model, plan, prompts, requests, store, tokenizer, kv_tokens, progress, totals)


def _execute(
    job: JobSpec,
    model: ModelRunner,
    plan: Plan,
    prompts: PromptTable,
    requests: RequestTable,
    store: ResultStore,
    tokenizer: Any,
    kv_tokens: int,
    progress: Progress,
    totals: _Totals,
) -> None:
    """Runs the plan and writes answers as they come."""
    from batchllm.executor.budget import engine_options
    from batchllm.executor.engine import Engine
    from batchllm.executor.kv_pool import bytes_per_token
    from batchllm.executor.stopping import StopRules, end_of_sequence_ids

    rules = StopRules(end_of_sequence_ids(model.model.generation_config, tokenizer), tokenizer)
    options = engine_options(plan, prompts, kv_tokens, job.engine.max_step_tokens)
    engine = Engine(model, plan, prompts, requests, rules, options)
    totals.engine = engine.stats
    totals.kv_token_bytes = bytes_per_token(model.layers, model.dtype)
    totals.kv_budget_bytes = kv_tokens * totals.kv_token_bytes
    saved = 1.0 - plan.stats.planned_tokens / max(1, plan.stats.prompt_tokens)
    done = int(store.done.sum())
    with totals.watch.time("run"), progress.stage("running", len(requests), done) as stage:
        for finished in engine.run():
            answers = answers_of(finished, plan, prompts, requests)
            done += len(answers)
            with totals.watch.time("write"):
                store.add(answers)
            stage.update(
                rows_done=done,
                prompt_tokens_done=engine.stats.prompt_tokens_computed,
                output_tokens=engine.stats.output_tokens,
                kv_used_fraction=engine.stats.kv_tokens_used / options.kv_tokens,
                saved_fraction=saved,
            )


def _load_model(job: JobSpec) -> ModelRunner:
    from batchllm.executor.model import load_model
    from batchllm.executor.parity import check_parity

    model = load_model(job.model.path, job.model.dtype, job.model.trust_remote_code)
    check_parity(model)
    return model


def _plan_options(job: JobSpec) -> PlanOptions:
    shortest = job.engine.min_shared_tokens
    return PlanOptions(
        min_shared_tokens=shortest if isinstance(shortest, int) else _AUTO_SHARED_TOKENS, order=job.engine.order
    )


def _configuration(job: JobSpec) -> bytes:
    """Everything outside the rows that decides the text of an answer."""
    return json.dumps({"model": fingerprint(job.model.path), "dtype": job.model.dtype}).encode()


def _refuse_long_prompts(prompts: PromptTable, config: Any) -> PromptTable:
    """A prompt that leaves no room for one output token gets a fault."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not longest:
        return prompts
    lengths = np.diff(prompts.offsets)
    faults = {
        int(row): f"the prompt has {lengths[row]:,} tokens; the model reads at most {longest - 1:,}"
        for row in np.flatnonzero(lengths >= longest)
    }
    return replace(prompts, faults={**prompts.faults, **faults}) if faults else prompts


def _check_lengths(prompts: PromptTable, limit: LengthLimit | None, config: Any) -> None:
    """Refuses a job that is longer than what the architecture is exact for."""
    from batchllm.executor.gate import check_lengths

    if limit is None or not prompts.num_rows:
        return
    outputs = np.array([params.max_tokens for params in prompts.params])[prompts.params_of]
    totals = np.diff(prompts.offsets) + outputs
    totals[list(prompts.faults)] = 0
    check_lengths(limit, int(totals.max()), config.model_type)


@contextmanager
def _work_dir(output: Path) -> Iterator[Path]:
    """A folder for the token store beside the results, removed afterwards, with empty parents made for it."""
    made = [folder for folder in (output / "_run" / "work", output / "_run", output) if not folder.exists()]
    work = output / "_run" / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in made[1:]:
            if not any(folder.iterdir()):
                folder.rmdir()


def _summary(
    job: JobSpec, store: ResultStore, rows: LoadedRows, totals: _Totals, interrupted: bool
) -> RunSummary:
    engine, plan = totals.engine, totals.plan
    answered = int(store.done.sum())
    metrics = RunMetrics(
        rows_ok=answered - store.num_errors,
        rows_error=store.num_errors,
        rows_resumed=store.num_resumed,
        prompt_tokens=plan.prompt_tokens,
        prompt_tokens_computed=engine.prompt_tokens_computed if engine else 0,
        distinct_prompt_tokens=plan.distinct_tokens,
        output_tokens=engine.output_tokens if engine else 0,
        steps=engine.steps if engine else 0,
        wall_seconds=totals.watch.wall_seconds,
        seconds=totals.watch.seconds(),
        kv_budget_bytes=totals.kv_budget_bytes,
        kv_peak_bytes=(engine.kv_tokens_peak if engine else 0) * totals.kv_token_bytes,
        rss_peak_bytes=rss_peak_bytes(),
        preemptions=engine.preemptions if engine else 0,
        predicted={"prompt_tokens_computed": plan.planned_tokens},
    )
    write_metrics(job.output.path / "_run" / "metrics.json", metrics)
    code = 130 if interrupted else 3 if store.num_errors else 0
    return RunSummary(job.output.path, code, metrics, summary_text(metrics, job.output.path))
