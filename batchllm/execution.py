"""Every answer that a job still owes: plan, predict, execute, write. A sample of the rows first, if the job says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from batchllm.answers import answers_of, error_of, faults_of
from batchllm.candidates import Candidates
from batchllm.core import (
    ChunkTable,
    Plan,
    PlanStats,
    PromptTable,
    RequestResult,
    RequestTable,
    SequenceResult,
)
from batchllm.dataset.answer_cache import AnswerCache
from batchllm.dataset.results import ResultStore
from batchllm.executor.model_folder import fingerprint
from batchllm.forecast import Forecast, forecast_run, plan_for_model, plan_options
from batchllm.history import PastLengths, own_lengths, teach
from batchllm.job import JobSpec
from batchllm.job_model import LoadedModel, load_checked_model
from batchllm.planner.auto_values import step_tokens
from batchllm.planner.first_rows import sampled_requests
from batchllm.planner.length_errors import LengthErrors
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.plan import PlanDraft, draft_plan
from batchllm.planner.plan_file import write_plan
from batchllm.planner.simulate import SimulationOptions
from batchllm.report.planned_tokens import PlannedTokens
from batchllm.report.progress import Progress, Stage
from batchllm.report.stopwatch import Stopwatch

if TYPE_CHECKING:
    from batchllm.chunk_reuse import ChunkReuse
    from batchllm.executor.device import Placement
    from batchllm.executor.engine import Engine, EngineOptions, EngineStats
    from batchllm.reuse_quality import ReuseSample, SampleRunner


@dataclass
class Execution:
    """What the stages of one run share, and what its metrics are made from."""

    job: JobSpec
    tokenizer: Any
    progress: Progress
    watch: Stopwatch
    prompts: PromptTable
    requests: RequestTable
    store: ResultStore
    placement: Placement
    model: LoadedModel | None  # None: not loaded yet
    past: PastLengths | None  # answers of an earlier run
    candidates: Candidates  # what is computed for the requests
    cache: AnswerCache | None = None  # of answers across jobs
    chunks: ChunkTable | None = None
    reuse: ChunkReuse | None = None  # of stored chunks; opened with the model
    sample: ReuseSample | None = None  # answered both ways, where reuse may change answers
    distinct_tokens: int = 0  # of the prompts that had no answer yet
    plans: list[PlanStats] = field(default_factory=list)  # one after another, as for the following
    forecasts: list[Forecast | None] = field(default_factory=list)
    engines: list[EngineStats] = field(default_factory=list)
    planned_lengths: LengthErrors = field(default_factory=LengthErrors)  # as expected when they were planned
    refreshed_lengths: LengthErrors = field(default_factory=LengthErrors)  # as expected just before each came
    kv_token_bytes: int = 0
    kv_budget_bytes: int = 0

    def add(self, results: Sequence[RequestResult]) -> None:
        """Answers to candidates: those that settle what is owed are written."""
        settled = self.candidates.settle(results, self.store.done)
        if self.cache is not None:
            self.cache.add(settled)
        self.store.add(settled)


def answer_all(run: Execution) -> None:
    """Adds an answer for every request that has none yet."""
    job, store, candidates = run.job, run.store, run.candidates
    prompts, requests = candidates.prompts, candidates.requests
    run.add(faults_of(candidates.pending(store.done), prompts, requests))
    if run.cache is not None:
        store.add(run.cache.found(~store.done))
    if store.done.all():
        return
    from batchllm.executor.budget import too_long
    from batchllm.executor.native import missing_kernels_note

    run.model = run.model or load_checked_model(job, run.watch, run.placement)
    note = missing_kernels_note(run.model.model)
    if note:
        run.progress.note(note)
    _open_chunks(run)
    max_length = run.model.model.max_length
    hopeless, reason = too_long(prompts, requests, candidates.pending(store.done), run.model.kv_tokens)
    run.add([error_of(int(request), reason, prompts, requests) for request in np.flatnonzero(hopeless)])
    with run.watch.time("plan"):
        draft = draft_plan(prompts, requests, candidates.pending(store.done), plan_options(job, max_length))
        run.distinct_tokens = draft.tree.distinct_tokens
        groups = draft.row_group
        first = _first(draft, job.plan.sample_rows)
    _begin_sample(run)
    if first is None:
        _carry_out(run, draft, _known_lengths(run, groups), "plan.parquet")
    else:
        for requested, file in ((first, "plan-sample.parquet"), (~first, "plan.parquet")):
            with run.watch.time("plan"):
                todo = requested & candidates.pending(store.done)
                draft = draft_plan(prompts, requests, todo, plan_options(job, max_length, groups))
            _carry_out(run, draft, _known_lengths(run, groups), file)
    _finish_sample(run)


def _open_chunks(run: Execution) -> None:
    """The store of `chunks.store`, if the job reuses any."""
    if run.chunks is None or run.reuse is not None:
        return
    from batchllm.chunk_reuse import ChunkReuse, chunk_notes

    assert run.model is not None
    prompts = run.candidates.prompts
    with run.watch.time("load"):
        run.reuse = ChunkReuse.open(run.job, run.model.model, prompts, run.chunks)
    if run.reuse is not None:
        for note in (*run.reuse.notes(), *chunk_notes(run.chunks, prompts)):
            run.progress.note(note)


def _begin_sample(run: Execution) -> None:
    """Chooses the answers that measure lossy reuse, and finds the budget that keeps `chunks.target_quality`."""
    if run.reuse is None or not run.reuse.spec.lossy:
        return
    from batchllm.reuse_quality import ReuseSample, choose_sample, reach_target

    run.sample = ReuseSample(choose_sample(run.reuse.spec, run.candidates.pending(run.store.done)))
    if run.reuse.spec.target_quality is not None:
        with run.watch.time("quality"):
            target = run.reuse.spec.target_quality
            run.progress.note(reach_target(_sample_runner(run), run.sample, run.reuse, target))
        run.reuse.figures.clear()  # of the run alone


def _finish_sample(run: Execution) -> None:
    if run.sample is not None and not run.sample.full:
        with run.watch.time("quality"):
            run.sample.full = _sample_runner(run).answer(run.sample.chosen, None)
    for problem in run.reuse.store.problems if run.reuse is not None else ():
        run.progress.note(problem)


def _sample_runner(run: Execution) -> SampleRunner:
    from batchllm.reuse_quality import SampleRunner

    assert run.model is not None
    owed = run.candidates
    return SampleRunner(run.job, *run.model, run.tokenizer, owed.prompts, owed.requests)


def _known_lengths(run: Execution, groups: NDArray[np.int32]) -> LengthEstimator:
    """What earlier answers say about the next ones: of `plan.history`, and this job's own, a sample's included."""
    params = run.prompts.params
    estimator = LengthEstimator(run.refreshed_lengths, params)
    with run.watch.time("plan"):
        run.store.flush()
        own = own_lengths(run.store.path, run.store.parts, run.requests.row)
        teach(estimator, run.past, params, groups)
        teach(estimator, own, params, groups, run.prompts.params_of)
    return estimator


def _first(draft: PlanDraft, sample_rows: int | None) -> NDArray[np.bool_] | None:
    """The requests to run before the others; None when all may run together."""
    if sample_rows is None or not len(draft.sequences):
        return None
    sampled = sampled_requests(draft, sample_rows)
    missing = sampled[draft.sequences.request]
    return sampled if missing.any() and not missing.all() else None


def _carry_out(run: Execution, draft: PlanDraft, lengths: LengthEstimator, file: str) -> None:
    """Puts the draft in order and runs it. `file` is what its plan is kept as."""
    assert run.model is not None
    job, (model, kv_tokens) = run.job, run.model
    with run.watch.time("plan"), run.progress.stage("planning", len(draft.sequences.request)) as stage:
        on_gpu = run.placement.gpu is not None
        step = step_tokens(job.engine.max_step_tokens, gpu=on_gpu)
        memory = SimulationOptions(kv_tokens, step, max_length=model.max_length)
        model_fingerprint = fingerprint(job.model.path, job.model.quantize)
        draft = draft.expecting(lengths.mean_total)
        plan, reason = plan_for_model(model, model_fingerprint, draft, job.engine.order, memory)
        stage.advance(plan.stats.requests, plan.stats.prompt_tokens)
    run.plans.append(plan.stats)
    run.progress.note(f"order: {reason}")
    if plan.num_sequences:
        write_plan(plan, job.output.path / "_run" / file)
        _execute(run, plan, draft.expected_decode(plan), lengths)


def _execute(run: Execution, plan: Plan, expected: NDArray[np.int64], lengths: LengthEstimator) -> None:
    """Runs the plan and writes answers as they come. `expected` is the length of each sequence's output."""
    assert run.model is not None
    prompts, requests = run.candidates.prompts, run.candidates.requests
    model, kv_tokens = run.model
    from batchllm.executor.budget import engine_options
    from batchllm.executor.engines import engine_for
    from batchllm.executor.stopping import StopRules, end_of_sequence_ids
    from batchllm.reuse_quality import stored_chunks_for

    rules = StopRules(end_of_sequence_ids(model.model.generation_config, run.tokenizer), run.tokenizer)
    on_gpu = run.placement.gpu is not None
    options = engine_options(plan, prompts, kv_tokens, run.job.engine.max_step_tokens, gpu=on_gpu)
    run.forecasts.append(_forecast(run, plan, lengths, options))
    with stored_chunks_for(run.reuse, plan) as stored:
        engine = engine_for(model, plan, prompts, requests, rules, options, lengths, stored=stored)
        _run_engine(run, engine, plan, expected)


