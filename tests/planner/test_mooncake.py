"""The Mooncake trace planned from its block hashes, and a part of it simulated. All of it: see benchmarks.mooncake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from batchllm.planner.plan import arrange
from benchmarks.mooncake import BLOCK, Trace, choose, draft_trace, load_trace

TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "mooncake" / "conversation_trace.jsonl"
needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="there is no ../shared/data/mooncake here")


def test_blocks_are_stretched_to_tokens():
    """Two prompts share a block and part in their second; a third repeats the first, partial block and all."""
    trace = Trace([[7, 8], [7, 9, 10], [7, 8]], np.array([700, 1500, 700]), np.array([5, 6, 7]))
    plan = arrange(draft_trace(trace), "tree")
    assert plan.num_sequences == 3
    assert sorted(zip(plan.node_start.tolist(), plan.node_end.tolist())) == [
        *[(0, 512), (512, 700), (512, 1500)],
        *[(700, 700), (700, 700)],
    ]
    assert plan.stats.prompt_tokens == 2900
    assert plan.stats.planned_tokens == plan.stats.distinct_tokens == 1688


@needs_trace
def test_the_share_of_blocks_is_the_stated_one():
    trace = load_trace(TRACE)
    distinct = len({block for blocks in trace.blocks for block in blocks})
    assert round(1 - distinct / sum(map(len, trace.blocks)), 3) == 0.366
    draft = draft_trace(trace)
    # A true prefix tree: as many nodes' blocks as there are hashes.
    blocks = -(-(draft.tree.end - draft.tree.start) // BLOCK)
    assert int(blocks.sum()) == distinct


@needs_trace
def test_the_chosen_order_is_never_worse_than_tree_order():
    trace = load_trace(TRACE)
    for low, high in ((0, 700), (5000, 5700)):
        part = Trace(trace.blocks[low:high], trace.input_tokens[low:high], trace.output_tokens[low:high])
        choice = choose(draft_trace(part), "h200", 8192)
        tree = choice.predictions["tree"]
        assert choice.predictions[choice.order].seconds <= tree.seconds
        assert tree.peak_kv_tokens <= 1_000_000
        for prediction in choice.predictions.values():
            assert prediction.prompt_tokens >= choice.plan.stats.distinct_tokens
            assert dataclasses.astuple(prediction)[0] > 0
