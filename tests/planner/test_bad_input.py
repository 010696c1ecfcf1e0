"""Damaged input is named; input of extreme shape is planned in bounded time and memory, without recursion."""

from __future__ import annotations

import dataclasses
import mmap
import resource
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from planner_oracle import GREEDY, SAMPLED, check_plan, make_prompts, make_requests
from test_choose import seconds

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.dataset.tokens import DamagedStore, TokenStoreWriter, open_tokens
from batchllm.planner import PlanOptions, build_plan
from batchllm.planner import plan as planning
from batchllm.planner.choose import choose_order
from batchllm.planner.plan import draft_plan
from batchllm.planner.savings import computed_tokens
from batchllm.planner.sequences import Prompts
from batchllm.planner.simulate import SimulationOptions


@contextmanager
def memory_of_at_most(mib):
    """Of Python and NumPy, above what there is already."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mib << 20
    finally:
        tracemalloc.stop()


def planned(prompts, **options):
    requests = make_requests(prompts)
    return build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(**options))


@pytest.mark.parametrize("lost", [4, 2, 40])
def test_a_truncated_token_store_is_no_token_store(tmp_path, lost):
    path = tmp_path / "tokens"
    with TokenStoreWriter(path) as writer:
        writer.append([[1, 2, 3], [1, 2, 4], [9] * 5])
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(DamagedStore, match=f"tokens: .* damaged: it has {44 - lost} bytes instead of 44"):
        open_tokens(path)


def test_a_damaged_token_store_is_named(tmp_path):
    path = tmp_path / "tokens"
    with TokenStoreWriter(path) as writer:
        writer.append([[1, 2, 3], [], [4]])
    offsets = tmp_path / "tokens.offsets.npy"
    whole = offsets.read_bytes()
    assert open_tokens(path)[0].tolist() == [1, 2, 3, 4]

    def refused(expected):
        with pytest.raises(DamagedStore, match=expected):
            open_tokens(path)

    for torn in (whole[:-3], whole[:-8], whole[:40], b"", b"PK" + whole):
        offsets.write_bytes(torn)
        refused(r"tokens\.offsets\.npy: the token store is damaged")
    for wrong in ([1, 3, 3, 4], [0, 3, 2, 4], [], [[0, 4]], [0.0, 4.0]):
        np.save(offsets, np.array(wrong))
        refused("do not ascend from 0")
    np.save(offsets, np.array([0, 3, 3, 5]))
    refused("it has 16 bytes instead of 20")
    offsets.write_bytes(whole)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    refused("it has 20 bytes instead of 16")
    path.unlink()
    refused("cannot be read: No such file")
    offsets.unlink()
    refused("offsets cannot be read")


def test_offsets_beyond_the_tokens_name_the_row():
    prompts = make_prompts([[1, 2], [3, 4], [5, 6]])
    short = dataclasses.replace(prompts, tokens=prompts.tokens[:5])
    with pytest.raises(ValueError, match=r"damaged.* row 2"):
        planned(short)
    swapped = dataclasses.replace(prompts, offsets=np.array([0, 4, 2, 6]))
    with pytest.raises(ValueError, match=r"damaged.* row 1"):
        planned(swapped)


def test_negative_tokens_are_damage():
    """They would be taken for the end of a prompt, and different prompts for the same."""
    for place in range(6):
        prompts = make_prompts([[1, 2], [1, 2, 3], [1]])
        prompts.tokens[place] = -1
        with pytest.raises(ValueError, match="negative token"):
            planned(prompts)


def test_prompts_that_differ_in_one_token_anywhere_are_told_apart():
    """What a weak hash would confuse: nothing here is hashed. Same sums, same ends, swapped neighbours."""
    base = list(range(300))
    rows = [base]
    for place in range(0, 299, 7):
        row = list(base)
        row[place], row[place + 1] = row[place + 1], row[place]
        rows.append(row)
    prompts = make_prompts(rows)
    requests = make_requests(prompts)
    todo = np.ones(len(rows), dtype=bool)
    plan = build_plan(prompts, requests, todo, PlanOptions())
    check_plan(plan, prompts, requests, todo)
    assert plan.num_sequences == len(rows)


def test_all_rows_identical():
    rows = 200_000
    tokens = np.tile(np.arange(20, dtype=np.int32), rows)
    offsets = np.arange(rows + 1, dtype=np.int64) * 20
    same = np.zeros(rows, dtype=np.int32)
    requests = RequestTable(np.arange(rows), same, np.zeros((rows, 2), dtype=np.uint64))
    for params, sequences in ((GREEDY, 1), (SAMPLED, rows)):
        prompts = PromptTable(tokens, offsets, (params,), same, {})
        with memory_of_at_most(100):
            plan = build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions())
        assert plan.num_sequences == sequences
        assert plan.stats.planned_tokens == 20
        assert plan.request.tolist() == list(range(rows))


def test_all_rows_different():
    rows = 200_000
    random = np.random.default_rng(0)
    tokens = np.empty((rows, 10), dtype=np.int32)
    tokens[:, 0] = random.permutation(rows)
    tokens[:, 1:] = random.integers(0, 9, (rows, 9))
    offsets = np.arange(rows + 1, dtype=np.int64) * 10
    same = np.zeros(rows, dtype=np.int32)
    requests = RequestTable(np.arange(rows), same, np.zeros((rows, 2), dtype=np.uint64))
    prompts = PromptTable(tokens.reshape(-1), offsets, (GREEDY,), same, {})
    with memory_of_at_most(100):
        plan = build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions(order="tree"))
    assert plan.stats.shared_nodes == 0
    assert plan.stats.planned_tokens == rows * 10
    assert tokens[plan.node_row, 0].tolist() == list(range(rows))


def test_one_row_of_a_million_tokens_among_short_ones():
    long = np.random.default_rng(0).integers(0, 1000, 1_000_000).tolist()
    prompts = make_prompts([long[:5], long, [*long[:700_000], 1000], [7]])
    with memory_of_at_most(20):
        plan = planned(prompts, order="tree", min_shared_tokens=1)
    assert plan.stats.planned_tokens == 1_000_002
    assert sorted((plan.node_end - plan.node_start).tolist()) == [0, 1, 1, 5, 300_000, 699_995]


def test_tokens_of_many_levels():
    """Prompts that each extend the last by a token, and what is read of them. 100,000 levels are 20 GB to go through:
    see below, and `python -m benchmarks.planner --cases 100000` for all of it."""
    levels = 20_000
    offsets = np.append(0, np.cumsum(np.arange(1, levels + 1))).astype(np.int64)
    zeros = mmap.mmap(
        -1, int(offsets[-1]) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
    )  # never written: all its pages are one
    same = np.zeros(levels, dtype=np.int32)
    prompts = PromptTable(np.frombuffer(zeros, np.int32), offsets, (GREEDY,), same, {})
    requests = RequestTable(np.arange(levels), same, np.zeros((levels, 2), dtype=np.uint64))
    with memory_of_at_most(20):
        plan = build_plan(prompts, requests, np.ones(levels, dtype=bool), PlanOptions(min_shared_tokens=1))
    assert plan.stats.depth == levels - 1
    assert plan.stats.planned_tokens == levels
    assert sorted(plan.node_end[plan.sequence_node].tolist()) == list(range(1, levels + 1))


def test_a_hundred_thousand_levels(monkeypatch):
    """The same without the sort, to the end: order, simulation, comparison of groupings."""
    levels = 100_000
    length = np.arange(1, levels + 1)
    offsets = np.append(0, np.cumsum(length)).astype(np.int64)
    same = np.zeros(levels, dtype=np.int32)
    prompts = PromptTable(np.empty(0, np.int32), offsets, (SamplingParams(max_tokens=4),), same, {})
    requests = RequestTable(np.arange(levels), same, np.zeros((levels, 2), dtype=np.uint64))
    known = Prompts(np.append(0, length[:-1]), length, np.arange(levels))
    monkeypatch.setattr(planning, "distinct_prompts", lambda prompts, rows: known)
    todo = np.ones(levels, dtype=bool)
    before = resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss  # counting every object would take half a minute
    draft = draft_plan(prompts, requests, todo, PlanOptions(min_shared_tokens=1))
    choice = choose_order(draft, seconds, SimulationOptions(10**9, 2048), policies=("longest_first",))
    savings = computed_tokens(draft)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB
    assert choice.plan.stats.depth == levels - 1
    assert choice.plan.stats.planned_tokens == levels == savings.optimum
    assert choice.plan.num_sequences == levels
