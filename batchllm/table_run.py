"""One table of prompts that is in memory, planned and run once: answers, and scores of the rows that are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.answers import answers_of, error_of, faults_of
from batchllm.core import PlanStats, PromptTable, RequestResult, RequestTable, ScoreTable
from batchllm.executor.budget import engine_options, kv_token_budget, too_long
from batchllm.executor.engine import EngineStats
from batchllm.executor.engines import engine_for
from batchllm.executor.model import ModelRunner
from batchllm.executor.scores import ScoreStore
from batchllm.executor.stopping import StopRules, end_of_sequence_ids
from batchllm.executor.trace import StepTrace
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.score_reads import ScoreReads, plan_score_reads
from batchllm.report.progress import Stage


@dataclass(frozen=True)
class RunOptions:
    """Memory, step size and what is worth sharing, on which answers do not depend; and `plan.max_length`, which bounds
    them."""

    kv_memory: int | str = "auto"
    max_step_tokens: int | str = "auto"
    plan: PlanOptions = field(default_factory=PlanOptions)


class TableRun:
    """`results`, or `steps`, answers every request once; `score` is for rows that were answered without an error."""

    def __init__(
        self,
        model: ModelRunner,
        tokenizer: Any | None,
        prompts: PromptTable,
        requests: RequestTable,
        options: RunOptions,
        scored: ScoreTable | None = None,
        trace: StepTrace | None = None,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._prompts, self._requests, self._scored = prompts, requests, scored
        self._options, self._trace = options, trace
        self._reads: ScoreReads | None = None
        self._store = ScoreStore.empty(0)
        self.stats = EngineStats()
        self.plan_stats: PlanStats | None = None
        self.kv_budget_bytes = self.kv_peak_bytes = 0
        self._kv_capacity = 1  # tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that went through the model."""
        return self.stats.prompt_tokens_computed

    @property
    def prompt_tokens(self) -> int:
        """Of all requests, as if nothing were shared."""
        return self.plan_stats.prompt_tokens if self.plan_stats else 0

    def results(self) -> Iterator[RequestResult]:
        for answers in self.steps():
            yield from answers

    def steps(self) -> Iterator[list[RequestResult]]:
        """The results as they come: what there is beforehand, and then a list, which may be empty, for every step."""
        prompts, requests = self._prompts, self._requests
        pending = np.ones(len(requests), dtype=bool)
        yield faults_of(pending, prompts, requests)
        kv_tokens = kv_token_budget(self._model, self._options.kv_memory, self._options.max_step_tokens)
        hopeless, reason = too_long(prompts, requests, pending, kv_tokens)
        yield [error_of(int(request), reason, prompts, requests) for request in np.flatnonzero(hopeless)]
        max_length = self._options.plan.max_length or self._model.max_length
        options = replace(self._options.plan, max_length=max_length)
        plan = build_plan(prompts, requests, pending & ~hopeless, options)
        if not plan.num_sequences:
            return
        if self._scored is not None:
            self._reads = plan_score_reads(plan, prompts, requests, self._scored)
        on_gpu = self._model.placement.gpu is not None
        end_ids = end_of_sequence_ids(self._model.model.generation_config, self._tokenizer)
        engine = engine_for(
            self._model,
            plan,
            prompts,
            requests,
            StopRules(end_ids, self._tokenizer),
            engine_options(
                plan, prompts, kv_tokens, self._options.max_step_tokens, gpu=on_gpu, max_length=max_length
            ),
            LengthEstimator(params=prompts.params, unlimited=_unlimited(prompts, max_length)),
            trace=self._trace,
            score_reads=self._reads,
        )
        self._store = engine.scores
        self.stats, self.plan_stats = engine.stats, plan.stats
        token_bytes = self._model.backend.bytes_per_token(self._model.layers, self._model.dtype)
        self.kv_budget_bytes, self._kv_capacity = kv_tokens * token_bytes, engine.pool.capacity
        for finished in engine.run():
            self.kv_peak_bytes = engine.stats.kv_tokens_peak * token_bytes
            yield answers_of(finished, plan, prompts, requests)

    def show(self, stage: Stage, rows_done: int) -> None:
        """The figures of the run so far, as the command line shows them: prompt tokens count when computed."""
        plan = self.plan_stats
        stage.update(
            rows_done,
            prompt_tokens_done=self.stats.prompt_tokens_computed,
            output_tokens=self.stats.output_tokens,
            kv_used_fraction=self.stats.kv_tokens_used / self._kv_capacity if plan else None,
            saved_fraction=1.0 - plan.planned_tokens / max(1, plan.prompt_tokens) if plan else None,
        )

    def score(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(log-probability, whether no token is more probable) of each scored token of a row, in order."""
        assert self._reads is not None, "no row is scored"
        numbers = self._reads.of_row(row)
        return self._store.logprob[numbers], self._store.greedy[numbers]


def _unlimited(prompts: PromptTable, max_length: int | None) -> list[int]:
    """The parameter sets whose max_tokens is no limit: the model's length ends the output first."""
    return [i for i, params in enumerate(prompts.params) if max_length and params.max_tokens >= max_length]
