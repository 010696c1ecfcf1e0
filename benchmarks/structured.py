"""What sampling and structured output cost beside the model, at 128 rows.

    python -m benchmarks.structured --tokenizer ../shared/data/tokenizers/phi-3-mini
    python -m benchmarks.structured --tokenizer ... --kinds json_schema,regex --pairs 5

A Llama of 168M parameters with the tokenizer's vocabulary and random weights; every row has a prompt of its own and
decodes. Each kind runs in turn with rows that sample at the same temperature and ask for nothing else, as many times
as there are pairs. `overhead` is what a kind adds to a whole step by the clock, the model's part with it, as a share of
the plain step: the median over pairs of the median over steps. On a noisy machine take many pairs.

With `--processor` it is counted on one thread in processor time, so that other processes do not matter: what a kind
adds outside the model's part, in the engine's own thread and in those beside it that make masks (`background`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
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


class _ClockTrace(StepTrace):
    """Seconds by the clock. What threads in the background do shows in the parts that it slows down."""

    def __init__(self) -> None:
        super().__init__()
        self.background: list[float] = []

    def end_step(self, batch: StepBatch, **state: int) -> None:
        super().end_step(batch, **state)
        self.background.append(0.0)


class _ProcessorTrace(StepTrace):
    """Processor time of the engine's thread in place of the clock's, and that of all other threads by step."""

    def __init__(self) -> None:
        super().__init__()
        self._mark = time.thread_time()
        self.background: list[float] = []
        self._all = self._others()

    def lap(self, part: str) -> None:
        now = time.thread_time()
        self._seconds[part] += now - self._mark
        self._mark = now

    def end_step(self, batch: StepBatch, **state: int) -> None:
        super().end_step(batch, **state)
        now = self._others()
        self.background.append(now - self._all)
        self._all = now

    @staticmethod
    def _others() -> float:
        return time.process_time() - time.thread_time()


@dataclass(frozen=True)
class Steps:
    """Medians over the steps of one run in which nearly all rows decode, in seconds."""

    parts: dict[str, float]
    background: float

    @property
    def outside(self) -> float:
        return sum(self.parts.values()) - self.parts["forward"]

    @property
    def whole(self) -> float:
        return sum(self.parts.values()) + self.background


def measure(llm: LLM, tokens: int, values: dict[str, Any], processor: bool) -> Steps:
    prompts = [[5 + row, 9, 11, 7] * 4 for row in range(ROWS)]
    has_end = any(kind in values for kind in ("json_schema", "regex"))
    trace = _ProcessorTrace() if processor else _ClockTrace()
    llm.trace = trace
    params = SamplingParams(max_tokens=tokens, ignore_eos=not has_end, **values)
    llm.generate(prompts, params, use_tqdm=False)
    together = zip(trace.records, trace.background, strict=True)
    steps = [(step, others) for step, others in together if step.decode_tokens > 0.9 * ROWS]
    parts = {part: median(getattr(step, f"{part}_seconds") for step, _ in steps) for part in _PARTS}
    return Steps(parts, median(others for _, others in steps))


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokens", default=12, show_default=True, help="Decoded by each row.")
@click.option("--kinds", default=",".join(list(KINDS)), show_default=True)
@click.option("--pairs", default=1, show_default=True)
@click.option("--processor", is_flag=True, help="Processor time on one thread in place of the clock.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-structured.json"
)
def main(tokenizer: Path, tokens: int, kinds: str, pairs: int, processor: bool, out: Path | None) -> None:
    """Prints a line for each kind and writes them to a file."""
    if processor:
        torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(str(_save_model(Path(folder), tokenizer)), kv_memory="1GiB")
        for name in kinds.split(","):
            measure(llm, 4, KINDS[name], processor)  # grammars are compiled, kernels are built
            both = [
                (measure(llm, tokens, PLAIN, processor), measure(llm, tokens, KINDS[name], processor))
                for _ in range(pairs)
            ]
            lines.append({"kind": name, **_figures(both, processor)})
            click.echo(json.dumps(lines[-1]))
    time_is = "processor, one thread, without the model's part" if processor else "clock, whole step"
    about = {"date": date.today().isoformat(), "versions": versions(), "pairs": pairs, "time": time_is}
    target = out or _RESULTS / f"{about['date']}-structured.json"
    target.write_text(json.dumps({**about, "rows": ROWS, "kinds": lines}, indent=1) + "\n")
    click.echo(f"written to {target}")


def _figures(pairs: Sequence[tuple[Steps, Steps]], processor: bool) -> dict[str, Any]:
    def counted(steps: Steps) -> float:
        return steps.outside + steps.background if processor else steps.whole

    def middle(value: Callable[[Steps], float], which: int) -> float:
        return round(1000 * median(value(pair[which]) for pair in pairs), 1)

    added = [round((counted(other) - counted(plain)) / plain.whole, 4) for plain, other in pairs]
    return {
        "overhead": median(added),
        "overhead_of_each_pair": added,
        "plain_step_ms": middle(lambda steps: steps.whole, 0),
        "step_ms": middle(lambda steps: steps.whole, 1),
        "plain_outside_ms": middle(lambda steps: steps.outside, 0),
        "outside_ms": middle(lambda steps: steps.outside, 1),
        "background_ms": middle(lambda steps: steps.background, 1),
        "sample_ms": middle(lambda steps: steps.parts["sample"], 1),
    }


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
