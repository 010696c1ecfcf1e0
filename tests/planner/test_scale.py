"""Large tables: exact, and without anything that grows with rows times tokens. Times are in `benchmarks.planner`."""

from __future__ import annotations

import numpy as np

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.planner import PlanOptions, build_plan


def three_levels(rng, rows, length):
    """One root, a document per 1000 rows, a part per 20 rows, then an own end: [rows, length] int32."""
    cuts = np.cumsum([length // 5, length // 2, length // 5])
    part = rng.integers(0, rows // 20, size=rows)
    documents, parts = rows // 1000, rows // 20
    levels = [
        (np.zeros(rows, np.int64), 1),
        (part % documents, documents),
        (part, parts),
        (np.arange(rows), rows),
    ]
    table = np.empty((rows, length), dtype=np.int32)
    for columns, (member, kinds) in zip(np.split(np.arange(length), cuts), levels):
        table[:, columns] = rng.integers(0, 32_000, (kinds, len(columns)), dtype=np.int32)[member]
    return table, np.unique(part), cuts


def plan_table(table):
    rows, length = table.shape
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    no_params = np.zeros(rows, dtype=np.int32)
    prompts = PromptTable(table.reshape(-1), offsets, (SamplingParams(),), no_params, faults={})
    requests = RequestTable(np.arange(rows), no_params, np.zeros((rows, 2), dtype=np.uint64))
    return build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions())


def test_fifty_thousand_rows_of_three_levels():
    table, parts, cuts = three_levels(np.random.default_rng(1), 50_000, 400)
    plan = plan_table(table)
    documents = len(np.unique(parts % 50))
    least = cuts[0] + documents * (cuts[1] - cuts[0]) + len(parts) * (cuts[2] - cuts[1])
    own = 50_000 * (table.shape[1] - cuts[2])
    assert 0 <= least + own - plan.stats.distinct_tokens < 0.02 * own  # own ends begin alike by chance
    assert plan.stats.planned_tokens == plan.stats.distinct_tokens
    assert plan.stats.depth == 3


def test_nested_prompts_thousands_deep():
    lengths = np.random.default_rng(2).permutation(np.arange(1, 2001))
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    no_params = np.zeros(2000, dtype=np.int32)
    prompts = PromptTable(np.zeros(offsets[-1], np.int32), offsets, (SamplingParams(),), no_params, faults={})
    requests = RequestTable(np.arange(2000), no_params, np.zeros((2000, 2), dtype=np.uint64))
    plan = build_plan(prompts, requests, np.ones(2000, dtype=bool), PlanOptions(min_shared_tokens=1))
    assert plan.stats.depth == 1999
    assert plan.stats.planned_tokens == 2000


def test_two_long_rows():
    row = np.random.default_rng(3).integers(0, 9999, 300_000, dtype=np.int32)
    table = np.stack([row, row])
    table[1, 299_990] += 1
    plan = plan_table(table)
    assert plan.node_end.tolist() == [299_990, 300_000, 300_000]
