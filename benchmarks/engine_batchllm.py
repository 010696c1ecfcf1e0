"""BatchLLM as an engine of the comparison."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

from batchllm import LLM, SamplingParams
from batchllm.executor.trace import StepTrace
from benchmarks.result import EngineResult
from benchmarks.worker import WARM_UP, Run, Settings, serve
from benchmarks.workloads import Workload


def start(settings: Settings) -> Run:
    step_tokens = settings.step_tokens or "auto"
    llm = LLM(
        settings.model,
        kv_memory=settings.kv_bytes,
        max_step_tokens=step_tokens,
        skip_tokenizer_init=True,
        quantize=settings.quantize or None,
    )

    def run(workload: Workload) -> EngineResult:
        params = SamplingParams(max_tokens=workload.max_tokens, temperature=0, ignore_eos=True)
        llm.trace = StepTrace()
        started = time.perf_counter()
        outputs = llm.generate(workload.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        if settings.traces and workload.name != WARM_UP:
            Path(settings.traces).mkdir(parents=True, exist_ok=True)
            llm.trace.save(Path(settings.traces) / f"{workload.name}.parquet")
        return EngineResult("batchllm", seconds, tokens, _figures(llm.trace))

    return run


def _figures(trace: StepTrace) -> dict[str, float]:
    names = [f.name for f in fields(trace.records[0]) if f.name.endswith("_seconds")]
    return {
        "steps": len(trace.records),
        "valleys": trace.valleys,
        "kv_tokens_peak": max(record.kv_tokens for record in trace.records),
        "prompt_tokens_computed": sum(record.prompt_tokens for record in trace.records),
        "recomputed_tokens": sum(record.recomputed_tokens for record in trace.records),
        **{name: sum(getattr(record, name) for record in trace.records) for name in names},
    }


if __name__ == "__main__":
    serve(start)
