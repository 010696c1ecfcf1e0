"""How well the cost model foresees a run: predicted and measured seconds of the benchmark workloads, on this CPU.

    python -m benchmarks.predictions --threads 2                 # by the clock on the wall: for a machine at rest
    python -m benchmarks.predictions --threads 1 --cpu-time      # by the CPU clock: on a busy one

Two errors are shown: of the prediction from the plan (what is known before the run), and of the cost model alone, from
the loads of the steps as the engine ran them. Each workload is calibrated for anew. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from batchllm import core
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import prompts_from_list
from batchllm.executor import calibrate
from batchllm.executor.budget import engine_options, kv_token_budget
from batchllm.executor.engine import Engine
from batchllm.executor.model import ModelRunner
from batchllm.executor.ready_model import load_ready_model
from batchllm.executor.step import StepBatch
from batchllm.executor.stopping import StopRules
from batchllm.forecast import forecast, simulate_plan
from batchllm.planner.cost import step_costs
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.loads import StepLoads
from batchllm.planner.model_shape import model_shape
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.simulate import SimulationOptions
from batchllm.versions import versions
from benchmarks import workloads
from benchmarks.model import make_model

_RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option("--workloads", "names", default="groups,long_prefix,many_prefixes,no_sharing")
@click.option(
    "--cpu-time", is_flag=True, help="Measure with the CPU clock: for one thread on a busy machine."
)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Default: as torch chooses.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSON file; default: results/")
def main(names: str, cpu_time: bool, threads: int | None, out: Path | None) -> None:
    """Predicts and runs every workload."""
    if threads is not None:
        torch.set_num_threads(threads)
    if cpu_time:
        calibrate._clock = time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        model = load_ready_model(str(make_model(Path(scratch) / "model")))
        rows = [_measure(model, name) for name in names.split(",")]
    for row in rows:
        click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
    report = {
        "date": date.today().isoformat(),
        "clock": "cpu" if cpu_time else "wall",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "rows": rows,
    }
    name = f"{report['date']}-predictions-{report['clock']}-clock-{report['threads']}-threads.json"
    target = out or _RESULTS / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")


def _measure(model: ModelRunner, name: str) -> dict[str, Any]:
    workload = workloads.make(name)
    params = core.SamplingParams(max_tokens=workload.max_tokens, ignore_eos=True)
    prompts = prompts_from_list(workload.prompts, params, None)
    requests = make_requests(prompts, None, b"")
    plan = build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions())
    options = engine_options(plan, prompts, kv_token_budget(model, "auto"), "auto")

    started = calibrate._clock()
    profile = calibrate.calibrate(model, params)
    calibration = calibrate._clock() - started
    shape = model_shape(model.text_config)
    engine = _CountingEngine(model, plan, prompts, requests, StopRules(frozenset(), None), options)
    started = calibrate._clock()
    for _ in engine.run():
        pass
    took = calibrate._clock() - started
    memory = SimulationOptions(
        options.kv_tokens, options.max_step_tokens, options.max_running, model.max_length
    )
    simulation, outputs = simulate_plan(plan, prompts, LengthEstimator(), memory)
    dtype = str(model.dtype).removeprefix("torch.")
    planned = forecast(simulation, outputs, plan.num_sequences, shape, profile, dtype)
    counted = step_costs(shape, profile, engine.loads(), model.dtype.itemsize)
    return {
        "workload": name,
        "took_seconds": round(took, 2),
        "predicted_seconds": round(planned.seconds, 2),
        "error": f"{planned.seconds / took - 1:+.1%}",
        "error_with_steps_known": f"{counted.total_seconds / took - 1:+.1%}",
        "steps": engine.stats.steps,
        "predicted_steps": planned.steps,
        "kv_peak_tokens": engine.stats.kv_tokens_peak,
        "predicted_kv_peak_tokens": simulation.peak_kv_tokens,
        "calibration_seconds": round(calibration, 2),
        "parts": {
            p: round(float((counted.steps * getattr(counted, p)).sum()), 2)
            for p in ("layers", "logits", "attention", "overhead")
        },
    }


class _CountingEngine(Engine):
    """Notes the load of every step, as planner.loads counts it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counted: list[list[float]] = []

    def _forward(self, batch: StepBatch) -> torch.Tensor | NDArray[np.int64]:
        self._counted.append(_loads(batch))
        return super()._forward(batch)

    def loads(self) -> StepLoads:
        return StepLoads(*np.array(self._counted, dtype=np.float64).T)


def _loads(batch: StepBatch) -> list[float]:
    held = np.array([chunk.held_before for chunk in batch.chunks])
    count = np.array([chunk.count for chunk in batch.chunks])
    readers = np.array([sum(chunk.count for chunk in read.chunks) for read in batch.shared_reads])
    length = np.array([read.length for read in batch.shared_reads])
    return [
        1,
        len(batch.tokens) - batch.decode_tokens,
        batch.decode_tokens,
        len(batch.logit_rows),
        len(batch.chunks),
        float((held * count + count * (count + 1) / 2).sum()),
        float((held + count).sum()),
        len(batch.shared_reads),
        float((readers * length).sum()),
        float(length.sum()),
        len(batch.copy_to),
    ]


if __name__ == "__main__":
    main()
