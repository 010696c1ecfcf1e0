"""transformers' continuous batching (`generate_batch`) as an engine of the comparison."""

from __future__ import annotations

import time

from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks.engine_transformers import kv_bytes_per_token
from benchmarks.result import EngineResult
from benchmarks.worker import Run, Settings, serve
from benchmarks.workloads import Workload

_PAGE = 256  # transformers' default


def start(settings: Settings) -> Run:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto").eval()
    held = settings.kv_bytes // kv_bytes_per_token(model.config, model.dtype)
    batching = ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=held // _PAGE, max_batch_tokens=settings.step_tokens or 1024
    )

    def run(workload: Workload) -> EngineResult:
        generation = GenerationConfig(
            max_new_tokens=workload.max_tokens,
            min_new_tokens=workload.max_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        started = time.perf_counter()
        outputs = model.generate_batch(
            inputs=workload.prompts, generation_config=generation, continuous_batching_config=batching
        )
        seconds = time.perf_counter() - started
        answers = [output.generated_tokens for output in outputs.values()]
        if len(answers) != len(workload.prompts) or any(len(a) != workload.max_tokens for a in answers):
            reasons = {output.error for output in outputs.values() if output.error} or {"no reason given"}
            raise RuntimeError(f"not every prompt was answered in full: {reasons.pop()}")
        return EngineResult("transformers cb", seconds, [list(map(int, answer)) for answer in answers])

    return run


if __name__ == "__main__":
    serve(start)
