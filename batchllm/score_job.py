"""A job with a `score` section from end to end: read → plan → score → write. What `pipeline` is for generation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from batchllm.answers import faults_of
from batchllm.core import RequestResult, RequestTable
from batchllm.dataset.columns import Logprobs
from batchllm.dataset.keys import make_requests
from batchllm.dataset.reader import open_input
from batchllm.dataset.results import ResultStore, claim_output
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import JobError
from batchllm.executor.gate import LengthLimit, beyond
from batchllm.executor.model_folder import fingerprint
from batchllm.executor.native import missing_kernels_note, why_no_kernels
from batchllm.job import JobSpec
from batchllm.job_model import load_before_opening, load_checked_model
from batchllm.report.metrics import RunMetrics, write_metrics
from batchllm.report.progress import Progress
from batchllm.report.stopwatch import Stopwatch, rss_peak_bytes
from batchllm.score_rows import ScoreRows, check_score_job, load_score_rows, score_input
from batchllm.scoring import Score, TokenSpan, joined_tables, mixed_table, prefix_token

if TYPE_CHECKING:
    from batchllm.executor.model import ModelRunner
    from batchllm.table_run import TableRun

_CHUNK_TOKENS = 1 << 20
_LENGTH_UNKNOWN = 2048  # of a model that does not state how much it reads, as in lm-evaluation-harness


def run_score_job(
    job: JobSpec, config: Any, limit: LengthLimit | None, placement: Any, *, overwrite: bool, quiet: bool
) -> tuple[RunMetrics, bool]:
    """(figures, whether Ctrl-C ended it early). Raises UserError, with nothing written, when it cannot start."""
    assert job.score is not None
    check_score_job(job)
    progress, watch = Progress(quiet=quiet), Stopwatch()
    tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
    prefix = _prefix_token(tokenizer, job)
    data = score_input(job, open_input(job.input, job.source, job.output.folders))
    text_config = config.get_text_config()
    max_length = getattr(text_config, "max_position_embeddings", None) or _LENGTH_UNKNOWN
    if limit is not None and limit.tokens < max_length:
        max_length = limit.tokens
        progress.note(f"{beyond(limit, config.model_type)}: it reads no more at once")
    identity = json.dumps({"input": job.input.path, "format": job.input.format, "score": True})
    with claim_output(job.output.path, identity, overwrite) as claim:
        with watch.time("tokenize"), progress.stage("tokenizing", data.num_rows):
            rows = load_score_rows(job, data, tokenizer, claim.work_dir, max_length, text_config.vocab_size)
        configuration = _configuration(job, prefix, max_length)
        requests = make_requests(rows.prompts, rows.ids, configuration)
        loaded = load_before_opening(job, rows.prompts, requests, claim, watch, placement)
        with ResultStore.open(
            job.output.path,
            identity,
            requests,
            rows.kept,
            configuration=configuration,
            logprobs=Logprobs(job.score.token_logprobs),
            scores=True,
            faults=rows.prompts.faults,
            part_rows=job.output.part_rows,
            flush_seconds=job.output.flush_seconds,
            resolved_job=job.resolved(),
            claim=claim,
        ) as store:
            store.add(faults_of(~store.done, rows.prompts, requests))
            run, model, interrupted = None, None, False
            try:
                if not store.done.all():
                    model = (loaded or load_checked_model(job, watch, placement)).model
                    note = missing_kernels_note(model)
                    if note:
                        progress.note(note)
                    spans = _Spans(rows, requests, ~store.done, prefix, max_length, model.vocab_size)
                    run = _table_run(model, tokenizer, spans, job)
                    done = int(store.done.sum())
                    with watch.time("run"), progress.stage("scoring", len(requests), done) as stage:
                        for answers in spans.answers(run, job.score.token_logprobs, tokenizer):
                            store.add(answers)  # also none: those before may be old enough to be written
                            done += len(answers)
                            planned = run.plan_stats.planned_tokens if run.plan_stats else None
                            stage.update(done, run.computed_tokens, total_tokens=planned)
                with watch.time("write"):
                    store.finish()
            except KeyboardInterrupt:
                store.flush()
                interrupted = True
            metrics = _metrics(store, watch, run, model)
            write_metrics(job.output.path / "_run" / "metrics.json", metrics)
            return metrics, interrupted


class _Spans:
    """Everything to be scored as one table: a row of it for each pair, and for each window of a document.

    Tokens are Python numbers for one chunk of rows at a time, and again for a row whose scores are put together.
    """

    def __init__(
        self,
        rows: ScoreRows,
        requests: RequestTable,
        pending: np.ndarray,
        prefix: int,
        max_length: int,
        vocabulary: int,
    ):
        self._rows, self._row_of, self._prefix, self._max_length = rows, requests.row, prefix, max_length
        self.requests = np.flatnonzero(pending)
        tables, counts = [], []
        tokens = np.diff(rows.prompts.offsets)[self._row_of[self.requests]]
        cuts = 1 + np.flatnonzero(np.diff(np.cumsum(tokens) // _CHUNK_TOKENS))
        for requests_of_chunk in np.split(self.requests, cuts):
            chunk = [self._spans_of(request) for request in requests_of_chunk.tolist()]
            tables.append(mixed_table([span for spans in chunk for span in spans], max_length, vocabulary))
            counts += [len(spans) for spans in chunk]
        self.table, self.scored = joined_tables(tables)
        self._owner = np.repeat(np.arange(len(self.requests)), counts)
        self._first = np.cumsum([0, *counts])

    def answers(self, run: TableRun, token_logprobs: bool, tokenizer: Any) -> Iterator[list[RequestResult]]:
        """After every step of the run the answers to requests of which it scored the last span."""
        missing = np.diff(self._first)
        errors: dict[int, str] = {}
        shared = np.zeros(len(self.requests), dtype=np.int64)
        for results in run.steps():
            complete = []
            for result in results:
                owner = int(self._owner[result.request])
                missing[owner] -= 1
                shared[owner] += result.shared_tokens
                if result.error is not None:
                    errors[owner] = result.error
                if not missing[owner]:
                    complete.append(owner)
            yield [
                self._answer(owner, run, errors.get(owner), int(shared[owner]), token_logprobs, tokenizer)
                for owner in complete
            ]

    def _answer(
        self, owner: int, run: TableRun, error: str | None, shared: int, token_logprobs: bool, tokenizer: Any
    ) -> RequestResult:
        request, begin = int(self.requests[owner]), int(self._first[owner])
        spans = self._spans_of(request)
        read = sum(span.first for span in spans)
        if error is not None:
            return RequestResult(request, None, (), "error", error, read, 0)
        score = Score.joined(
            [
                Score(tuple(span.tokens[span.first :]), *run.score(begin + number))
                for number, span in enumerate(spans)
            ]
        )
        return RequestResult(
            request,
            tokenizer.decode(list(score.token_ids), skip_special_tokens=False),
            score.token_ids,
            "scored",
            None,
            read,
            min(shared, read),
            tuple(score.token_logprobs.tolist()) if token_logprobs else None,
            score.logprob,
            score.is_greedy,
        )

    def _spans_of(self, request: int) -> list[TokenSpan]:
        return self._rows.spans(int(self._row_of[request]), self._prefix, self._max_length)


def _table_run(model: ModelRunner, tokenizer: Any, spans: _Spans, job: JobSpec) -> TableRun:
    from batchllm.planner.plan import PlanOptions
    from batchllm.table_run import RunOptions, TableRun

    requests = make_requests(spans.table, None, b"")
    shared = job.engine.min_shared_tokens
    plan = PlanOptions() if isinstance(shared, str) else PlanOptions(min_shared_tokens=shared)
    options = RunOptions(job.engine.kv_memory, job.engine.max_step_tokens, plan)
    return TableRun(model, tokenizer, spans.table, requests, options, spans.scored)


def _prefix_token(tokenizer: Any, job: JobSpec) -> int:
    """What stands before a document; of no meaning where none is scored."""
    assert job.score is not None
    try:
        return prefix_token(tokenizer)
    except ValueError as error:
        if job.score.rolling:
            raise JobError(
                f"{job.source}: score.rolling: {error}, and a document is scored after one"
            ) from None
        return -1


def _configuration(job: JobSpec, prefix: int, max_length: int) -> bytes:
    """Everything outside the rows that decides a score."""
    assert job.score is not None
    windows = [prefix, max_length] if job.score.rolling else None
    weights = fingerprint(job.model.path, job.model.quantize)
    about = {"model": weights, "dtype": job.model.dtype, "score": windows, "tokens": job.score.token_logprobs}
    return json.dumps(about).encode()


def _metrics(
    store: ResultStore, watch: Stopwatch, run: TableRun | None, model: ModelRunner | None
) -> RunMetrics:
    stats, plan = (None, None) if run is None else (run.stats, run.plan_stats)
    return RunMetrics(
        rows_ok=int(store.done.sum()) - store.num_errors,
        rows_error=store.num_errors,
        errors=store.errors.commonest(),
        rows_resumed=store.num_resumed,
        prompt_tokens=plan.prompt_tokens if plan else 0,
        prompt_tokens_computed=stats.prompt_tokens_computed if stats else 0,
        distinct_prompt_tokens=plan.distinct_tokens if plan else 0,
        output_tokens=0,
        steps=stats.steps if stats else 0,
        wall_seconds=watch.wall_seconds,
        seconds=watch.seconds(),
        kv_budget_bytes=run.kv_budget_bytes if run else 0,
        kv_peak_bytes=run.kv_peak_bytes if run else 0,
        rss_peak_bytes=rss_peak_bytes(),
        preemptions=stats.preemptions if stats else 0,
        without_kernels=None if model is None else why_no_kernels(model),
    )
