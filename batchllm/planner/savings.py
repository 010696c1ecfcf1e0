"""Prompt tokens that would be computed under each way of sharing, for reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.planner.plan import PlanDraft
from batchllm.planner.single_level import best_groups, first_level_groups, published_groups


@dataclass(frozen=True, slots=True)
class ComputedTokens:
    """Prompt tokens computed; what is saved is the difference to `nothing_shared`."""

    nothing_shared: int
    first_level: int  # only what the prompts with one first token have in common
    published_rule: int  # groups of one prefix, BatchLLM's rule
    best_single_level: int  # groups of one prefix, the best there are
    kept_nodes: int  # this plan's nodes of several levels, without what is copied
    optimum: int  # every edge of the trie once: what this plan computes

    def saved_share(self, computed: int) -> float:
        return 1.0 - computed / max(1, self.nothing_shared)


def computed_tokens(draft: PlanDraft) -> ComputedTokens:
    """Of the draft's requests. Those that one sequence answers count as prompts of their own where nothing says so."""
    tree, kept, sequences = draft.tree, draft.kept, draft.sequences
    requests = np.diff(sequences.request_ptr)
    ending = np.bincount(draft.terminal, weights=requests, minlength=tree.num_nodes).astype(np.int64)
    every = int((ending * tree.end).sum())
    depth_above = np.append(tree.end, 0)  # the last entry answers for "none"
    shared = np.flatnonzero(kept.kept)
    parent = tree.parent[shared]
    above = np.where(parent >= 0, kept.anchor[parent], -1)
    own = tree.end[draft.terminal] - depth_above[kept.anchor[draft.terminal]]
    return ComputedTokens(
        nothing_shared=every,
        first_level=every - first_level_groups(tree, ending).saved_tokens,
        published_rule=every - published_groups(tree, ending).saved_tokens,
        best_single_level=every - best_groups(tree, ending).saved_tokens,
        kept_nodes=int((tree.end[shared] - depth_above[above]).sum() + own.sum()),
        optimum=tree.distinct_tokens,
    )
