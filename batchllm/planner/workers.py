"""A plan divided among workers that share nothing but the work, to foretell what several devices come to."""

from __future__ import annotations

import numpy as np

from batchllm.core import IntArray, Plan
from batchllm.planner.sample import part_of


def divided(plan: Plan, output_tokens: IntArray, workers: int) -> list[Plan]:
    """A plan for each worker; fewer where there are not enough sequences, one at least.

    Everyone takes a stretch of the plan with about as many tokens to compute as the others', prompts and expected
    outputs (`output_tokens` [sequences]) alike, so that most prefixes are needed by one worker only. A prefix with
    sequences on several is computed by each of them.
    """
    if workers == 1 or plan.num_sequences == 0:
        return [plan]
    work = _first_computed(plan) + output_tokens
    middle = np.cumsum(work) - work / 2
    worker = (middle * workers / work.sum()).astype(np.int64)
    return [part_of(plan, worker == number) for number in np.unique(worker)]


def _first_computed(plan: Plan) -> IntArray:
    """[sequences] prompt tokens that are computed for each, those of its new nodes."""
    own = plan.node_end - plan.node_start - plan.node_copied
    first = np.searchsorted(plan.sequence_node, np.arange(plan.num_nodes))
    return np.bincount(first, weights=own, minlength=plan.num_sequences).astype(np.int64)