def _run_engine(run: Execution, engine: Engine, plan: Plan, expected: NDArray[np.int64]) -> None:
    assert run.model is not None
    model, kv_tokens = run.model
    prompts, requests = run.candidates.prompts, run.candidates.requests
    run.engines.append(engine.stats)
    run.kv_token_bytes = model.backend.bytes_per_token(model.layers, model.dtype)
    run.kv_budget_bytes = kv_tokens * run.kv_token_bytes
    pending = int(run.candidates.pending(run.store.done).sum())
    done = len(requests) - pending
    planned = PlannedTokens(plan.stats.planned_tokens, expected)
    # A sample is not all that is left, and tokens taken from stored chunks are not computed.
    is_foreseen = plan.stats.requests == pending and run.reuse is None
    with run.watch.time("run"), run.progress.stage("running", len(requests), done) as stage:
        for finished in engine.run():
            answers = answers_of(finished, plan, prompts, requests)
            done += len(answers)
            _compare_lengths(run.planned_lengths, expected, finished)
            with run.watch.time("write"):
                run.add(answers)
            if run.sample is not None:
                run.sample.see(answers)
            planned.end(finished)
            _show(stage, done, engine, plan.stats, planned.total if is_foreseen else None)


def _compare_lengths(
    errors: LengthErrors, expected: NDArray[np.int64], finished: Sequence[SequenceResult]
) -> None:
    ended = [result for result in finished if result.finish_reason != "error"]
    if ended:
        came = np.array([len(result.tokens) for result in ended], dtype=np.int64)
        errors.add(expected[[result.sequence for result in ended]], came)


def _forecast(
    run: Execution, plan: Plan, lengths: LengthEstimator, options: EngineOptions
) -> Forecast | None:
    """None when it fails: a run is not given up because it could not be foreseen. Reuse of chunks is not foreseen."""
    assert run.model is not None
    if run.reuse is not None:
        return None
    with run.watch.time("plan"):
        try:
            model_fingerprint = fingerprint(run.job.model.path, run.job.model.quantize)
            return forecast_run(
                run.model.model, model_fingerprint, plan, run.candidates.prompts, lengths, options
            )
        except Exception as error:
            run.progress.note(f"no prediction of time and memory: {error or type(error).__name__}")
            return None


def _show(stage: Stage, done: int, engine: Engine, plan: PlanStats, total_tokens: int | None) -> None:
    stage.update(
        rows_done=done,
        prompt_tokens_done=engine.stats.prompt_tokens_computed,
        output_tokens=engine.stats.output_tokens,
        kv_used_fraction=engine.stats.kv_tokens_used / engine.pool.capacity,
        saved_fraction=1.0 - plan.planned_tokens / max(1, plan.prompt_tokens),
        total_tokens=total_tokens,
    )
