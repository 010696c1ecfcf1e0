"""Small tables at random, and a checker that rebuilds everything a plan promises from the tokens, slowly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchllm.core import Plan, PromptTable, RequestTable, SamplingParams

GREEDY = SamplingParams(max_tokens=7)
SAMPLED = SamplingParams(max_tokens=5, temperature=0.8)


def make_prompts(
    rows: Sequence[Sequence[int]],
    params: tuple[SamplingParams, ...] = (GREEDY,),
    params_of: Sequence[int] | None = None,
) -> PromptTable:
    """Rows without tokens become faults."""
    lengths = [len(row) for row in rows]
    return PromptTable(
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.append(0, np.cumsum(lengths)).astype(np.int64),
        params=params,
        params_of=np.array(params_of if params_of is not None else [0] * len(rows), dtype=np.int32),
        faults={i: "the prompt is empty" for i, n in enumerate(lengths) if n == 0},
    )


def make_requests(prompts: PromptTable) -> RequestTable:
    """`n` requests per row, in input order."""
    n = [prompts.params[p].n for p in prompts.params_of]
    row = np.repeat(np.arange(prompts.num_rows), n)
    sample = np.concatenate([np.arange(k) for k in n]) if n else np.empty(0)
    key = np.stack([row, sample], axis=1).astype(np.uint64) if len(row) else np.empty((0, 2), np.uint64)
    return RequestTable(row=row.astype(np.int64), sample=sample.astype(np.int32), key=key)


def random_rows(rng: np.random.Generator, rows: int, alphabet: int, depth: int) -> list[list[int]]:
    """Prompts with everything that is awkward: shared prefixes of any depth, duplicates, prefixes, empty
    rows.
    """
    made: list[list[int]] = []
    for _ in range(rows):
        tail = rng.integers(0, alphabet, size=rng.integers(0, depth + 1)).tolist()
        if made and rng.random() < 0.6:
            other = made[rng.integers(len(made))]
            kept = other[: rng.integers(0, len(other) + 1)]
            tail = kept if rng.random() < 0.3 else kept + tail
        made.append(tail)
    return made


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def prompt_of(prompts: PromptTable, row: int) -> tuple[int, ...]:
    return tuple(prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]].tolist())


def spelled_nodes(plan: Plan, prompts: PromptTable, shared: bool = False) -> list[list[int]]:
    """The tokens on the path to each node (each shared node), end to end."""
    spelled: list[list[int]] = []
    for node, parent in enumerate(plan.node_parent.tolist()):
        own = prompt_of(prompts, int(plan.node_row[node]))[plan.node_start[node] : plan.node_end[node]]
        assert len(own) == plan.node_end[node] - plan.node_start[node]
        spelled.append((spelled[parent] if parent >= 0 else []) + list(own))
    return [s for s, q in zip(spelled, plan.node_sequence) if q < 0] if shared else spelled


def trie_edges(rows: Sequence[Sequence[int]]) -> int:
    """Size of the uncompressed trie: the number of different non-empty prefixes."""
    return len({tuple(row[:i]) for row in rows for i in range(1, len(row) + 1)})


def check_plan(plan: Plan, prompts: PromptTable, requests: RequestTable, todo: np.ndarray) -> None:
    """Everything that core.Plan and build_plan promise, whatever the order and the folding."""
    _check_tree(plan)
    planned = [q for q in range(len(requests)) if todo[q] and int(requests.row[q]) not in prompts.faults]
    _check_requests(plan, prompts, requests, planned)
    path = _check_prompts(plan, prompts, requests)
    _check_copies(plan, prompts, path)
    _check_shared_and_stats(plan, prompts, requests, planned)


def _check_tree(plan: Plan) -> None:
    """Pre-order, one leaf per sequence in order, counts; a shared node has at least two children."""
    leaves = np.zeros(plan.num_nodes, dtype=np.int64)
    children = np.zeros(plan.num_nodes, dtype=np.int64)
    stack: list[int] = []
    for node, parent in enumerate(plan.node_parent.tolist()):
        while stack and stack[-1] != parent:
            stack.pop()
        assert parent == -1 or stack, "nodes are not in pre-order"
        assert plan.node_start[node] == (plan.node_end[parent] if parent >= 0 else 0)
        if parent >= 0:
            children[parent] += 1
        stack.append(node)
        if plan.node_sequence[node] >= 0:
            leaves[stack] += 1
            assert plan.node_start[node] <= plan.node_end[node]
        else:
            assert plan.node_start[node] < plan.node_end[node]
    shared = plan.node_sequence < 0
    assert (children[~shared] == 0).all()
    assert (children[shared] >= 2).all()
    np.testing.assert_array_equal(plan.node_leaves, leaves)
    np.testing.assert_array_equal(plan.node_sequence[~shared], np.arange(plan.num_sequences))
    np.testing.assert_array_equal(plan.sequence_node, np.flatnonzero(~shared))


def _check_requests(plan: Plan, prompts: PromptTable, requests: RequestTable, planned: list[int]) -> None:
    """Each planned request in one sequence; together exactly when greedy with equal prompt and parameters."""
    assert sorted(plan.request.tolist()) == planned
    seen = set()
    for s in range(plan.num_sequences):
        members = plan.request[plan.request_ptr[s] : plan.request_ptr[s + 1]].tolist()
        assert members == sorted(members)
        assert members
        kinds = set()
        for q in members:
            row = int(requests.row[q])
            params = int(prompts.params_of[row])
            own = -1 if prompts.params[params].greedy else q
            kinds.add((prompt_of(prompts, row), params, own))
            assert plan.sequence_params[s] == params
        assert len(kinds) == 1
        assert not kinds & seen
        seen |= kinds


def _check_prompts(plan: Plan, prompts: PromptTable, requests: RequestTable) -> list[list[int]]:
    """Every prompt is the concatenation of its path; returns the tokens on the path to each node."""
    spelled = spelled_nodes(plan, prompts)
    for s, leaf in enumerate(plan.sequence_node.tolist()):
        for q in plan.request[plan.request_ptr[s] : plan.request_ptr[s + 1]]:
            assert tuple(spelled[leaf]) == prompt_of(prompts, int(requests.row[q]))
    return spelled


def _check_copies(plan: Plan, prompts: PromptTable, spelled: list[list[int]]) -> None:
    """What is copied is what the donor itself holds; tokens whose logits are read are never copied."""
    last_child: dict[int, int] = {}
    for node, parent in enumerate(plan.node_parent.tolist()):
        start, own = int(plan.node_start[node]), int(plan.node_end[node] - plan.node_start[node])
        copied, donor = int(plan.node_copied[node]), int(plan.node_donor[node])
        assert (copied > 0) == (donor >= 0)
        assert 0 <= copied < max(own, 1)
        if donor >= 0:
            assert donor == last_child[parent], "the donor is the previous sibling"
            assert plan.node_start[donor] == start
            assert copied <= plan.node_end[donor] - start, "the donor holds these tokens itself"
            while donor >= 0:  # every donor further back that has copied as much holds the tokens too
                assert spelled[node][start : start + copied] == spelled[donor][start : start + copied]
                donor = int(plan.node_donor[donor]) if plan.node_copied[donor] >= copied else -1
        last_child[parent] = node


def _check_shared_and_stats(
    plan: Plan, prompts: PromptTable, requests: RequestTable, planned: list[int]
) -> None:
    rows = [prompt_of(prompts, int(requests.row[q])) for q in planned]
    computed = int((plan.node_end - plan.node_start - plan.node_copied).sum())
    before: tuple[int, ...] = ()
    for s in range(plan.num_sequences):
        first, *others = plan.request[plan.request_ptr[s] : plan.request_ptr[s + 1]].tolist()
        prompt = prompt_of(prompts, int(requests.row[first]))
        assert plan.request_shared[first] == common_prefix(before, prompt)
        assert all(plan.request_shared[q] == len(prompt) for q in others)
        before = prompt
    unplanned = np.ones(len(requests), dtype=bool)
    unplanned[planned] = False
    assert not plan.request_shared[unplanned].any()
    stats = plan.stats
    assert stats.requests == len(planned)
    assert stats.sequences == plan.num_sequences
    assert stats.shared_nodes == int((plan.node_sequence < 0).sum())
    assert stats.prompt_tokens == sum(map(len, rows))
    assert stats.distinct_tokens == trie_edges(rows)
    assert stats.planned_tokens == computed == stats.distinct_tokens
    assert stats.planned_tokens == stats.prompt_tokens - int(plan.request_shared.sum())
    assert stats.depth == _shared_depth(plan)


def _shared_depth(plan: Plan) -> int:
    depth: list[int] = []
    for node, parent in enumerate(plan.node_parent.tolist()):
        depth.append((depth[parent] if parent >= 0 else 0) + int(plan.node_sequence[node] < 0))
    return max(depth, default=0)
