"""How much KV memory a job is given."""

from __future__ import annotations

import numpy as np

from batchllm.core import SamplingParams
from batchllm.executor.budget import engine_options
from batchllm.planner.output_limits import output_limits
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
    prompt_length = np.diff(prompts.offsets)
    for max_length, most in ((None, [50, 50]), (1000, [50, 50]), (100, [50, 10]), (90, [50, 1])):
        assert output_limits(prompts, prompts.params_of, prompt_length, max_length).tolist() == most
