"""Estimates of remaining output: exact before anything is known, conditional afterwards, never out of bounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from planner_oracle import make_prompts, make_requests, random_rows

from batchllm.core import SamplingParams
from batchllm.planner import LengthEstimator, PlanOptions
from batchllm.planner.length_groups import NO_GROUP, length_groups
from batchllm.planner.length_kinds import MOST_KINDS
from batchllm.planner.lengths import KEPT_LENGTHS, MOST_IN_GROUPS, SPREAD, TRUSTED_LENGTHS
from batchllm.planner.plan import arrange, draft_plan


def estimate(estimator, decoded, max_tokens=1000, params=0):
    decoded = np.atleast_1d(decoded)
    return estimator.estimate(
        np.full(len(decoded), params), decoded, np.full(len(decoded), max_tokens)
    ).tolist()


def test_max_tokens_until_something_is_known():
    estimator = LengthEstimator()
    assert estimate(estimator, [0, 1, 999, 1000]) == [1000, 999, 1, 1]
    estimator.observe(1, 5)
    assert estimate(estimator, [0], params=0) == [1000]  # another parameter set's lengths say nothing


def test_mean_and_spread_of_the_longer_ones():
    rng = np.random.default_rng(6)
    estimator = LengthEstimator()
    seen = rng.integers(1, 400, size=500)
    for length in seen:
        estimator.observe(3, int(length))
    decoded = np.arange(0, 500, 7)
    for d, found in zip(decoded.tolist(), estimate(estimator, decoded, 1000, params=3)):
        longer = seen[seen > d]
        expected = longer.mean() + SPREAD * longer.std() if len(longer) else 0.0
        trust = len(longer) / (len(longer) + TRUSTED_LENGTHS)
        total = trust * expected + (1 - trust) * 1000
        assert found == pytest.approx(max(total - d, 1), abs=1.0)
        assert found >= max(total - d, 1) - 1e-6


def test_few_observations_are_hardly_believed():
    estimator = LengthEstimator()
    estimator.observe(0, 10)
    (one,) = estimate(estimator, 0)
    for _ in range(200):
        estimator.observe(0, 10)
    (many,) = estimate(estimator, 0)
    assert 900 < one < 1000
    assert 10 <= many < 100


def test_never_beyond_max_tokens():
    estimator = LengthEstimator()
    for _ in range(100):
        estimator.observe(0, 5000)
    assert estimate(estimator, [0, 60, 99, 100], max_tokens=100) == [100, 40, 1, 1]


def test_old_lengths_are_forgotten():
    estimator = LengthEstimator()
    for length in [900] * KEPT_LENGTHS + [20] * KEPT_LENGTHS:
        estimator.observe(0, length)
    assert estimate(estimator, 0)[0] <= 30


def test_mixed_parameters_in_one_call():
    estimator = LengthEstimator()
    for _ in range(1000):
        estimator.observe(0, 8)
        estimator.observe(1, 300)
    found = estimator.estimate(
        np.array([1, 0, 1, 2]), np.array([0, 0, 300, 4]), np.array([400, 400, 400, 50])
    )
    assert 300 <= found[0] <= 302
    assert 8 <= found[1] <= 15
    assert found[2:].tolist() == [100, 46]


def test_without_a_limit_of_its_own_an_output_is_expected_to_be_as_long_again():
    estimator = LengthEstimator(unlimited=[1])
    assert estimate(estimator, [0, 300, 5000, 99_999], 100_000, params=1) == [512, 300, 5000, 1]
    assert estimate(estimator, [0, 5], 100, params=1) == [100, 95]
    assert estimate(estimator, [0, 300], 100_000, params=0) == [100_000, 99_700]
    estimator.observe(1, np.full(160, 100))  # ten times as many as weigh as much as the guess
    assert 100 < estimate(estimator, 0, 100_000, params=1)[0] < 150


def test_empty():
    none = np.empty(0, dtype=np.int64)
    assert len(LengthEstimator().estimate(none, none, none)) == 0


def test_mean_of_whole_outputs():
    rng = np.random.default_rng(7)
    seen = rng.integers(1, 400, size=300)
    estimator = LengthEstimator()
    for length in seen:
        estimator.observe(2, int(length))
    limits = np.array([1, 50, 399, 1000])
    found = estimator.mean_total(np.full(4, 2), limits)
    assert found.tolist() == [round(float(np.minimum(seen, most).mean())) for most in limits]
    assert estimator.mean_total(np.array([0, 2]), np.array([64, 400]))[0] == 64  # nothing is known of these
    assert len(estimator.mean_total(np.empty(0, np.int64), np.empty(0, np.int64))) == 0


def groups_of(rows, min_sequences=3, most_groups=100, min_shared_tokens=2):
    """Group of each row, which must be different and without faults."""
    prompts = make_prompts(rows)
    requests = make_requests(prompts)
    options = PlanOptions(min_shared_tokens=min_shared_tokens)
    draft = draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), options)
    found = length_groups(draft.tree, draft.kept, draft.below, draft.terminal, min_sequences, most_groups)
    of_row = np.empty(len(rows), dtype=np.int32)
    of_row[draft.sequences.first_request] = found
    return of_row.tolist()


def test_groups_are_the_lowest_prefixes_that_enough_sequences_share():
    tasks = [[1, 1, task, task, row] for task in (2, 3) for row in (5, 6, 7)]
    deeper = [
        [1, 1, 4, 4, part, part, row] for part in (2, 3) for row in (5, 6)
    ]  # parts of two are too small
    alone = [[9, 9, 9], [8, 8, 8]]
    assert groups_of(tasks + deeper + alone) == [0] * 3 + [1] * 3 + [2] * 4 + [3] * 2
    at_root = [[1, 1, 5, 5]]
    assert groups_of(at_root + tasks) == [0] + [1] * 3 + [2] * 3
    assert groups_of(tasks, min_sequences=4) == [NO_GROUP] * 6, "one group for all says nothing"
    assert groups_of(tasks, most_groups=1) == [NO_GROUP] * 6
    assert groups_of([]) == []


def test_random_groups_against_a_search_in_the_plan():
    random = np.random.default_rng(3)
    for _ in range(150):
        rows = random_rows(random, int(random.integers(1, 40)), 2, 12)
        prompts = make_prompts(rows)
        requests = make_requests(prompts)
        enough = int(random.integers(1, 6))
        draft = draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(2, "tree"))
        found = length_groups(draft.tree, draft.kept, draft.below, draft.terminal, enough)
        plan = arrange(dataclasses.replace(draft, group=found), "input")
        owner = []
        for node in plan.sequence_node.tolist():
            node = int(plan.node_parent[node])
            while node >= 0 and plan.node_leaves[node] < enough:
                node = int(plan.node_parent[node])
            owner.append(node)
        if len(set(owner)) == 1:
            owner = [-1] * len(owner)
        pairs = set(zip(owner, plan.sequence_group.tolist()))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), "one to one"
        assert (NO_GROUP in plan.sequence_group) == (len(pairs) == 1)


def test_what_is_known_of_a_row_holds_for_every_plan_it_is_in():
    rows = [[task, task, task, row] for row in range(40) for task in (1, 2)]
    prompts = make_prompts(rows)
    requests = make_requests(prompts)
    whole = draft_plan(prompts, requests, np.ones(80, dtype=bool), PlanOptions(2))
    some = np.arange(80) % 11 == 0
    part = draft_plan(prompts, requests, some, PlanOptions(2, row_group=whole.row_group))
    plan = arrange(part, "input")
    rows_of_plan = requests.row[plan.request[plan.request_ptr[:-1]]]
    assert plan.sequence_group.tolist() == whole.row_group[rows_of_plan].tolist()
    assert whole.row_group.tolist() == [0, 1] * 40
    assert part.row_group[~some].tolist() == [NO_GROUP] * int((~some).sum())


def test_a_group_is_believed_the_more_the_more_of_it_has_been_seen():
    estimator = LengthEstimator()
    estimator.observe(0, np.full(1000, 100))
    limits, none = np.full(3, 1000), np.zeros(3, dtype=int)
    groups = np.array([0, 1, NO_GROUP])
    assert estimator.mean_total(none, limits, groups).tolist() == [100, 100, 100]
    for seen, expected in ((4, 60), (60, 25)):  # a group of four is half believed, one of 64 nearly wholly
        estimator.observe(0, np.full(seen, 20), np.full(seen, 1))
        in_group, others = estimator.mean_total(none, limits, groups)[[1, 0]]
        assert in_group == pytest.approx(expected, abs=2)
        assert 90 <= others <= 100
    remaining = estimator.estimate(none, np.array([0, 0, 30]), limits, np.array([0, 1, 1]))
    assert remaining[1] < 45 < 90 < remaining[0]
    assert 60 < remaining[2] < 130, "of the group none was longer than 30: what the others say holds"
    other_params = estimator.mean_total(none + 1, limits, groups)
    assert other_params.tolist() == [1000] * 3


def test_groups_of_many_sequences_are_estimated_as_one_by_one():
    random = np.random.default_rng(5)
    estimator = LengthEstimator()
    for _ in range(200):
        n = int(random.integers(1, 5))
        params, group = random.integers(0, 3, n), random.integers(-1, 4, n)
        estimator.learn(params, random.integers(1, 60, n) * (group + 2), np.full(n, 500), group)
    params, group, decoded = (random.integers(low, high, 60) for low, high in ((0, 4), (-1, 5), (0, 200)))
    limits = random.integers(200, 500, 60)
    together = estimator.estimate(params, decoded, limits, group), estimator.mean_total(params, limits, group)
    for i in range(60):
        one = slice(i, i + 1)
        assert estimator.estimate(params[one], decoded[one], limits[one], group[one]) == together[0][i]
        assert estimator.mean_total(params[one], limits[one], group[one]) == together[1][i]
    assert ((together[0] >= 1) & (together[0] <= np.maximum(limits - decoded, 1))).all()


def test_errors_are_of_what_was_expected_before_each_was_learned():
    estimator = LengthEstimator()
    assert estimator.errors.figures() == {}
    zero = np.zeros(2, dtype=int)
    estimator.learn(zero, np.array([10, 20]), np.array([100, 100]))  # expected: max_tokens
    estimator.learn(zero[:1], np.array([21]), np.array([100]))  # expected: 15
    figures = estimator.errors.figures()
    assert figures["mean_expected"] == pytest.approx((100 + 100 + 15) / 3)
    assert figures["mean_absolute_error"] == pytest.approx((90 + 80 + 6) / 3)
    assert figures["bias"] == pytest.approx(215 / 51 - 1)


def test_what_was_learned_in_groups_makes_the_errors_small():
    """Two templates, answered in 8 and in 300 tokens: alike in nothing but their parameters."""
    random = np.random.default_rng(9)
    with_groups, without = LengthEstimator(), LengthEstimator()
    for _ in range(300):
        group = random.integers(0, 2, 1)
        length = np.where(group == 0, random.integers(6, 11, 1), random.integers(280, 321, 1))
        with_groups.learn(group * 0, length, np.array([1000]), group)
        without.learn(group * 0, length, np.array([1000]))
    assert without.errors.figures()["mean_absolute_error"] > 120
    assert with_groups.errors.figures()["mean_absolute_error"] < 40


def test_parameters_that_say_nothing_of_lengths_are_not_told_apart():
    params = [SamplingParams(max_tokens=500, seed=seed, logprobs=seed % 2 == 0) for seed in range(9)]
    estimator = LengthEstimator(params=[*params, SamplingParams(max_tokens=500, temperature=1.0)])
    estimator.observe(3, np.full(100, 20))
    found = estimator.mean_total(np.arange(10), np.full(10, 500))
    assert found.tolist() == [20] * 9 + [500]


def test_memory_is_bounded_however_many_parameters_and_groups_there_are():
    """The first kinds are learned one by one, all others together."""
    sets = 100_000
    params = [SamplingParams(max_tokens=100, allowed_token_ids=(number,)) for number in range(sets)]
    estimator = LengthEstimator(params=params)
    index, group = np.arange(sets), np.arange(sets) % 1000
    estimator.learn(index, np.where(index == 0, 3, 30), np.full(sets, 100), group)
    assert len(estimator._seen) == MOST_KINDS + 1
    assert len(estimator._in_group) <= MOST_IN_GROUPS
    first, last = estimator.mean_total(np.array([0, sets - 1]), np.full(2, 100))
    assert (first, last) == (3, 30)
    assert estimator.quantile(sets - 1, 0.99) == 30
    remaining = estimator.estimate(index, np.full(sets, 29), np.full(sets, 100), group)
    assert 1 <= remaining.min() <= remaining[-1] < 10
