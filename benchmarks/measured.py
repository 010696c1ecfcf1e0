"""What several pairs of runs of one workload come to.

A pair is kept as plain values, as measured; everything else is made from all pairs, so that runs of the comparison can
add theirs to a report one after another.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import result
from benchmarks.result import EngineResult

OURS = "batchllm"
BEYOND_BYTES = 600 << 20  # of memory that may be neither weights nor KV
_PARTS = ("schedule", "prepare", "forward", "sample", "absorb")
_COUNTED = ("steps", "valleys", "kv_tokens_peak", "prompt_tokens_computed", "recomputed_tokens")

Pair = dict[str, Any]  # "floor_seconds", "runs": engine → what it did, "failed": engine → why it has no run


def pair_of(runs: Mapping[str, EngineResult], failed: Mapping[str, str], floor_seconds: float) -> Pair:
    """One run of ours, those of the other engines beside it, and the least time for the products just before."""
    ours = runs[OURS]
    return {
        "floor_seconds": round(floor_seconds, 3),
        "runs": {engine: _run(run, ours) for engine, run in runs.items()},
        "failed": dict(failed),
    }


def _run(run: EngineResult, ours: EngineResult) -> dict[str, Any]:
    figures = {name: round(value, 4) for name, value in run.figures.items()}
    return {
        "engine": run.engine,
        "seconds": round(run.seconds, 3),
        "equal_tokens": round(result.equal_tokens(ours, run), 4),
        "common_start": round(result.common_start(ours, run), 4),
        **figures,
    }


def figures(workload: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """What all pairs say. `workload`: among others `weights_bytes`, `kv_budget_bytes` and `kv_token_bytes`."""
    last: dict[str, str] = {engine: reason for pair in pairs for engine, reason in pair["failed"].items()}
    ran = {engine: None for pair in pairs for engine in pair["runs"] if engine != OURS}
    peers = [_peer(engine, [pair for pair in pairs if engine in pair["runs"]]) for engine in ran]
    peers += [{"engine": engine, "failed": reason} for engine, reason in last.items() if engine not in ran]
    return {"ours": _ours(workload, pairs), "peers": peers}


def _ours(workload: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    runs = [pair["runs"][OURS] for pair in pairs]
    return {
        "seconds": [run["seconds"] for run in runs],
        "median_seconds": _median([run["seconds"] for run in runs]),
        "share_of_floor": _median(
            [pair["floor_seconds"] / run["seconds"] for pair, run in zip(pairs, runs)], 3
        ),
        "outside_forward": _median([1 - run["forward_seconds"] / run["seconds"] for run in runs], 4),
        "parts": {part: _median([run[f"{part}_seconds"] for run in runs]) for part in _PARTS},
        **{name: int(runs[-1][name]) for name in _COUNTED},
        **_memory(workload, runs),
    }


def _memory(workload: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The process's peak, loading included, and what of the runs' peak is neither weights nor KV in use."""
    weights, running = workload["weights_bytes"], int(max(run["rss_peak_bytes"] for run in runs))
    loading = int(max(run["rss_loading_bytes"] for run in runs))
    held = int(max(run["kv_tokens_peak"] for run in runs)) * workload["kv_token_bytes"]
    allowed = weights + workload["kv_budget_bytes"] + BEYOND_BYTES
    return {
        "rss_peak_bytes": max(loading, running),
        "rss_allowed_bytes": allowed,
        "rss_within": max(loading, running) <= allowed,
        "rss_loading_bytes": loading,
        "kv_peak_bytes": held,
        "other_bytes": running - weights - held,
    }


def _peer(engine: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    runs, ours = [pair["runs"][engine] for pair in pairs], [pair["runs"][OURS] for pair in pairs]
    ratios = sorted(run["seconds"] / mine["seconds"] for mine, run in zip(ours, runs))
    fixed = {"engine", "seconds", "equal_tokens", "common_start", "rss_peak_bytes", "rss_loading_bytes"}
    return {
        "engine": runs[-1]["engine"],
        "name": engine,
        "seconds": [run["seconds"] for run in runs],
        "median_seconds": _median([run["seconds"] for run in runs]),
        "ratio": _median(ratios),
        "ratio_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "share_of_floor": _median(
            [pair["floor_seconds"] / run["seconds"] for pair, run in zip(pairs, runs)], 3
        ),
        "equal_tokens": _median([run["equal_tokens"] for run in runs], 4),
        "common_start": _median([run["common_start"] for run in runs], 4),
        "rss_peak_bytes": int(max(run["rss_peak_bytes"] for run in runs)),
        **{name: int(value) for name, value in runs[-1].items() if name not in fixed},
    }


def _median(values: Sequence[float], digits: int = 2) -> float:
    return round(statistics.median(values), digits)
