"""build_plan against oracles that know only the tokens, on random tables with every awkward shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from planner_oracle import (
    GREEDY,
    SAMPLED,
    check_plan,
    make_prompts,
    make_requests,
    prompt_of,
    random_rows,
    spelled_nodes,
)

from batchllm.core import SamplingParams
from batchllm.planner import PlanOptions, build_plan
from batchllm.planner.plan import draft_plan

MANY = SamplingParams(max_tokens=9, temperature=1.0, n=3)
PARAMS = (GREEDY, SAMPLED, MANY, SamplingParams(max_tokens=2, n=2))
ORDERS = ("auto", "tree", "input", "dual_scan", "longest_first")


def random_job(rng, case):
    rows = random_rows(rng, int(rng.integers(0, 14)), int(rng.integers(1, 5)), int(rng.integers(1, 12)))
    prompts = make_prompts(rows, PARAMS, rng.integers(0, rng.integers(1, 5), size=len(rows)).tolist())
    requests = make_requests(prompts)
    return prompts, requests, rng.random(len(requests)) < (1.0 if case % 3 else 0.7)


def plan_rows(rows, params=(GREEDY,), params_of=None, **options):
    prompts = make_prompts(rows, params, params_of)
    requests = make_requests(prompts)
    todo = np.ones(len(requests), dtype=bool)
    plan = build_plan(prompts, requests, todo, PlanOptions(**options))
    check_plan(plan, prompts, requests, todo)
    return plan


@pytest.mark.parametrize("order", ORDERS)
def test_random_tables(order):
    rng = np.random.default_rng(ORDERS.index(order))
    for case in range(300):
        prompts, requests, todo = random_job(rng, case)
        options = PlanOptions(min_shared_tokens=int(rng.integers(1, 6)), order=order)
        check_plan(build_plan(prompts, requests, todo, options), prompts, requests, todo)


def test_which_prefixes_become_nodes():
    rng = np.random.default_rng(21)
    for case in range(300):
        prompts, requests, todo = random_job(rng, case)
        shortest = int(rng.integers(1, 6))
        plan = build_plan(prompts, requests, todo, PlanOptions(min_shared_tokens=shortest))
        sequences = [prompt_of(prompts, int(plan.node_row[leaf])) for leaf in plan.sequence_node]
        shared = [tuple(prefix) for prefix in spelled_nodes(plan, prompts, shared=True)]
        assert len(set(shared)) == len(shared)
        assert set(shared) == kept_prefixes(sequences, shortest)


def kept_prefixes(sequences, shortest):
    """The rule as it is written down, one prefix at a time, the shortest first."""
    kept = set()
    prefixes = {s[:i] for s in sequences for i in range(1, len(s) + 1)}
    for prefix in sorted(prefixes, key=len):
        below = [s for s in sequences if s[: len(prefix)] == prefix]
        ending = sum(s == prefix for s in below)
        parting = len({s[len(prefix) : len(prefix) + 1] for s in below}) > 1
        above = max((len(p) for p in kept if prefix[: len(p)] == p), default=0)
        if ending >= 2 or (parting and len(prefix) - above >= shortest):
            kept.add(prefix)
    return kept


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "dual_scan"])
def test_children_are_in_the_order_asked_for(order):
    """With every trie node kept, the children of a node show the order of the walk."""
    rng = np.random.default_rng(31)
    for case in range(200):
        prompts, requests, todo = random_job(rng, case)
        decode = rng.integers(0, 4, size=len(requests))
        plan = build_plan(prompts, requests, todo, PlanOptions(1, order, decode))
        for parent in range(-1, plan.num_nodes):
            keys = [
                order_key(plan, prompts, node, order, decode)
                for node in np.flatnonzero(plan.node_parent == parent)
            ]
            assert keys == sorted(keys)


def order_key(plan, prompts, node, order, decode):
    """(not ending at the parent, what the order is about, first request)."""
    first = int(np.searchsorted(plan.sequence_node, node))
    leaves = range(first, first + int(plan.node_leaves[node]))
    requests = [int(plan.request[plan.request_ptr[s]]) for s in leaves]
    own = plan.node_end[node] - plan.node_start[node]
    if order == "input":
        wanted = 0.0
    elif order == "tree":
        wanted = prompt_of(prompts, int(plan.node_row[node]))[plan.node_start[node]] if own else 0
    else:
        last = plan.sequence_node[leaves[-1]] + 1
        computed = (plan.node_end - plan.node_start)[node:last].sum()
        longest = (-decode[requests].max(), -computed - decode[requests].sum())
        wanted = longest if order == "longest_first" else -decode[requests].sum() / max(1, computed)
        wanted = wanted if own else 0.0
    return (own > 0, wanted, min(requests))


def test_tree_order_is_lexicographic():
    rng = np.random.default_rng(41)
    for case in range(200):
        prompts, requests, todo = random_job(rng, case)
        plan = build_plan(prompts, requests, todo, PlanOptions(4, "tree"))
        first = plan.request[plan.request_ptr[:-1]].tolist()
        keys = [(prompt_of(prompts, int(requests.row[q])), q) for q in first]
        assert keys == sorted(keys)


def test_greedy_twins_are_one_sequence_and_sampled_ones_are_not():
    rows = [[1, 2, 3]] * 3
    plan = plan_rows(rows)
    assert plan.request.tolist() == [0, 1, 2]
    assert plan.num_sequences == 1
    assert plan.request_shared.tolist() == [0, 3, 3]
    assert plan.stats.shared_nodes == 0

    plan = plan_rows(rows, (SAMPLED,))
    assert plan.num_sequences == 3
    assert plan.node_start.tolist() == [0, 3, 3, 3]  # one node of the whole prompt, leaves without own tokens
    assert plan.node_end.tolist() == [3, 3, 3, 3]

    plan = plan_rows(rows, (GREEDY, dataclasses.replace(GREEDY, max_tokens=8)), [0, 1, 0])
    assert plan.num_sequences == 2


def test_n_samples_share_their_prompt():
    plan = plan_rows([[1, 2], [1, 2, 3]], (MANY,))
    assert plan.num_sequences == 6
    assert plan.node_parent.tolist() == [-1, 0, 0, 0, 0, 4, 4, 4]
    assert plan.stats.planned_tokens == 3
    assert plan.stats.depth == 2


def test_a_short_prefix_is_copied_and_a_long_one_is_a_node():
    rows = [[*range(8), i] for i in range(3)]
    assert plan_rows(rows, min_shared_tokens=8).node_parent.tolist() == [-1, 0, 0, 0]
    plan = plan_rows(rows, min_shared_tokens=9)
    assert plan.node_parent.tolist() == [-1, -1, -1]
    assert plan.node_donor.tolist() == [-1, 0, 1]
    assert plan.node_copied.tolist() == [0, 8, 8]


def test_a_prompt_comes_before_its_extensions_whatever_the_order():
    """Nothing is computed twice although the shorter prompt has the smaller decode ratio and the later row."""
    params = (GREEDY, dataclasses.replace(GREEDY, max_tokens=100))
    for order in ORDERS:
        plan = plan_rows([[1, 2, 3], [1, 2]], params, [1, 0], order=order)
        assert plan.request.tolist() == [1, 0]
        assert plan.node_copied.tolist() == [0, 2]


def test_decode_estimates_decide_the_order():
    rows = [[1] * 4, [2] * 4, [3] * 4]
    assert plan_rows(rows, decode_estimate=np.array([1, 9, 5])).request.tolist() == [1, 2, 0]
    assert plan_rows(rows, decode_estimate=lambda params, most, group: most).request.tolist() == [0, 1, 2]
    assert plan_rows([[1] * 4, [2] * 2], decode_estimate=None).request.tolist() == [1, 0]


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_nothing_to_plan(rows):
    plan = plan_rows(rows)
    assert plan.num_nodes == plan.num_sequences == 0
    assert plan.request_ptr.tolist() == [0]
    assert plan.stats.planned_tokens == 0


def test_a_row_without_prompt_and_without_fault_is_a_mistake():
    prompts = dataclasses.replace(make_prompts([[1], []]), faults={})
    with pytest.raises(ValueError, match="row 1 "):
        build_plan(prompts, make_requests(prompts), np.ones(2, dtype=bool), PlanOptions())


def test_array_types_are_the_documented_ones():
    plan = plan_rows([[1, 2], [1, 3]])
    wide = {"node_row", "request_ptr", "request", "request_shared"}
    for field in dataclasses.fields(plan):
        if field.name != "stats":
            expected = np.int64 if field.name in wide else np.int32
            assert getattr(plan, field.name).dtype == expected, field.name


def test_read_only_tokens_and_depth():
    """Memory-mapped input is read-only; a chain of prompts is as deep as it is long."""
    prompts = make_prompts([[0] * n for n in range(1, 30)])
    for array in (prompts.tokens, prompts.offsets, prompts.params_of):
        array.flags.writeable = False
    requests = make_requests(prompts)
    plan = build_plan(prompts, requests, np.ones(29, dtype=bool), PlanOptions(min_shared_tokens=1))
    check_plan(plan, prompts, requests, np.ones(29, dtype=bool))
    assert plan.stats.depth == 28


def test_dual_scan_takes_from_both_ends():
    """Against the scan itself, one sibling at a time."""
    rng = np.random.default_rng(51)
    for _ in range(100):
        count = int(rng.integers(1, 12))
        lengths, decode = rng.integers(1, 40, size=count), rng.integers(1, 40, size=count)
        rows = [[1000 * i + j for j in range(n)] for i, n in enumerate(lengths)]
        plan = plan_rows(rows, order="dual_scan", decode_estimate=decode)
        assert plan.request.tolist() == scanned(lengths, decode)


def scanned(lengths, decode):
    work, held = lengths + decode, lengths * decode + decode * (decode + 1) // 2
    ratio = work / held
    waiting = sorted(range(len(work)), key=lambda i: (-ratio[i], i))
    surplus = work / work.sum() - held / held.sum()
    left, right, taken = 0.0, 0.0, []
    while waiting:
        heavy = [i for i in waiting if surplus[i] > 0]
        light = [i for i in waiting if surplus[i] <= 0]
        if light and (not heavy or right <= left + 1e-12):
            taken.append(light[-1])
            right -= surplus[taken[-1]]
        else:
            taken.append(heavy[0])
            left += surplus[taken[-1]]
        waiting.remove(taken[-1])
    return taken


def test_no_more_is_expected_than_the_length_leaves():
    rows = [[1] * 4, [1] * 8, [2] * 10, [3] * 12]
    prompts = make_prompts(rows, (GREEDY,))  # 7 tokens at most
    requests = make_requests(prompts)
    todo = np.ones(4, dtype=bool)
    draft = draft_plan(prompts, requests, todo, PlanOptions(max_length=12))
    found = dict(zip(draft.sequences.first_request.tolist(), draft.decode.tolist()))
    assert found == {0: 7, 1: 4, 2: 2, 3: 1}
    seen = draft.expecting(lambda params, most, group: most * 10).decode
    assert sorted(seen.tolist()) == [10, 20, 40, 70]
    assert draft_plan(prompts, requests, todo, PlanOptions()).decode.tolist() == [7] * 4
