"""Groups of one prefix: the optimum against all choices, the published rule against a plain tree of objects."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_oracle import common_prefix, make_prompts, make_requests, random_rows

from batchllm.planner import PlanOptions
from batchllm.planner.plan import arrange, draft_plan
from batchllm.planner.prefix_tree import PrefixTree, build_prefix_tree
from batchllm.planner.savings import computed_tokens
from batchllm.planner.single_level import best_groups, first_level_groups, published_groups

PROMPTS = st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=12)
# The same letters many times over, so that stretches are long enough for choices to matter.
STRETCHED = st.tuples(PROMPTS, st.lists(st.integers(1, 9), min_size=7, max_size=7)).map(
    lambda made: ["".join(c * n for c, n in zip(prompt, made[1])) for prompt in made[0]]
)


def trie_of(prompts: list[str]) -> tuple[PrefixTree, np.ndarray]:
    rows = sorted(set(prompts))
    lcp = [0, *(common_prefix(a, b) for a, b in pairwise(rows))]
    tree = build_prefix_tree(np.array(lcp, np.int64), np.array([len(row) for row in rows], np.int64))
    ending = np.zeros(tree.num_nodes, dtype=np.int64)
    np.add.at(ending, tree.terminal, [prompts.count(row) for row in rows])
    return tree, ending


def saved_by(tree, ending, chosen) -> int:
    """What a set of prefixes saves, by the definition."""
    saved = -sum(int(tree.end[node]) for node in chosen)
    for node in range(tree.num_nodes):
        above = node
        while above >= 0 and above not in chosen:
            above = int(tree.parent[above])
        saved += int(ending[node]) * (int(tree.end[above]) if above >= 0 else 0)
    return saved


def most_saved(tree, ending) -> int:
    nodes = [n for n in range(tree.num_nodes) if tree.below[n] > n + 1 or ending[n] > 1]
    return max(
        saved_by(tree, ending, set(chosen))
        for count in range(len(nodes) + 1)
        for chosen in itertools.combinations(nodes, count)
    )


def check_groups(tree, ending, groups) -> None:
    """What is said to be saved is what the members save."""
    assert (groups.members >= 2).all()
    members = np.zeros(len(groups.node), dtype=np.int64)
    for node in range(tree.num_nodes):
        group = groups.group[node]
        if group >= 0:
            members[group] += ending[node]
            assert groups.node[group] <= node < tree.below[groups.node[group]], "the prefix is none of it"
    assert members.tolist() == groups.members.tolist()
    assert groups.prefix_tokens.tolist() == tree.end[groups.node].tolist()
    assert groups.saved_tokens == int(((members - 1) * groups.prefix_tokens).sum())


@settings(max_examples=2000, deadline=None)
@given(STRETCHED)
def test_the_optimum_is_the_best_of_all_choices(prompts):
    tree, ending = trie_of(prompts)
    groups = best_groups(tree, ending)
    check_groups(tree, ending, groups)
    assert groups.saved_tokens == most_saved(tree, ending)


@settings(max_examples=2000, deadline=None)
@given(STRETCHED)
def test_the_published_rule_is_that_of_a_tree_of_objects(prompts):
    tree, ending = trie_of(prompts)
    groups = published_groups(tree, ending)
    check_groups(tree, ending, groups)
    found = sorted(zip(groups.prefix_tokens.tolist(), groups.members.tolist()))
    assert found == published_by_objects(prompts)
    assert groups.saved_tokens <= best_groups(tree, ending).saved_tokens


@dataclass(eq=False)
class Segment:
    text: str
    children: list[Segment] = field(default_factory=list)

    @property
    def leaves(self) -> int:
        return sum(child.leaves for child in self.children) if self.children else 1


def insert(root: Segment, prompt: str) -> None:
    for child in root.children:
        n = common_prefix(child.text, prompt)
        if n and n < len(child.text):
            child.children = [Segment(child.text[n:], child.children)]
            child.text = child.text[:n]
        if n:
            return insert(child, prompt[n:])
    if prompt:
        root.children.append(Segment(prompt, [Segment("")]))
    else:
        root.children.append(Segment(""))


def enlarge(node: Segment) -> None:
    siblings = []
    for child in node.children:
        if not child.children:
            siblings.append(child)
            continue
        enlarge(child)
        promoted = [g for g in child.children if (g.leaves - 1) * len(g.text) > len(child.text)]
        child.children = [g for g in child.children if g not in promoted]
        left = len(child.children)
        for grandchild in promoted:
            grandchild.text = child.text + grandchild.text
        if left == 1:
            only = child.children[0]
            child.text, child.children = child.text + only.text, only.children
        siblings += promoted + ([child] if left else [])
    node.children = siblings


def published_by_objects(prompts) -> list[tuple[int, int]]:
    """(prefix length, members) of the groups."""
    root = Segment("")
    for prompt in prompts:
        insert(root, prompt)
    enlarge(root)
    return sorted((len(c.text), c.leaves) for c in root.children if c.leaves > 1)


def test_a_long_second_level_is_taken_with_the_first():
    """Two documents of ten tokens under a system prompt of two, three questions each: (3 - 1) * 10 > 2."""
    prompts = [f"ss{document * 10}{question}" for document in "ab" for question in "xyz"]
    tree, ending = trie_of(prompts)
    assert first_level_groups(tree, ending).saved_tokens == 5 * 2
    for groups in (published_groups(tree, ending), best_groups(tree, ending)):
        assert sorted(groups.prefix_tokens.tolist()) == [12, 12]
        assert groups.members.tolist() == [3, 3]
        assert groups.saved_tokens == 2 * 2 * 12


def test_a_long_first_level_stays():
    prompts = ["s" * 50 + document * 3 + question for document in "ab" for question in "xyz"]
    tree, ending = trie_of(prompts)
    for groups in (published_groups(tree, ending), best_groups(tree, ending)):
        assert groups.prefix_tokens.tolist() == [50]
        assert groups.members.tolist() == [6]


def test_the_rule_may_miss_the_optimum():
    """Only one grandchild at a time is looked at: two that would pay together do not move."""
    found = []
    rng = np.random.default_rng(0)
    for _ in range(300):
        widths = rng.integers(1, 12, size=7)
        words = ["".join("ab"[rng.integers(2)] * n for n in widths[: rng.integers(2, 8)]) for _ in range(10)]
        tree, ending = trie_of(words)
        found.append(best_groups(tree, ending).saved_tokens - published_groups(tree, ending).saved_tokens)
    assert min(found) >= 0
    assert max(found) > 0


@pytest.mark.parametrize("width", [1, 3])
def test_a_hundred_thousand_levels(width):
    """Prompts of 1, 2, 3 ... stretches: as deep as there are prompts, without recursion."""
    lengths = np.arange(1, 100_001) * width
    tree = build_prefix_tree(np.append(0, lengths[:-1]), lengths)
    ending = np.ones(tree.num_nodes, dtype=np.int64)
    rule, best = published_groups(tree, ending), best_groups(tree, ending)
    assert 0 < rule.saved_tokens <= best.saved_tokens < int(lengths.sum()) - tree.distinct_tokens


def test_nothing_and_one():
    for prompts, nodes in (([], 0), (["a"], 1)):
        tree = build_prefix_tree(np.zeros(nodes, np.int64), np.ones(nodes, np.int64))
        ending = np.ones(nodes, dtype=np.int64)
        for groups in (best_groups, published_groups, first_level_groups):
            assert groups(tree, ending).saved_tokens == 0, prompts


def test_savings_of_all_ways_on_random_tables():
    rng = np.random.default_rng(5)
    for _ in range(200):
        rows = random_rows(rng, int(rng.integers(0, 14)), int(rng.integers(1, 4)), int(rng.integers(1, 12)))
        prompts = make_prompts(rows)
        requests = make_requests(prompts)
        options = PlanOptions(min_shared_tokens=int(rng.integers(1, 6)))
        draft = draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), options)
        found, plan = computed_tokens(draft), arrange(draft, "tree")
        assert found.nothing_shared == plan.stats.prompt_tokens
        assert found.optimum == plan.stats.planned_tokens
        assert found.kept_nodes == int((plan.node_end - plan.node_start).sum())
        assert found.optimum <= found.kept_nodes
        assert found.optimum <= found.best_single_level <= found.published_rule <= found.nothing_shared
        assert found.best_single_level <= found.first_level
