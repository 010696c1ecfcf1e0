"""What several pairs of runs of one workload come to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.floor import Products
from benchmarks.result import EngineResult
from benchmarks.worker import Settings
from benchmarks.workloads import Workload

OURS = "batchllm"
_PARTS = ("schedule", "prepare", "forward", "sample", "absorb")


@dataclass
class Measured:
    """Runs of one workload, by engine, in the order of the pairs; the first pairs have all engines."""

    workload: Workload
    products: Products
    settings: Settings
    kv_token_bytes: int
    runs: dict[str, list[EngineResult]] = field(default_factory=dict)
    floor_seconds: list[float] = field(default_factory=list)  # by pair
    failures: dict[str, str] = field(default_factory=dict)  # engine → why it has no runs
    rss_peak_bytes: int | None = None  # of ours, in a process that ran nothing else

    def add(self, engine: str, run: EngineResult) -> None:
        self.runs.setdefault(engine, []).append(run)

    def figures(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        workload, ours = self.workload, self.runs[OURS]
        peers: list[dict[str, Any]] = [
            self._peer(engine, runs) for engine, runs in self.runs.items() if engine != OURS
        ]
        peers += [{"engine": engine, "failed": reason} for engine, reason in self.failures.items()]
        return {
            "workload": workload.name,
            "rows": len(workload.prompts),
            "prompt_tokens": workload.prompt_tokens,
            "distinct_prompt_tokens": self.products.distinct_prompt_tokens,
            "output_tokens": len(workload.prompts) * workload.max_tokens,
            "kv_budget_bytes": self.settings.kv_bytes,
            "floor_seconds": _rounded(self.floor_seconds),
            "ours": {
                "seconds": _rounded([run.seconds for run in ours]),
                "median_seconds": _median([run.seconds for run in ours]),
                "share_of_floor": _median(
                    [floor / run.seconds for floor, run in zip(self.floor_seconds, ours)], 3
                ),
                "outside_forward": _median([1 - _forward(run) for run in ours], 4),
                "parts": {p: _median([run.figures[f"{p}_seconds"] for run in ours]) for p in _PARTS},
                **{name: int(ours[0].figures[name]) for name in ("steps", "valleys", "kv_tokens_peak")},
                "prompt_tokens_computed": int(ours[0].figures["prompt_tokens_computed"]),
                "recomputed_tokens": int(ours[0].figures["recomputed_tokens"]),
                **self._memory(),
            },
            "peers": peers,
        }

    def _peer(self, engine: str, runs: list[EngineResult]) -> dict[str, Any]:
        ours = self.runs[OURS]
        ratios = sorted(run.seconds / mine.seconds for mine, run in zip(ours, runs))
        return {
            "engine": runs[0].engine,
            "seconds": _rounded([run.seconds for run in runs]),
            "median_seconds": _median([run.seconds for run in runs]),
            "ratio": _median(ratios),
            "ratio_spread": _rounded([ratios[0], ratios[-1]]),
            "share_of_floor": _median(
                [floor / run.seconds for floor, run in zip(self.floor_seconds, runs)], 3
            ),
            "equal_tokens": round(result.equal_tokens(ours[0], runs[0]), 4),
            "common_start": round(result.common_start(ours[0], runs[0]), 4),
            "rss_peak_bytes": int(max(run.figures["rss_peak_bytes"] for run in runs)),
            **{name: int(value) for name, value in runs[0].figures.items() if name != "rss_peak_bytes"},
        }

    def _memory(self) -> dict[str, int]:
        """Of the peak, what is neither weights nor KV: no more than 600 MiB are meant to be."""
        if self.rss_peak_bytes is None:
            return {}
        weights = (Path(self.settings.model) / "model.safetensors").stat().st_size
        held = int(self.runs[OURS][0].figures["kv_tokens_peak"]) * self.kv_token_bytes
        return {
            "rss_peak_bytes": self.rss_peak_bytes,
            "weights_bytes": weights,
            "kv_peak_bytes": held,
            "other_bytes": self.rss_peak_bytes - weights - held,
        }


def _forward(run: EngineResult) -> float:
    """Share of a whole job's time that is the model's forward pass."""
    return run.figures["forward_seconds"] / run.seconds


def _median(values: list[float], digits: int = 2) -> float:
    return round(statistics.median(values), digits)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]
