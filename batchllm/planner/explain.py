"""What a plan comes to, for people: one flat report, from which the text and the JSON of `batchllm plan` are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchllm.core import Plan
from batchllm.planner.groups import sharing_levels

_SHOWN_PREFIXES = 10


@dataclass(frozen=True, slots=True)
class LevelReport:
    """The shared prefixes that have as many shared prefixes above them as levels come before this one."""

    prefixes: int
    sequences: int  # below them
    tokens: int  # own tokens: computed and stored once
    saved_tokens: int  # what the sequences below but one would have computed again


@dataclass(frozen=True, slots=True)
class PrefixReport:
    level: int  # 0: nothing shared above it
    sequences: int
    tokens: int  # from the beginning of the prompt
    own_tokens: int  # of these, those not shared with still more rows
    saved_tokens: int
    text: str  # the first words of its own tokens


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """A forecast for one kind of device. Without room for the weights there is none: `steps` is 0."""

    name: str
    workers: int
    seconds: float  # in which the model runs, until the last worker has ended (see planner.workers)
    steps: int  # of all workers together
    computed_tokens: int  # prompt tokens, by all workers together: each computes the prefixes that it needs
    weight_bytes: int
    kv_budget_bytes: int
    kv_peak_bytes: int  # of the worker that takes most
    failed_sequences: int  # that do not fit in KV memory
    calibrated: bool


@dataclass(frozen=True)
class PlanReport:
    """Tokens are prompt tokens where nothing else is said."""

    job: str
    model: str
    parameters: int
    rows: int
    faulty_rows: int
    requests: int  # answers owed by the rows with a prompt
    sequences: int  # streams of tokens that answer them: equal greedy requests are one
    prompt_tokens: int  # as if nothing were shared
    longest_prompt: int
    output_tokens: int  # expected
    output_source: str  # what that is based on
    sample_rows: int  # rows that are run first, so that the others are planned with their lengths
    computed_tokens: int  # by this plan
    optimum_tokens: int  # every distinct token once: the least possible
    single_level_tokens: int  # with one shared prefix a row at most, the best there are
    published_rule_tokens: int  # the same, prefixes found by BatchLLM's published rule
    reordering_saves: int  # tokens, about: what `prompt.reorder` adds to those shared
    order_reason: str  # the order in which sequences start, and why
    levels: tuple[LevelReport, ...]
    prefixes: tuple[PrefixReport, ...]  # those that save most, the most first
    shared_prefixes: int
    devices: tuple[DeviceReport, ...]
    warnings: tuple[str, ...]
    seconds: dict[str, float]  # that planning itself took, by stage

    @property
    def saved_fraction(self) -> float:
        return 1 - self.computed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def level_reports(plan: Plan) -> tuple[LevelReport, ...]:
    levels = sharing_levels(plan)
    columns = (levels.nodes, levels.sequences, levels.tokens, levels.saved_tokens)
    return tuple(LevelReport(*row) for row in zip(*(column.tolist() for column in columns)))


def biggest_prefixes(
    plan: Plan, words: Callable[[int, int, int], str], most: int = _SHOWN_PREFIXES
) -> tuple[PrefixReport, ...]:
    """`words(row, start, end)`: the text of these tokens of a row's prompt, as much of it as is shown."""
    shared = np.flatnonzero(plan.node_sequence < 0)
    own = (plan.node_end - plan.node_start)[shared].astype(np.int64)
    saved = (plan.node_leaves[shared] - 1) * own
    chosen = np.argsort(-saved, kind="stable")[:most]
    reports = []
    for index in chosen.tolist():
        node = int(shared[index])
        start, end = int(plan.node_start[node]), int(plan.node_end[node])
        reports.append(
            PrefixReport(
                level=_level(plan, node),
                sequences=int(plan.node_leaves[node]),
                tokens=end,
                own_tokens=end - start,
                saved_tokens=int(saved[index]),
                text=words(int(plan.node_row[node]), start, end),
            )
        )
    return tuple(reports)


def _level(plan: Plan, node: int) -> int:
    level = 0
    while (node := int(plan.node_parent[node])) >= 0:
        level += 1
    return level
