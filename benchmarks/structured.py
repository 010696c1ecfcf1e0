"""What sampling and structured output cost beside the model, at 128 rows.

    python -m benchmarks.structured --tokenizer ../shared/data/tokenizers/phi-3-mini
    python -m benchmarks.structured --tokenizer ... --kinds json_schema,regex --pairs 5 --threads 2

A Llama of 168M parameters with the tokenizer's vocabulary and random weights; every row has a prompt of its own and
decodes. Each kind runs in turn with rows that sample at the same temperature and ask for nothing else, so many times as
there are pairs. Of the steps in which all rows decode: `overhead`, the mean step of the kind over that of plain rows in
the same pair, less one, median over pairs, by the clock and by processor time (in which another process does not
count, and the thread that makes masks does, wherever it runs); `outside`, everything but the model's forward pass as a
share of the step. With more than one thread, run it on a quiet machine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from batchllm import LLM, SamplingParams
from batchllm.executor.step import StepBatch
from batchllm.executor.trace import StepTrace
from batchllm.versions import versions

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
PLAIN: dict[str, Any] = {"temperature": 0.8}
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


class _TwoClocks(StepTrace):
    """Processor time beside the clock's: `cpu` seconds of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: list[float] = []
        self._cpu_mark = time.process_time()

    def end_step(self, batch: StepBatch, **state: int) -> None:
        super().end_step(batch, **state)
        now = time.process_time()
        self.cpu.append(now - self._cpu_mark)
        self._cpu_mark = now


@dataclass(frozen=True)
class Steps:
    """Means over the steps of one run in which nearly all rows decode, in seconds."""

    clock: float
    cpu: float
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        return 1 - self.parts["forward"] / self.clock


def measure(llm: LLM, tokens: int, values: dict[str, Any]) -> Steps:
    prompts = [[5 + row, 9, 11, 7] * 4 for row in range(ROWS)]
    has_end = any(kind in values for kind in ("json_schema", "regex"))
    llm.trace = trace = _TwoClocks()
    params = SamplingParams(max_tokens=tokens, ignore_eos=not has_end, **values)
    llm.generate(prompts, params, use_tqdm=False)
    steps = [(step, cpu) for step, cpu in zip(trace.records, trace.cpu) if step.decode_tokens > 0.9 * ROWS]
    parts = {part: fmean(getattr(step, f"{part}_seconds") for step, _ in steps) for part in _PARTS}
    return Steps(sum(parts.values()), fmean(cpu for _, cpu in steps), parts)


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokens", default=12, show_default=True, help="Decoded by each row.")
@click.option("--kinds", default=",".join(list(KINDS)), show_default=True)
@click.option("--pairs", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-structured.json"
)
def main(tokenizer: Path, tokens: int, kinds: str, pairs: int, threads: int, out: Path | None) -> None:
    """Prints a line for each kind and writes them to a file."""
    torch.set_num_threads(threads)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(str(_save_model(Path(folder), tokenizer)), kv_memory="1GiB")
        for name in kinds.split(","):
            measure(llm, 4, KINDS[name])  # grammars are compiled, kernels are built
            both = [(measure(llm, tokens, PLAIN), measure(llm, tokens, KINDS[name])) for _ in range(pairs)]
            lines.append({"kind": name, **_figures(both)})
            click.echo(json.dumps(lines[-1]))
    about = {"date": date.today().isoformat(), "versions": versions(), "threads": threads, "pairs": pairs}
    target = out or _RESULTS / f"{about['date']}-structured.json"
    target.write_text(json.dumps({**about, "rows": ROWS, "kinds": lines}, indent=1) + "\n")
    click.echo(f"written to {target}")


def _figures(pairs: Sequence[tuple[Steps, Steps]]) -> dict[str, Any]:
    parts = {part: median(other.parts[part] for _, other in pairs) for part in _PARTS}
    return {
        "plain_step_ms": round(1000 * median(plain.clock for plain, _ in pairs), 1),
        "step_ms": round(1000 * median(other.clock for _, other in pairs), 1),
        "overhead_by_clock": _overhead([(plain.clock, other.clock) for plain, other in pairs]),
        "overhead_by_cpu": _overhead([(plain.cpu, other.cpu) for plain, other in pairs]),
        "outside_plain": round(median(plain.outside for plain, _ in pairs), 4),
        "outside": round(median(other.outside for _, other in pairs), 4),
        "parts_ms": {part: round(1000 * seconds, 1) for part, seconds in parts.items()},
    }


def _overhead(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    each = [round(other / plain - 1, 4) for plain, other in pairs]
    return {"median": median(each), "pairs": each}


_PARTS = ("schedule", "prepare", "forward", "sample", "absorb", "other")
_RESULTS = Path(__file__).parent / "results"


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
