"""What a run did, in figures: `OUT/_run/metrics.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from batchllm.durable import write_bytes
from batchllm.versions import versions


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Rows are answers (`n` for every input row). Tokens are those of the answers made by this run."""

    rows_ok: int  # in the result, with those of earlier runs
    rows_error: int  # in the result: rows whose `error` says why there is no answer
    rows_resumed: int  # of both, taken over from earlier runs
    prompt_tokens: int  # as if nothing were shared
    prompt_tokens_computed: int  # what went through the model, recomputed ones as often as they did
    distinct_prompt_tokens: int  # the least that had to be computed: edges of the token trie
    output_tokens: int
    steps: int
    wall_seconds: float
    seconds: Mapping[str, float]  # by stage: load, tokenize, plan, run (prefill and decode), write
    kv_budget_bytes: int
    kv_peak_bytes: int
    rss_peak_bytes: int
    preemptions: int = 0
    prompt_tokens_saved_by_reordering: int = 0  # about, over all rows of the input: by prompt.reorder
    mean_output_tokens: float = 0.0  # of a sequence: one stream of tokens, however many rows it answers
    predicted: Mapping[str, float] = field(default_factory=dict)  # by the plan, under the names used here
    # Expected against actual output tokens of sequences, as `planned` and as `refreshed` while the job ran, just before
    # each ended: mean_expected, mean_absolute_error, bias (see planner.length_errors).
    length_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Where the job reuses stored chunks: tokens placed and repaired, bytes read, seconds of loading and waiting, and
    # with lossy reuse `quality`: a sample of answers against a full computation (see chunkcache.answer_quality).
    chunks: Mapping[str, Any] = field(default_factory=dict)
    without_kernels: str | None = None  # why a run on a CPU did without the kernels in C
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def saved_fraction(self) -> float:
        """Share of the prompt tokens that did not have to be computed; negative if more was recomputed."""
        return 1 - self.prompt_tokens_computed / self.prompt_tokens if self.prompt_tokens else 0.0


def write_metrics(path: Path, metrics: RunMetrics) -> None:
    """Writes the file atomically. A figure that is no number is written as null."""
    values = {f.name: getattr(metrics, f.name) for f in fields(metrics)}
    values["saved_fraction"] = metrics.saved_fraction
    write_bytes(path, (json.dumps(_plain(values), indent=2, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    """Mappings to dicts, numpy's numbers to Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
