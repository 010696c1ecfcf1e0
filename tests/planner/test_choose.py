"""The choice of an order: what the simulator predicts for each, and the best of them."""

from __future__ import annotations

import numpy as np
import pytest
from planner_oracle import make_prompts, make_requests, random_rows

from batchllm.core import SamplingParams
from batchllm.planner.choose import POLICIES, choose_order, predict
from batchllm.planner.plan import PlanOptions, arrange, draft_plan
from batchllm.planner.simulate import SimulationOptions, simulate


def seconds(loads):
    """A step costs one, plus what its tokens cost when they are more than 16: decode tokens fill what is free."""
    return 1.0 + np.maximum(loads.tokens - 16, 0) / 8 + 0.001 * loads.kv_read


def draft_of(rows, decode):
    prompts = make_prompts(rows, (SamplingParams(max_tokens=64),))
    requests = make_requests(prompts)
    options = PlanOptions(min_shared_tokens=2, decode_estimate=decode)
    return draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), options)


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_the_best_of_what_each_order_comes_to(seed):
    random = np.random.default_rng(seed)
    rows = random_rows(random, 40, 3, 14)
    draft = draft_of(rows, random.integers(1, 60, len(rows)))
    options = SimulationOptions(150, 24)
    choice = choose_order(draft, seconds, options)
    assert tuple(choice.predictions) == POLICIES
    for policy, prediction in choice.predictions.items():
        plan = arrange(draft, policy)
        again = predict(simulate(plan, draft.expected_decode(plan), options), seconds)
        assert again == prediction
        assert prediction.seconds >= choice.predictions[choice.order].seconds
    assert choice.reason.startswith(choice.order)
    np.testing.assert_array_equal(choice.plan.request, arrange(draft, choice.order).request)


def test_orders_differ_and_the_reason_says_by_how_much():
    """Long outputs come last in tree order and then run alone; decode ratio and longest-first start with them."""
    rows = [[i, *[7] * 20] for i in range(40)]
    draft = draft_of(rows, np.where(np.arange(40) < 36, 2, 60))
    choice = choose_order(draft, seconds, SimulationOptions(500, 24))
    tree = choice.predictions["tree"]
    best = choice.predictions[choice.order]
    assert choice.order != "tree"
    assert best.seconds < 0.9 * tree.seconds
    assert f"{1 - best.seconds / tree.seconds:.1%} less than tree order" in choice.reason
    assert f"{best.steps} steps instead of {tree.steps}" in choice.reason


def test_where_nothing_differs_the_first_policy_is_taken():
    choice = choose_order(draft_of([[1, 2, 3]], np.array([4])), seconds, SimulationOptions(100, 16))
    assert choice.order == POLICIES[0]
    assert "every order is predicted to take" in choice.reason


def test_of_a_large_job_a_part_is_simulated_and_that_is_said():
    random = np.random.default_rng(0)
    rows = [[int(group), *random.integers(5, 50, 6).tolist()] for group in random.integers(0, 100, 2000)]
    draft = draft_of(rows, random.integers(1, 60, 2000))
    whole = choose_order(draft, seconds, SimulationOptions(400, 24))
    part = choose_order(draft, seconds, SimulationOptions(400, 24), most_simulated=400)
    assert whole.simulated == len(draft.sequences)
    assert 400 <= part.simulated < 450
    assert f"simulated on {part.simulated} of {len(draft.sequences):,} sequences" in part.reason
    assert part.plan.num_sequences == len(draft.sequences), "all of it is planned"
    share = part.simulated / whole.simulated
    for policy in POLICIES:
        expected = share * whole.predictions[policy].seconds
        assert part.predictions[policy].seconds == pytest.approx(expected, rel=0.1)


def test_an_empty_job():
    choice = choose_order(draft_of([], np.zeros(0)), seconds, SimulationOptions(100, 16))
    assert choice.predictions[choice.order].steps == 0
