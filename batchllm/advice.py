"""What a person could change before a job runs, each as one sentence with its figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchllm.core import Plan, PromptTable
from batchllm.dataset.reorder_gain import PossibleReordering
from batchllm.dataset.template_parts import template_parts
from batchllm.job import JobSpec
from batchllm.planner.explain import DeviceReport
from batchllm.planner.lengths import LengthEstimator

_WORTH_SAYING = 0.05  # of the prompt tokens
_LONG_HEAD = 32  # tokens; shorter ones are not missed
_MUCH_TOO_LONG = 4  # times what nearly all answers need
_COMPARED_ROWS = 256


@dataclass(frozen=True)
class Situation:
    """What advice is given about."""

    job: JobSpec
    tokenizer: Any
    prompts: PromptTable
    plan: Plan
    lengths: LengthEstimator
    max_length: int | None  # of the model
    devices: tuple[DeviceReport, ...]
    reordering: PossibleReordering | None = None  # what prompt.reorder could be, when the job has none
    of_model: tuple[str, ...] = ()  # sentences about the model


def advice(situation: Situation) -> tuple[str, ...]:
    """All that applies, in the order of what it costs not to know."""
    return tuple(sentence for rule in _RULES for sentence in rule(situation))


def _rows_without_prompt(case: Situation) -> Iterator[str]:
    faults = case.prompts.faults
    if faults:
        reason, count = Counter(faults.values()).most_common(1)[0]
        others = f" (and {len(faults) - count:,} for other reasons)" if count < len(faults) else ""
        yield f"{len(faults):,} rows cannot be answered; {count:,} because {reason}{others}."


def _memory(case: Situation) -> Iterator[str]:
    for device in case.devices:
        if device.kv_budget_bytes <= 0:
            yield f"The model's weights do not fit on {device.name}: use a smaller dtype or a larger device."
        elif device.failed_sequences:
            yield (
                f"{device.failed_sequences:,} prompts do not fit in the KV memory of {device.name}; raise "
                f"engine.kv_memory or shorten them."
            )


def _model(case: Situation) -> Iterator[str]:
    yield from case.of_model


def _cut_answers(case: Situation) -> Iterator[str]:
    if case.max_length is None:
        return
    limits = np.array([params.max_tokens for params in case.prompts.params], dtype=np.int64)
    length = np.diff(case.prompts.offsets)
    cut = (length + limits[case.prompts.params_of] > case.max_length) & (length > 0)
    cut[list(case.prompts.faults)] = False
    if cut.any():
        yield (
            f"{int(cut.sum()):,} rows leave room for fewer than max_tokens output tokens: the model takes "
            f"{case.max_length:,} tokens in all."
        )


def _variable_first(case: Situation) -> Iterator[str]:
    parts = template_parts(case.job.prompt)
    if parts is None or parts.first is None or case.plan.stats.sequences < 2:
        return
    missed = _tokens(case, parts.after) * (case.plan.stats.sequences - 1)
    share = missed / max(1, case.plan.stats.prompt_tokens)
    if share < _WORTH_SAYING or _saved(case) >= share:
        return
    yield (
        f"{{{{ {parts.first} }}}} comes before {len(parts.after):,} characters of the template that are the same "
        f"in every row; put those first and {share:.0%} of the prompt tokens are shared instead of {_saved(case):.0%}."
    )


def _differing_heads(case: Situation) -> Iterator[str]:
    """A chat template that writes a date or an id before what the rows have in common."""
    template = str(getattr(case.tokenizer, "chat_template", None) or "")
    parts = template_parts(case.job.prompt)
    if case.job.prompt.text is not None:
        return
    if parts is not None and parts.first is not None:
        head = _tokens(case, parts.before)
        common = common_prefix(case.prompts)
        if head >= _LONG_HEAD and common < head // 2 and case.plan.stats.sequences > 1:
            yield (
                f"All rows begin with the same {head:,} tokens of messages, yet their prompts have only {common:,} in "
                f"common: the chat template puts something that differs (a date, an id) in front; fix it with "
                f"prompt.template_args."
            )
            return
    if "strftime_now" in template and "date_string" not in case.job.prompt.template_args:
        yield (
            "The chat template writes today's date into every prompt: run on another day, no finished answer "
            "is found again. Give it a fixed one in prompt.template_args (date_string, in most templates)."
        )


def _max_tokens_too_high(case: Situation) -> Iterator[str]:
    for index, params in enumerate(case.prompts.params):
        needed = case.lengths.quantile(index, 0.99)
        if needed is not None and params.max_tokens >= _MUCH_TOO_LONG * needed and params.max_tokens > 32:
            yield (
                f"generate.max_tokens is {params.max_tokens:,}, and 99% of the earlier answers have at most "
                f"{needed:,} tokens: a lower limit bounds what a runaway answer costs."
            )
            return


def _order_of_fields(case: Situation) -> Iterator[str]:
    found = case.reordering
    if found is not None and found.gain.gained_share >= _WORTH_SAYING:
        names = found.reorder if isinstance(found.reorder, str) else f"[{', '.join(found.reorder)}]"
        yield (
            f"If their order may change, prompt.reorder: {names} would share {found.gain.gained_share:.0%} more of "
            f"their text."
        )


_RULES: tuple[Callable[[Situation], Iterator[str]], ...] = (
    _rows_without_prompt,
    _memory,
    _model,
    _cut_answers,
    _variable_first,
    _differing_heads,
    _max_tokens_too_high,
    _order_of_fields,
)


def common_prefix(prompts: PromptTable) -> int:
    """Tokens that a sample of the prompts, taken evenly, all begin with."""
    rows = np.flatnonzero(np.diff(prompts.offsets) > 0)
    if not len(rows):
        return 0
    sample = rows[np.linspace(0, len(rows) - 1, min(_COMPARED_ROWS, len(rows))).astype(np.int64)]
    common = np.asarray(_prompt(prompts, int(sample[0])))
    for row in sample[1:].tolist():
        other = _prompt(prompts, row)[: len(common)]
        differs = np.flatnonzero(common[: len(other)] != other)
        common = common[: int(differs[0]) if len(differs) else len(other)]
    return len(common)


def _prompt(prompts: PromptTable, row: int) -> np.ndarray:
    return prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]]


def _tokens(case: Situation, text: str) -> int:
    return len(case.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0


def _saved(case: Situation) -> float:
    stats = case.plan.stats
    return 1 - stats.planned_tokens / max(1, stats.prompt_tokens)
