"""transformers' generate in static batches, in the order given, as an engine of the comparison.

Prompts of a batch are padded on the left. A batch has 32 rows, or as many as KV memory holds.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.result import EngineResult
from benchmarks.worker import Run, Settings, serve
from benchmarks.workloads import Workload

BATCH = 32


def start(settings: Settings) -> Run:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto").eval()

    def run(workload: Workload) -> EngineResult:
        held = settings.kv_bytes // kv_bytes_per_token(model.config, model.dtype)
        size = max(1, min(BATCH, held // workload.longest))
        started = time.perf_counter()
        tokens: list[list[int]] = []
        for first in range(0, len(workload.prompts), size):
            tokens += generate(model, workload.prompts[first : first + size], workload.max_tokens)
        return EngineResult(f"transformers static {size}", time.perf_counter() - started, tokens)

    return run


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    head = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize)


def generate(model: torch.nn.Module, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return output[:, longest:].tolist()


if __name__ == "__main__":
    serve(start)
