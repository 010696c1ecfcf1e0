"""A record of every step: what it computed, what memory it held, where its time went."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from batchllm.executor.step import StepBatch

PARTS = ("schedule", "prepare", "forward", "sample", "absorb")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. Seconds are wall time; all of them together are the time from the end of the step before."""

    prompt_tokens: int  # that went through the model for the first time
    decode_tokens: int  # fed for the first time
    recomputed_tokens: int  # fed again after a sequence had stepped back
    samples: int
    running: int  # sequences that held memory while the step ran
    waiting: int  # sequences that had not started, or wait to come back
    budget_tokens: int  # most tokens a step may have
    kv_tokens: int  # slots of the pool in use while the step ran
    schedule_seconds: float
    prepare_seconds: float  # what to read is worked out, before the forward pass
    forward_seconds: float  # the model's forward pass, and greedy tokens chosen without all logits
    sample_seconds: float
    absorb_seconds: float
    other_seconds: float  # what the caller did since the step before, and the rest

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.decode_tokens + self.recomputed_tokens

    @property
    def is_valley(self) -> bool:
        """Less than half full although sequences waited."""
        return self.waiting > 0 and 2 * self.tokens < self.budget_tokens


class StepTrace:
    """Given to an Engine, holds a record of every step it ran."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self._mark = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def lap(self, part: str) -> None:
        """Charges the time since the last call to `part`: one of PARTS, or "other"."""
        now = time.perf_counter()
        self._seconds[part] += now - self._mark
        self._mark = now

    def end_step(
        self, batch: StepBatch, *, running: int, waiting: int, budget_tokens: int, kv_tokens: int
    ) -> None:
        self.lap("other")
        self.records.append(
            StepRecord(
                prompt_tokens=batch.prompt_tokens,
                decode_tokens=batch.decode_tokens,
                recomputed_tokens=len(batch.tokens) - batch.prompt_tokens - batch.decode_tokens,
                samples=len(batch.samples),
                running=running,
                waiting=waiting,
                budget_tokens=budget_tokens,
                kv_tokens=kv_tokens,
                other_seconds=self._seconds["other"],
                **{f"{part}_seconds": self._seconds[part] for part in PARTS},
            )
        )
        self._seconds.clear()

    @property
    def forward_seconds(self) -> float:
        """Of all steps."""
        return sum(record.forward_seconds for record in self.records)

    @property
    def valleys(self) -> int:
        return sum(record.is_valley for record in self.records)

    def save(self, path: Path) -> None:
        """One row a step, as Parquet."""
        import pyarrow as pa
        from pyarrow import parquet

        columns = {f.name: [getattr(record, f.name) for record in self.records] for f in fields(StepRecord)}
        parquet.write_table(pa.table(columns), path)


def load_trace(path: Path) -> list[StepRecord]:
    """What `StepTrace.save` wrote."""
    from pyarrow import parquet

    return [StepRecord(**row) for row in parquet.read_table(path).to_pylist()]
