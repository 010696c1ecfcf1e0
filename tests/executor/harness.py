"""Runs prompts of token ids through planner and engine, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchllm.core import Plan, PromptTable, RequestTable, SamplingParams, SequenceResult
from batchllm.executor.backend import Backend
from batchllm.executor.engine import Engine, EngineOptions, EngineStats
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.stopping import StopRules
from batchllm.executor.trace import StepTrace
from batchllm.planner.plan import PlanOptions, build_plan
from tests.executor.tiny_models import EOS


@dataclass(frozen=True)
class Outcome:
    results: list[SequenceResult]  # by request
    stats: EngineStats
    plan: Plan
    engine: Engine


def prompt_table(prompts: Sequence[Sequence[int]], params: SamplingParams) -> PromptTable:
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    tokens = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    return PromptTable(tokens, offsets, (params,), np.zeros(len(prompts), dtype=np.int32), {})


def request_table(num_rows: int, samples: int, keys: np.ndarray | None = None) -> RequestTable:
    row = np.repeat(np.arange(num_rows), samples)
    sample = np.tile(np.arange(samples, dtype=np.int32), num_rows)
    if keys is None:
        keys = np.random.default_rng(0).integers(0, 2**63, (len(row), 2)).astype(np.uint64)
    return RequestTable(row, sample, keys)


def run(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    kv_tokens: int = 4096,
    max_step_tokens: int = 256,
    min_shared_tokens: int = 4,
    keys: np.ndarray | None = None,
    estimator: Any = None,
    trace: StepTrace | None = None,
    backend: Backend | None = None,
    check: bool = True,
    make_engine: Callable[..., Engine] = Engine,
) -> Outcome:
    """One result a request. With `check`, KV bookkeeping is verified after every step."""
    runner = model if isinstance(model, ModelRunner) else prepare_model(model)
    table, requests = prompt_table(prompts, params), request_table(len(prompts), params.n, keys)
    todo = np.ones(len(requests), dtype=bool)
    plan = build_plan(table, requests, todo, PlanOptions(min_shared_tokens=min_shared_tokens))
    options = EngineOptions(kv_tokens=kv_tokens, max_step_tokens=max_step_tokens)
    engine = make_engine(
        runner, plan, table, requests, StopRules(frozenset([EOS]), None), options, estimator, trace, backend
    )
    by_request: list[SequenceResult | None] = [None] * len(requests)
    for finished in engine.run():
        if check:
            engine.pool.check_integrity()
        for result in finished:
            for request in plan.request[
                plan.request_ptr[result.sequence] : plan.request_ptr[result.sequence + 1]
            ]:
                assert by_request[request] is None, "a request was answered twice"
                by_request[request] = result
    results = [result for result in by_request if result is not None]
    assert len(results) == len(requests), "a request was not answered"
    return Outcome(results, engine.stats, plan, engine)
