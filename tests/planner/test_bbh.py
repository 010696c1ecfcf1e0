"""BIG-Bench-Hard as 3-shot prompts: real sharing, shuffled. Skipped where the shared data folder is absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planner_oracle import GREEDY

from batchllm.core import PromptTable, RequestTable
from batchllm.planner import PlanOptions, build_plan, top_groups

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TOKENIZER = DATA / "tokenizers" / "phi-3-mini" / "tokenizer.json"
TASKS = sorted((DATA / "bbh" / "tasks").glob("*.json"))
ROWS_PER_TASK = 25  # all 250 give the same picture and take most of a minute to tokenise


def shots_of(task: Path) -> str:
    text = (DATA / "bbh" / "cot-prompts" / f"{task.stem}.txt").read_text(encoding="utf-8")
    _canary, shots = text.split("-----\n", 1)
    return shots.rstrip("\n")


def bbh_prompts(rows_per_task: int) -> list[str]:
    prompts = []
    for task in TASKS:
        shots = shots_of(task)
        for example in json.loads(task.read_text(encoding="utf-8"))["examples"][:rows_per_task]:
            question = f"\n\nQ: {example['input']}\nA: Let's think step by step."
            prompts.append(shots + question)
    return prompts


def tokenized(prompts: list[str]) -> PromptTable:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    order = np.random.default_rng(0).permutation(len(prompts))
    rows = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch_fast([prompts[i] for i in order])]
    offsets = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64)
    params_of = np.zeros(len(rows), dtype=np.int32)
    return PromptTable(np.concatenate(rows), offsets, (GREEDY,), params_of, faults={})


@pytest.mark.skipif(not (TASKS and TOKENIZER.exists()), reason="../shared/data has no bbh and phi-3-mini")
def test_every_shared_token_is_computed_once():
    prompts = tokenized(bbh_prompts(ROWS_PER_TASK))
    rows = prompts.num_rows
    key = np.stack([np.arange(rows), np.zeros(rows)], axis=1).astype(np.uint64)
    requests = RequestTable(np.arange(rows), np.zeros(rows, dtype=np.int32), key)
    plan = build_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions(min_shared_tokens=32))
    assert plan.stats.planned_tokens <= 1.01 * plan.stats.distinct_tokens
    groups = top_groups(plan)
    assert len(groups.node) == len({shots_of(task) for task in TASKS})  # a group for each set of shots
    assert groups.requests.sum() == rows
    assert groups.saved_tokens.sum() > 0.85 * plan.stats.prompt_tokens
