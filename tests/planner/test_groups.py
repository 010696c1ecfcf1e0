"""Group and level figures against sums over the plan's nodes."""

from __future__ import annotations

import numpy as np
from planner_oracle import make_prompts, make_requests, random_rows

from batchllm.planner import PlanOptions, build_plan, sharing_levels, top_groups


def test_figures_of_random_plans():
    rng = np.random.default_rng(8)
    for _ in range(200):
        prompts = make_prompts(random_rows(rng, int(rng.integers(0, 16)), 3, 10))
        requests = make_requests(prompts)
        plan = build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(2))
        check_groups(plan)
        check_levels(plan)


def check_groups(plan):
    groups = top_groups(plan)
    top = [v for v in range(plan.num_nodes) if plan.node_parent[v] < 0 and plan.node_sequence[v] < 0]
    assert groups.node.tolist() == top
    for i, node in enumerate(top):
        below = [s for s in range(plan.num_sequences) if root(plan, plan.sequence_node[s]) == node]
        requests = [q for s in below for q in plan.request[plan.request_ptr[s] : plan.request_ptr[s + 1]]]
        assert groups.sequences[i] == len(below)
        assert groups.requests[i] == len(requests)
        assert groups.prefix_tokens[i] == plan.node_end[node]
        assert groups.saved_tokens[i] == plan.request_shared[requests].sum()


def check_levels(plan):
    levels = sharing_levels(plan)
    shared = np.flatnonzero(plan.node_sequence < 0)
    depth = np.array([len(path(plan, node)) - 1 for node in shared])
    own = (plan.node_end - plan.node_start)[shared]
    assert len(levels.nodes) == plan.stats.depth
    for level in range(plan.stats.depth):
        here = depth == level
        assert levels.nodes[level] == here.sum()
        assert levels.sequences[level] == plan.node_leaves[shared[here]].sum()
        assert levels.tokens[level] == own[here].sum()
        assert levels.saved_tokens[level] == (own * (plan.node_leaves[shared] - 1))[here].sum()


def path(plan, node):
    nodes = [int(node)]
    while plan.node_parent[nodes[-1]] >= 0:
        nodes.append(int(plan.node_parent[nodes[-1]]))
    return nodes


def root(plan, node):
    return path(plan, node)[-1]
