"""How much KV memory a job is given."""

from __future__ import annotations

import numpy as np

from batchllm.core import SamplingParams
from batchllm.executor.budget import engine_options
from batchllm.limits import longest_sequence
from batchllm.planner.plan import PlanOptions, build_plan
from tests.executor.harness import prompt_table, request_table


def test_no_memory_is_for_what_the_model_cannot_read() -> None:
    prompts = prompt_table([[1] * 10, [2] * 90, [3] * 100], SamplingParams(max_tokens=1000))
    plan = build_plan(prompts, request_table(3, 1), np.ones(3, dtype=bool), PlanOptions())
    plenty = engine_options(plan, prompts, 10_000, "auto")
    assert (plenty.kv_tokens, plenty.max_length) == (200 + 3 * (1000 + 32), None)
    capped = engine_options(plan, prompts, 10_000, "auto", max_length=100)
    assert (capped.kv_tokens, capped.max_length) == (200 + (90 + 10 + 1) + 3 * 32, 100)
    assert engine_options(plan, prompts, 150, "auto", max_length=100).kv_tokens == 150


def test_no_sequence_is_longer_than_the_model_reads() -> None:
    prompts = prompt_table([[1] * 10, [2] * 90], SamplingParams(max_tokens=50))
    assert [longest_sequence(prompts, length) for length in (None, 1000, 100)] == [140, 140, 100]
