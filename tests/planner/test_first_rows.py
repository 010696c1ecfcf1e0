"""The sample of rows that is run first: by content, whole sequences, whatever order rows are in."""

from __future__ import annotations

import numpy as np
from planner_oracle import GREEDY, SAMPLED, make_prompts, random_rows

from batchllm.dataset.keys import make_requests
from batchllm.planner.first_rows import sampled_requests
from batchllm.planner.plan import PlanOptions, draft_plan


def sample_of(rows, params_of, number, todo=None):
    """(requests chosen, the draft)."""
    prompts = make_prompts(rows, (GREEDY, SAMPLED), params_of)
    requests = make_requests(prompts, None, b"")
    todo = np.ones(len(requests), dtype=bool) if todo is None else todo
    draft = draft_plan(prompts, requests, todo, PlanOptions())
    return sampled_requests(draft, number), draft


def test_so_many_rows_and_all_that_is_answered_with_them():
    random = np.random.default_rng(4)
    for _ in range(60):
        rows = random_rows(random, int(random.integers(1, 30)), 3, 4)
        params_of = random.integers(0, 2, len(rows)).tolist()
        number = int(random.integers(1, 12))
        sampled, draft = sample_of(rows, params_of, number)
        sequences = draft.sequences
        members = np.split(sequences.request, sequences.request_ptr[1:-1])
        assert all(sampled[member].all() == sampled[member].any() for member in members)
        faults = len(draft.prompts.faults)
        assert sampled.sum() >= min(number, len(rows) - faults)
        assert not sampled[list(draft.prompts.faults)].any()
        assert sum(bool(sampled[member].any()) for member in members) <= number


def test_the_sample_does_not_depend_on_the_order_of_rows_nor_on_what_is_done():
    random = np.random.default_rng(5)
    rows = [[row, *random.integers(0, 9, 3).tolist()] for row in range(200)]
    greedy = [0] * 200
    sampled, _ = sample_of(rows, greedy, 50)
    assert sampled.sum() == 50
    turned, _ = sample_of(rows[::-1], greedy, 50)
    assert turned[::-1].tolist() == sampled.tolist()
    left, _ = sample_of(rows, greedy, 50, todo=random.random(200) < 0.5)
    assert left.tolist() == sampled.tolist()
    more, _ = sample_of(rows, greedy, 80)
    assert (more >= sampled).all()
    assert 30 < sampled[:100].sum() * 2 < 70, "from all over the input"
