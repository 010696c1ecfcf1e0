"""What `prompt.reorder` would save for a job that does not ask for it: a look at the first rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from batchllm.dataset.prompts import PromptPlan
from batchllm.dataset.reader import InputData
from batchllm.dataset.reorder import FreePart, collect_items, is_list
from batchllm.errors import JobError
from batchllm.job import JobSpec, PromptSpec
from batchllm.planner.field_order import ReorderGain, estimate_reorder_gain

_ROWS = 20_000


@dataclass(frozen=True)
class PossibleReordering:
    """`gain` is in characters, and of the first rows only: more rows share more."""

    reorder: str | tuple[str, ...]  # what prompt.reorder would have to be
    gain: ReorderGain


def possible_reordering(job: JobSpec, data: InputData, most_rows: int = _ROWS) -> PossibleReordering | None:
    """The list column, or the columns of a template, that would save most if they were free; None: nothing would.

    Whether their order may be changed at all is for the user to say.
    """
    if job.prompt.reorder is not None or job.prompt.column is not None or not data.schema.names:
        return None
    found = [
        PossibleReordering(free.columns[0] if free.is_list else free.columns, gain)
        for free in _candidates(job.prompt, data.schema)
        if (gain := estimate_reorder_gain(collect_items(free, data, most_rows))).gain > 0
    ]
    return max(found, key=lambda possible: possible.gain.gain, default=None)


def _candidates(prompt: PromptSpec, schema: pa.Schema) -> Iterator[FreePart]:
    plan = PromptPlan(prompt, schema, "job")
    for name in plan.columns:
        if is_list(schema.field(name).type):
            freed = PromptPlan(prompt.model_copy(update={"reorder": name}), schema, "job").free
            if freed is not None:
                yield freed
    fields = [name for name in plan.columns_in_order() if not is_list(schema.field(name).type)]
    if len(fields) > 1:
        try:
            yield FreePart(tuple(fields), schema, "job")
        except JobError:  # a column is named `fields`
            return
