"""Runs one workload through transformers' generate in static batches, in the order given.

`python -m benchmarks.engine_transformers MODEL WORKLOAD RESULT [BATCH]`. Prompts of a batch are padded on the left.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import workloads
from benchmarks.result import EngineResult, save


def main(model_path: str, workload_path: str, result_path: str, batch: str = "32") -> None:
    workload = workloads.load(Path(workload_path))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    generate(model, [[5] * 50], 4)
    started = time.perf_counter()
    size = int(batch)
    tokens: list[list[int]] = []
    for first in range(0, len(workload.prompts), size):
        tokens += generate(model, workload.prompts[first : first + size], workload.max_tokens)
    seconds = time.perf_counter() - started
    save(EngineResult(f"transformers static {batch}", seconds, tokens), Path(result_path))


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
    main(*sys.argv[1:])
