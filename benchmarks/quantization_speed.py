"""What int8 does to the time of whole jobs: the same workload in bfloat16, int8_weight_only and int8_dynamic, in turn.

    python -m benchmarks.quantization_speed --workloads groups,no_sharing --pairs 3

A ratio is the seconds of bfloat16 over those of the quantised model in the same round: above 1, int8 is faster.
`loading_mib` is the peak of memory of a process that has loaded the model and answered one prompt.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click

from batchllm.executor.quantize import QUANTIZATIONS
from batchllm.versions import versions
from benchmarks import workloads
from benchmarks.engines import Interpreters, Worker, save_workload
from benchmarks.model import make_model
from benchmarks.result import EngineResult, equal_tokens
from benchmarks.worker import Settings
from benchmarks.workloads import KV_BYTES

_RESULTS = Path(__file__).parent / "results"
_MAX_LENGTH = 4096
_PLAIN = "none"


@click.command()
@click.option("--workloads", "names", default="groups,no_sharing")
@click.option("--pairs", default=3)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSON file; default: results/")
def main(names: str, pairs: int, out: Path | None) -> None:
    """Times quantisations of the 168M model beside the plain one."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in names.split(",") for row in _measure(name, pairs, Path(folder))]
    result = {"date": date.today().isoformat(), "versions": versions(), "rows": rows}
    path = out or _RESULTS / f"{date.today().isoformat()}-quantization-speed.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def _measure(name: str, pairs: int, scratch: Path) -> list[dict[str, Any]]:
    workload = workloads.make(name)
    settings = Settings(str(make_model(scratch / workload.model, workload.model)), KV_BYTES, _MAX_LENGTH)
    path = save_workload(workload, scratch)
    workers = {}
    for mode in (_PLAIN, *QUANTIZATIONS):
        place = scratch / mode
        place.mkdir(exist_ok=True)
        chosen = settings if mode == _PLAIN else replace(settings, quantize=mode)
        workers[mode] = Worker("batchllm", chosen, Interpreters(), place)
    try:
        runs = [{mode: worker.run(path) for mode, worker in workers.items()} for _ in range(pairs)]
    finally:
        for worker in workers.values():
            worker.close()
    rows = [_row(name, mode, runs) for mode in workers]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def _row(workload: str, mode: str, runs: list[dict[str, EngineResult]]) -> dict[str, Any]:
    ratios = [run[_PLAIN].seconds / run[mode].seconds for run in runs]
    return {
        "workload": workload,
        "quantize": mode,
        "seconds": [round(run[mode].seconds, 2) for run in runs],
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "equal_tokens": round(equal_tokens(runs[0][_PLAIN], runs[0][mode]), 3),
        "loading_mib": round(runs[0][mode].figures["rss_loading_bytes"] / 2**20),
    }


if __name__ == "__main__":
    main()
