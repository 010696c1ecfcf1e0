"""Runs one workload through BatchLLM: `python -m benchmarks.engine_batchllm MODEL WORKLOAD RESULT`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from batchllm import LLM, SamplingParams
from benchmarks import workloads
from benchmarks.result import EngineResult, save


def main(model: str, workload_path: str, result_path: str) -> None:
    workload = workloads.load(Path(workload_path))
    llm = LLM(model, skip_tokenizer_init=True)
    llm.generate([[5] * 50], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), use_tqdm=False)
    params = SamplingParams(max_tokens=workload.max_tokens, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    save(EngineResult("batchllm", seconds, tokens), Path(result_path))


if __name__ == "__main__":
    main(*sys.argv[1:])
