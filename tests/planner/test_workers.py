"""A plan divided among workers: each computes what its own sequences need, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.core import Plan, SamplingParams
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.simulate import SimulationOptions, simulate
from batchllm.planner.workers import divided
from tests.executor.harness import prompt_table, request_table
from tests.executor.test_scheduler import random_prompts


def planned(prompts: list[list[int]]) -> Plan:
    """Every common beginning is a node of its own."""
    table = prompt_table(prompts, SamplingParams(max_tokens=9))
    requests = request_table(len(prompts), 1)
    return build_plan(table, requests, np.ones(len(requests), dtype=bool), PlanOptions(min_shared_tokens=1))


def distinct_tokens(prompts: list[list[int]]) -> int:
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def computed(parts: list[Plan]) -> list[int]:
    memory = SimulationOptions(100_000, 64)
    return [simulate(part, np.full(part.num_sequences, 3), memory).prompt_tokens for part in parts]


@pytest.mark.parametrize("seed", range(30))
def test_every_worker_computes_the_distinct_tokens_of_its_own_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    prompts = random_prompts(random)
    plan, workers = planned(prompts), int(random.integers(1, 6))
    parts = divided(plan, random.integers(1, 9, plan.num_sequences), workers)
    assert 1 <= len(parts) <= workers
    assert np.concatenate([part.request for part in parts]).tolist() == plan.request.tolist()
    assert computed(parts) == [distinct_tokens([prompts[row] for row in part.request]) for part in parts]


def test_a_prefix_on_two_workers_is_computed_twice() -> None:
    plan = planned([[7] * 50 + [number] for number in range(10)])
    assert computed(divided(plan, np.ones(10, dtype=np.int64), 1)) == [60]
    assert sum(computed(divided(plan, np.full(10, 200), 2))) == 110


def test_work_is_divided_evenly() -> None:
    plan = planned([[number] * 3 for number in range(10)])
    output = np.full(10, 1000)
    sizes = [part.num_sequences for part in divided(plan, output, 3)]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= 1
    assert len(divided(plan, output, 1000)) == 10
    heavy_first = np.where(np.arange(10) == 0, 9000, 1000)
    assert divided(plan, heavy_first, 2)[0].num_sequences == 1
    assert divided(planned([]), np.zeros(0, dtype=np.int64), 4)[0].num_sequences == 0
