"""Where scores are read: at the end of the donors and in the node itself, without a pass for every donor between."""

from __future__ import annotations

import numpy as np

from batchllm.core import SamplingParams
from batchllm.dataset.keys import make_requests
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.score_reads import _sorted_by, plan_score_reads
from batchllm.scoring import TokenSpan, mixed_table

VOCABULARY = 1000


def planned(items, min_shared_tokens=32):
    """(plan, prompts, reads)"""
    table, scored = mixed_table(items, None, VOCABULARY)
    requests = make_requests(table, None, b"")
    plan = build_plan(table, requests, np.ones(len(requests), bool), PlanOptions(min_shared_tokens))
    return plan, table, plan_score_reads(plan, table, requests, scored)


def read_at(reads, node):
    """(position, target) → score, of one node."""
    begin, end = reads.node_ptr[node : node + 2]
    of_node = [values[begin:end].tolist() for values in reads.reads]
    assert of_node[0] == sorted(of_node[0])
    return {(position, target): score for position, target, score in zip(*of_node)}


def test_reads_do_not_grow_with_the_chain_of_donors():
    """Documents with one first token: each copies it from the one before, which copied it, too."""
    random = np.random.default_rng(0)
    spans = [TokenSpan([7, *random.integers(8, VOCABULARY, 20).tolist()], 1) for _ in range(5000)]
    plan, _, reads = planned(spans)
    assert (plan.node_copied > 0).sum() == 4999
    scored = sum(len(span.tokens) - 1 for span in spans)
    assert len(reads.row_score) == scored
    assert len(reads.reads.score) <= 2 * scored
    assert set(reads.reads.score.tolist()) == set(range(reads.num_scores))


def test_every_token_is_read_at_the_end_of_its_donors_and_in_its_own_node():
    for seed in range(60):
        random = np.random.default_rng(seed)
        heads = [random.integers(0, 3, 8).tolist() for _ in range(3)]
        items = []
        for _ in range(30):
            head = heads[random.integers(3)][: random.integers(1, 9)]
            tokens = [*head, *random.integers(0, 3, random.integers(2, 6)).tolist()]
            items.append(TokenSpan(tokens, int(random.integers(1, len(tokens)))))
            if random.random() < 0.2:
                items.append((tokens, SamplingParams(max_tokens=2)))
        plan, _, reads = planned(items, int(random.integers(1, 9)))
        node_of = {}
        for sequence, leaf in enumerate(plan.sequence_node.tolist()):
            for row in plan.request[plan.request_ptr[sequence] : plan.request_ptr[sequence + 1]].tolist():
                node_of[row] = leaf
        for row, item in enumerate(items):
            if isinstance(item, TokenSpan):
                check_row(plan, reads, row, item, node_of[row])


def check_row(plan, reads, row, span, leaf):
    for number, place in enumerate(range(span.first, len(span.tokens))):
        score, position, target = int(reads.of_row(row)[number]), place - 1, span.tokens[place]
        home = leaf
        while position < plan.node_start[home]:
            home = int(plan.node_parent[home])
        origin = home
        while position < plan.node_start[origin] + plan.node_copied[origin]:
            origin = int(plan.node_donor[origin])
        assert read_at(reads, home)[position, target] == score
        assert read_at(reads, origin)[position, target] == score


def test_reads_are_sorted_the_same_whether_or_not_they_fit_in_one_number():
    random = np.random.default_rng(2)
    node, position, target = random.integers(0, 4, (3, 200))
    expected = np.lexsort((target, position, node))
    assert _sorted_by(node, position, target).tolist() == expected.tolist()
    assert _sorted_by(node << 40, position, target << 30).tolist() == expected.tolist()
