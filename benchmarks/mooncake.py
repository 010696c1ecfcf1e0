"""Plans the Mooncake conversation trace from its block hashes and simulates every order on a device.

    python -m benchmarks.mooncake ../shared/data/mooncake/conversation_trace.jsonl

The trace names every prompt by the hashes of its blocks of 512 tokens, each hash covering all that comes before: a true
prefix tree. A block is planned as one token, then the tree is stretched to tokens. All requests are taken to be there
at the start, as in an offline job. Times are predictions of the cost model, not measurements.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np

from batchllm.core import IntArray, PromptTable, RequestTable, SamplingParams
from batchllm.planner.choose import OrderChoice, choose_order
from batchllm.planner.cost import step_costs
from batchllm.planner.hardware import ready_profile
from batchllm.planner.loads import FloatArray, StepLoads
from batchllm.planner.model_shape import ModelShape, model_shape
from batchllm.planner.plan import PlanDraft, PlanOptions, draft_plan
from batchllm.planner.simulate import SimulationOptions

BLOCK = 512
_RESULTS = Path(__file__).parent / "results"
LLAMA_8B = SimpleNamespace(  # Llama-3.1-8B's config.json
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Trace:
    blocks: list[list[int]]  # hashes of each prompt
    input_tokens: IntArray
    output_tokens: IntArray


def load_trace(path: Path) -> Trace:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return Trace(
        [row["hash_ids"] for row in rows],
        np.array([row["input_length"] for row in rows]),
        np.array([row["output_length"] for row in rows]),
    )


def draft_trace(trace: Trace) -> PlanDraft:
    """Every request is a sequence of its own, also where prompts are the same: the trace was sampled."""
    rows = len(trace.blocks)
    offsets = np.append(0, np.cumsum([len(blocks) for blocks in trace.blocks])).astype(np.int64)
    tokens = np.concatenate([np.array(blocks, dtype=np.int32) for blocks in trace.blocks])
    params = (SamplingParams(max_tokens=1, temperature=1.0),)
    prompts = PromptTable(tokens, offsets, params, np.zeros(rows, dtype=np.int32), {})
    key = np.stack([np.arange(rows), np.zeros(rows)], axis=1).astype(np.uint64)
    requests = RequestTable(np.arange(rows), np.zeros(rows, dtype=np.int32), key)
    options = PlanOptions(min_shared_tokens=1, decode_estimate=trace.output_tokens)
    draft = draft_plan(prompts, requests, np.ones(rows, dtype=bool), options)
    return _stretched(draft, trace)


def _stretched(draft: PlanDraft, trace: Trace) -> PlanDraft:
    """From blocks to tokens. Where a prompt ends, its last block is as long as is left of it."""
    tree = draft.tree
    end = tree.end * BLOCK
    row = draft.requests.row[draft.sequences.first_request]
    np.minimum.at(end, draft.terminal, trace.input_tokens[row])
    start = np.where(tree.parent >= 0, end[tree.parent], 0)
    lengths = np.append(0, np.cumsum(trace.input_tokens))
    return dataclasses.replace(
        draft,
        tree=dataclasses.replace(tree, start=start, end=end),
        prompts=dataclasses.replace(draft.prompts, offsets=lengths),
    )


def memory_tokens(shape: ModelShape, hardware: str) -> int:
    """KV tokens beside the weights, both in bfloat16."""
    memory = ready_profile(hardware, "bfloat16").memory_bytes
    assert memory is not None
    return (memory - shape.weight_bytes(2)) // shape.kv_bytes_per_token(2)


def choose(draft: PlanDraft, hardware: str, step_tokens: int, kv_tokens: int | None = None) -> OrderChoice:
    shape, profile = model_shape(LLAMA_8B), ready_profile(hardware, "bfloat16")

    def seconds(loads: StepLoads) -> FloatArray:
        return step_costs(shape, profile, loads, 2).seconds

    options = SimulationOptions(kv_tokens or memory_tokens(shape, hardware), step_tokens)
    return choose_order(draft, seconds, options)


@click.command()
@click.argument("trace", type=click.Path(exists=True, path_type=Path))
@click.option("--hardware", default="h200", help="a device with a ready profile")
@click.option("--step-tokens", default=8192, help="tokens of a step")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="JSON; default: results/DATE-mooncake.json"
)
def main(trace: Path, hardware: str, step_tokens: int, out: Path | None) -> None:
    """Prints a table of the orders."""
    begin = time.perf_counter()
    draft = draft_trace(load_trace(trace))
    planned = time.perf_counter()
    choice = choose(draft, hardware, step_tokens)
    simulated = time.perf_counter()
    shape, stats = model_shape(LLAMA_8B), choice.plan.stats
    report = {
        "date": date.today().isoformat(),
        "model": "Llama-3.1-8B, bfloat16",
        "hardware": hardware,
        "kv_tokens": memory_tokens(shape, hardware),
        "step_tokens": step_tokens,
        "requests": stats.requests,
        "prompt_tokens": stats.prompt_tokens,
        "distinct_tokens": stats.distinct_tokens,
        "saved": round(1 - stats.distinct_tokens / stats.prompt_tokens, 4),
        "seconds_to_plan": round(planned - begin, 2),
        "seconds_to_simulate_all_orders": round(simulated - planned, 2),
        "chosen": choice.order,
        "reason": choice.reason,
        "orders": {name: dataclasses.asdict(p) for name, p in choice.predictions.items()},
    }
    click.echo(
        f"{stats.requests:,} requests, {stats.prompt_tokens:,} prompt tokens, saved {report['saved']:.1%}"
    )
    click.echo(_table(choice, stats.prompt_tokens, shape))
    click.echo(choice.reason)
    target = out or _RESULTS / f"{report['date']}-mooncake.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


def _table(choice: OrderChoice, prompt_tokens: int, shape: ModelShape) -> str:
    lines = ["| order | compute saved | makespan | steps | peak KV |", "|---|---|---|---|---|"]
    for name, found in choice.predictions.items():
        gigabytes = found.peak_kv_tokens * shape.kv_bytes_per_token(2) / 1e9
        saved = 1 - found.prompt_tokens / prompt_tokens
        lines.append(
            f"| {name} | {saved:.1%} | {found.seconds:,.0f} s | {found.steps:,} | "
            f"{found.peak_kv_tokens:,} tokens, {gigabytes:.1f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
