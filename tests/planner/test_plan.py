"""build_plan against an oracle that knows only the tokens, on random tables with every awkward shape."""

from __future__ import annotations

import numpy as np
import pytest
from planner_oracle import GREEDY, SAMPLED, check_plan, make_prompts, make_requests, random_rows

from batchllm.core import SamplingParams
from batchllm.planner import PlanOptions, build_plan

PARAMS = (
    GREEDY,
    SAMPLED,
    SamplingParams(max_tokens=9, temperature=1.0, n=3),
    SamplingParams(max_tokens=2, n=2),
)
ORDERS = ("auto", "decode_ratio", "tree", "input")


@pytest.mark.parametrize("order", ORDERS)
def test_random_tables(order):
    rng = np.random.default_rng(ORDERS.index(order))
    for case in range(400):
        rows = random_rows(rng, int(rng.integers(0, 14)), int(rng.integers(1, 5)), int(rng.integers(1, 12)))
        prompts = make_prompts(rows, PARAMS, rng.integers(0, rng.integers(1, 5), size=len(rows)).tolist())
        requests = make_requests(prompts)
        todo = rng.random(len(requests)) < (1.0 if case % 3 else 0.7)
        options = PlanOptions(min_shared_tokens=int(rng.integers(1, 6)), order=order)
        check_plan(build_plan(prompts, requests, todo, options), prompts, requests, todo)
