"""What sampling and structured output cost beside the model: CPU seconds of a step's parts, at 128 rows.

    python -m benchmarks.structured --tokenizer ../shared/data/tokenizers/phi-3-mini

A Llama of 168M parameters with the tokenizer's vocabulary and random weights; every row has a prompt of its own and
decodes, on one thread, in processor time (so another process does not count, and the thread that makes masks does,
wherever it runs). `outside` is everything but the model's forward pass, as a share of the step.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from batchllm import LLM, SamplingParams
from batchllm.executor.trace import StepTrace

ROWS = 128
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 400},
        "kind": {"enum": ["person", "place", "thing"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 50},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "all penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.2,
        "logit_bias": {5: 1.0},
        "min_tokens": 10,
        "top_p": 0.95,
    },
    "json_schema": {"temperature": 0.8, "json_schema": SCHEMA},
    "regex": {"temperature": 0.8, "regex": "([a-z]+ ){400}"},
}


class _CpuTrace(StepTrace):
    """Processor time instead of the clock's."""

    def __init__(self) -> None:
        super().__init__()
        self._mark = time.process_time()

    def lap(self, part: str) -> None:
        now = time.process_time()
        self._seconds[part] += now - self._mark
        self._mark = now


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokens", default=12, show_default=True, help="Decoded by each row.")
def main(tokenizer: Path, tokens: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(str(_save_model(Path(folder), tokenizer)), kv_memory="1GiB")
        prompts = [[5 + row, 9, 11, 7] * 4 for row in range(ROWS)]
        base = None
        for name, values in KINDS.items():
            params = SamplingParams(max_tokens=tokens, **{"ignore_eos": "json" not in name, **values})
            if name in ("json_schema", "regex"):
                params = SamplingParams(max_tokens=tokens, **values)
            llm.trace = _CpuTrace()
            llm.generate(prompts, params, use_tqdm=False)
            steps = [record for record in llm.trace.records if record.decode_tokens > 0.9 * ROWS]
            parts = {part: sum(getattr(s, f"{part}_seconds") for s in steps) / len(steps) for part in _PARTS}
            total = sum(parts.values())
            base = base or total
            outside = 1 - parts["forward"] / total
            figures = {part: round(1000 * seconds, 1) for part, seconds in parts.items()}
            line = {"kind": name, "step_ms": round(1000 * total), "outside": f"{outside:.1%}", **figures}
            click.echo(json.dumps(line))


_PARTS = ("schedule", "prepare", "forward", "sample", "absorb", "other")


def _save_model(folder: Path, tokenizer_folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
