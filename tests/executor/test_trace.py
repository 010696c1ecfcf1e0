"""The record of every step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from batchllm.core import SamplingParams
from batchllm.executor.trace import StepTrace, load_trace
from batchllm.planner.lengths import LengthEstimator
from tests.executor.harness import Outcome, run
from tests.executor.tiny_models import configurations, make_model

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, number] for number in range(10, 22)]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


class Optimist(LengthEstimator):
    """Foresees one token only, so that memory runs out."""

    def estimate(
        self, params: np.ndarray, decoded: np.ndarray, limits: np.ndarray, group: np.ndarray | None = None
    ) -> np.ndarray:
        return np.ones(len(decoded), dtype=np.int64)


def traced(**options: Any) -> tuple[StepTrace, Outcome]:
    trace = StepTrace()
    model = make_model(configurations()["llama"])
    return trace, run(model, PROMPTS, PARAMS, max_step_tokens=24, trace=trace, **options)


def test_every_step_and_every_token_is_recorded() -> None:
    started = time.perf_counter()
    trace, outcome = traced(kv_tokens=110, estimator=Optimist())
    took = time.perf_counter() - started
    stats, records = outcome.stats, trace.records
    assert len(records) == stats.steps
    assert sum(record.prompt_tokens for record in records) == stats.prompt_tokens_computed
    assert sum(record.recomputed_tokens for record in records) == stats.recomputed_tokens > 0
    assert sum(record.samples for record in records) == stats.output_tokens
    assert max(record.tokens for record in records) <= 24
    assert max(record.kv_tokens for record in records) == stats.kv_tokens_peak
    assert max(record.waiting for record in records) > 0 == records[-1].waiting
    assert all(record.running for record in records)
    parts = ("schedule", "prepare", "forward", "sample", "absorb", "other")
    seconds = sum(getattr(record, f"{part}_seconds") for record in records for part in parts)
    assert trace.forward_seconds < seconds < took


def test_a_step_half_empty_while_sequences_wait_is_a_valley() -> None:
    ample, _ = traced(kv_tokens=4096)
    scarce, _ = traced(kv_tokens=40)
    assert ample.valleys == 0
    assert scarce.valleys == sum(record.waiting > 0 and record.tokens < 12 for record in scarce.records) > 0


def test_a_trace_is_kept_as_parquet(tmp_path: Path) -> None:
    trace, _ = traced()
    trace.save(tmp_path / "trace.parquet")
    assert load_trace(tmp_path / "trace.parquet") == trace.records
    assert np.isfinite(trace.forward_seconds)
