"""A plan written and read back is the same plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
from planner_oracle import make_prompts, make_requests, random_rows
from test_plan import random_job

from batchllm.planner import PlanOptions, build_plan
from batchllm.planner.plan_file import read_plan, write_plan


def test_random_plans_come_back(tmp_path):
    rng = np.random.default_rng(0)
    for case in range(40):
        prompts, requests, todo = random_job(rng, case)
        plan = build_plan(prompts, requests, todo, PlanOptions(min_shared_tokens=2))
        write_plan(plan, tmp_path / "plan.parquet")
        back = read_plan(tmp_path / "plan.parquet")
        for field in dataclasses.fields(plan):
            mine, theirs = getattr(plan, field.name), getattr(back, field.name)
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
            if field.name != "stats":
                assert mine.dtype == theirs.dtype, field.name
    assert [file.name for file in tmp_path.iterdir()] == ["plan.parquet"]


def test_a_row_is_a_node(tmp_path):
    prompts = make_prompts(random_rows(np.random.default_rng(1), 12, 2, 9))
    requests = make_requests(prompts)
    plan = build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(min_shared_tokens=1))
    write_plan(plan, tmp_path / "plan.parquet")
    table = pq.read_table(tmp_path / "plan.parquet").to_pylist()
    assert len(table) == plan.num_nodes
    for node, row in enumerate(table):
        assert row["start"] == plan.node_start[node]
        assert (row["params"] is None) == (row["sequence"] < 0) == (row["requests"] == [])
    assert sorted(q for row in table for q in row["requests"]) == sorted(plan.request.tolist())


def test_another_parquet_file_is_no_plan(tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is not a plan"):
        read_plan(tmp_path / "other.parquet")
