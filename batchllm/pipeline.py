"""One job from end to end: read → plan → execute → write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm import exit_codes
from batchllm.candidates import Candidates
from batchllm.chunkcache.store_opening import check_store
from batchllm.collection import resume_collection
from batchllm.core import PromptTable, RequestTable
from batchllm.dataset.answer_cache import AnswerCache, check_cache
from batchllm.dataset.columns import Logprobs
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import load_rows, validate_columns
from batchllm.dataset.reader import open_input
from batchllm.dataset.results import ResultStore, claim_output
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.execution import Execution, answer_all
from batchllm.executor.generation_config import generation_notes, load_generation_config
from batchllm.executor.model_folder import fingerprint
from batchllm.forecast import combined_figures
from batchllm.history import past_lengths
from batchllm.job import JobSpec
from batchllm.job_model import check_model, load_before_opening
from batchllm.limits import ModelLimits, usable
from batchllm.report.metrics import RunMetrics, write_metrics
from batchllm.report.progress import Progress
from batchllm.report.stopwatch import Stopwatch, rss_peak_bytes
from batchllm.report.summary import summary_text

if TYPE_CHECKING:
    import polars as pl


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


def run_job(job: JobSpec, *, overwrite: bool = False, quiet: bool = False) -> RunSummary:
    """Answers every row of the job's input. Raises UserError, with nothing written, when the job cannot start.

    Ctrl-C keeps every answer found so far; the same call then goes on from there.
    """
    progress, watch = Progress(quiet=quiet), Stopwatch()
    config, limit, placement = check_model(job)
    resume_collection()  # everything large has been imported
    if placement.note:
        progress.note(placement.note)
    if job.score is not None:
        from batchllm.score_job import run_score_job

        figures = run_score_job(job, config, limit, placement, overwrite=overwrite, quiet=quiet)
        return _summary_of(job.output.path, *figures)
    generation = load_generation_config(job.model.path, config)
    for note in generation_notes(generation, job.generate.model_fields_set):
        progress.note(note)
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    data = open_input(job.input, job.source, job.output.folders)
    validate_columns(job, data.schema)
    identity = json.dumps({"input": job.input.path, "format": job.input.format})
    if job.chunks is not None and job.chunks.reuse != "off":
        from batchllm.chunk_reuse import refuse_gpu

        check_store(job.chunks.store)
        refuse_gpu(job, placement)
    if job.output.cache is not None:
        check_cache(job.output.cache, job.source)
    with claim_output(job.output.path, identity, overwrite) as claim:
        with watch.time("tokenize"), progress.stage("tokenizing", data.num_rows) as stage:
            rows = load_rows(job, data, tokenizer, claim.work_dir, stage)
        limits = ModelLimits.of(config, limit, generation, tokenizer)
        prompts = usable(rows.prompts, limits, tokenizer)
        past = past_lengths(job.plan.history, job.source, job.input.id, rows.ids)
        configuration = _configuration(job)
        requests = make_requests(prompts, rows.ids, configuration)
        model = load_before_opening(job, prompts, requests, claim, watch, placement)
        candidates = Candidates(prompts, requests, rows.ids, configuration)
        with ResultStore.open(
            job.output.path,
            identity,
            requests,
            rows.kept,
            configuration=configuration,
            logprobs=Logprobs.asked_for(prompts.params),
            faults=prompts.faults,
            part_rows=job.output.part_rows,
            flush_seconds=job.output.flush_seconds,
            resolved_job=job.resolved(),
            claim=claim,
        ) as store:
            run = Execution(
                job,
                tokenizer,
                progress,
                watch,
                prompts,
                requests,
                store,
                placement,
                model,
                past,
                candidates,
                chunks=rows.chunks,
            )
            run.cache = _answer_cache(job, prompts, requests, configuration, progress)
            interrupted = _answer_and_finish(run)
            return _summary(run, rows.reordering_saves, interrupted)


def _answer_and_finish(run: Execution) -> bool:
    """Returns whether Ctrl-C ended it early."""
    for note in run.store.notes:
        run.progress.note(note)
    try:
        try:
            answer_all(run)
        finally:
            if run.cache is not None:
                run.cache.flush()
        with run.watch.time("write"):
            run.store.finish()
    except KeyboardInterrupt:
        run.store.flush()
        return True
    return False


def _answer_cache(
    job: JobSpec, prompts: PromptTable, requests: RequestTable, configuration: bytes, progress: Progress
) -> AnswerCache | None:
    """What `output.cache` names. Answers of lossy reuse follow from what a store held at the time, which no key of the
    cache knows: they neither go there nor come from there."""
    if job.output.cache is None:
        return None
    if job.chunks is not None and job.chunks.lossy:
        progress.note(
            f"output.cache is not used: answers with chunks.reuse: {job.chunks.reuse} depend on what the store holds"
        )
        return None
    return AnswerCache(job.output.cache, prompts, requests, configuration, progress.note)


def _configuration(job: JobSpec) -> bytes:
    """Everything outside the rows that decides the text of an answer."""
    weights = fingerprint(job.model.path, job.model.quantize)
    decisive: dict[str, Any] = {"model": weights, "dtype": job.model.dtype}
    if job.chunks is not None and job.chunks.lossy:
        kept = ("reuse", "rule", "recompute", "target_quality")
        decisive["chunks"] = {name: getattr(job.chunks, name) for name in kept} | {
            "store": str(job.chunks.store)
        }
    return json.dumps(decisive).encode()


def _chunk_figures(run: Execution) -> dict[str, Any]:
    """What was reused, and what it did to answers."""
    if run.reuse is None:
        return {}
    figures: dict[str, Any] = {"reuse": run.reuse.spec.reuse, **run.reuse.figures}
    if run.reuse.spec.lossy:
        figures |= {"rule": run.reuse.spec.rule, "recompute": run.reuse.share}
    if run.sample is not None and run.sample.full:
        figures["quality"] = run.sample.quality().figures()
        figures["tried"] = {f"{share:g}": quality.figures() for share, quality in run.sample.tried}
    return figures


def _without_kernels(run: Execution) -> str | None:
    if run.model is None:
        return None
    from batchllm.executor.native import why_no_kernels

    return why_no_kernels(run.model.model)


def _summary(run: Execution, reordering_saves: int, interrupted: bool) -> RunSummary:
    store, engines, path = run.store, run.engines, run.job.output.path
    sequences = sum(plan.sequences for plan in run.plans)
    output_tokens = sum(stats.output_tokens for stats in engines)
    metrics = RunMetrics(
        rows_ok=int(store.done.sum()) - store.num_errors,
        rows_error=store.num_errors,
        errors=store.errors.commonest(),
        rows_resumed=store.num_resumed,
        prompt_tokens=sum(plan.prompt_tokens for plan in run.plans),
        prompt_tokens_computed=sum(stats.prompt_tokens_computed for stats in engines),
        distinct_prompt_tokens=run.distinct_tokens,
        output_tokens=output_tokens,
        steps=sum(stats.steps for stats in engines),
        wall_seconds=run.watch.wall_seconds,
        seconds=run.watch.seconds(),
        kv_budget_bytes=run.kv_budget_bytes,
        kv_peak_bytes=max((stats.kv_tokens_peak for stats in engines), default=0) * run.kv_token_bytes,
        rss_peak_bytes=rss_peak_bytes(),
        preemptions=sum(stats.preemptions for stats in engines),
        prompt_tokens_saved_by_reordering=reordering_saves,
        mean_output_tokens=output_tokens / max(1, sequences),
        predicted={} if interrupted else combined_figures(run.forecasts),
        length_errors={
            "planned": run.planned_lengths.figures(),
            "refreshed": run.refreshed_lengths.figures(),
        },
        chunks=_chunk_figures(run),
        without_kernels=_without_kernels(run),
    )
    write_metrics(path / "_run" / "metrics.json", metrics)
    return _summary_of(path, metrics, interrupted)


def _summary_of(path: Path, metrics: RunMetrics, interrupted: bool) -> RunSummary:
    finished = exit_codes.SOME_FAILED if metrics.rows_error else exit_codes.OK
    code = exit_codes.INTERRUPTED if interrupted else finished
    return RunSummary(path, code, metrics, summary_text(metrics, path))
