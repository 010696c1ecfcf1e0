"""Whole jobs: BatchLLM, transformers' continuous batching, and the least time the arithmetic and the reads take."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from batchllm.core import Plan, PromptTable, RequestTable, SamplingParams
from batchllm.executor.budget import engine_options, kv_token_budget
from batchllm.executor.engines import engine_for
from batchllm.executor.model import ModelRunner
from batchllm.executor.stopping import StopRules
from batchllm.planner.model_shape import model_shape
from batchllm.planner.plan import PlanOptions, build_plan
from benchmarks.gpu.clock import Rates, synchronize
from benchmarks.gpu.workloads import Workload

_STEP_TOKENS = 8192  # of transformers' continuous batching: as many as of ours
_TINY_BATCHING = ContinuousBatchingConfig(page_size=256, num_blocks=16, max_batch_tokens=64)
NEVER = 1 << 40  # tokens that a shared prefix would have to have


def run_ours(runner: ModelRunner, workload: Workload, min_shared_tokens: int = 32) -> dict[str, Any]:
    """Planning included; the model is loaded."""
    device = runner.device
    synchronize(device)
    started = time.perf_counter()
    prompts, requests = _tables(workload)
    todo = np.ones(len(requests), dtype=bool)
    plan = build_plan(prompts, requests, todo, PlanOptions(min_shared_tokens=min_shared_tokens))
    planned = time.perf_counter()
    tokens = kv_token_budget(runner, "auto")
    options = engine_options(plan, prompts, tokens, "auto", gpu=True)
    engine = engine_for(runner, plan, prompts, requests, StopRules(frozenset(), None), options)
    answered = sum(len(result.tokens) for finished in engine.run() for result in finished)
    synchronize(device)
    seconds = time.perf_counter() - started
    assert answered == len(workload.prompts) * workload.max_tokens, "not every prompt was answered in full"
    decode = vars(engine.decode.stats) if hasattr(engine, "decode") else {}
    return {
        "seconds": seconds,
        "own_forward": runner.fused,
        "plan_seconds": planned - started,
        "output_tokens_per_second": answered / seconds,
        "steps": engine.stats.steps,
        "prompt_tokens_computed": engine.stats.prompt_tokens_computed,
        "preemptions": engine.stats.preemptions,
        "kv_tokens": engine.pool.capacity,
        "kv_tokens_peak": engine.stats.kv_tokens_peak,
        **{f"decode_{name}": value for name, value in decode.items()},
    }


def floor_seconds(runner: ModelRunner, workload: Workload, rates: Rates) -> float:
    """Products of distinct prompt tokens and output tokens, then the KV that decoding reads, each shared node once a
    step: the least that any order of work can do, at the rates measured here."""
    shape = model_shape(runner.text_config)
    prompts, requests = _tables(workload)
    plan = build_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions())
    outputs = len(workload.prompts) * workload.max_tokens
    tokens = plan.stats.planned_tokens + outputs - len(workload.prompts)
    flops = tokens * shape.flops_per_token + outputs * shape.flops_per_logit_row
    kv_bytes = _tokens_read(plan, workload.max_tokens) * shape.kv_bytes_per_token(runner.dtype.itemsize)
    return float(flops / rates.product_flops + kv_bytes / rates.copy_bytes)


def _tokens_read(plan: Plan, output: int) -> int:
    length = (plan.node_end - plan.node_start).astype(np.int64)
    own = length[plan.node_sequence >= 0]
    return int(length.sum() * (output - 1) + len(own) * output * (output - 1) // 2)


def run_transformers(model: Any, workload: Workload, tiny: bool) -> dict[str, Any]:
    """`generate_batch`, with the memory that it takes for itself."""
    generation = GenerationConfig(
        max_new_tokens=workload.max_tokens,
        min_new_tokens=workload.max_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    batching = _TINY_BATCHING if tiny else ContinuousBatchingConfig(max_batch_tokens=_STEP_TOKENS)
    started = time.perf_counter()
    outputs = model.generate_batch(
        inputs=workload.prompts, generation_config=generation, continuous_batching_config=batching
    )
    seconds = time.perf_counter() - started
    answered = sum(len(output.generated_tokens) for output in outputs.values())
    if answered != len(workload.prompts) * workload.max_tokens:
        raise RuntimeError("not every prompt was answered in full")
    return {"seconds": seconds, "output_tokens_per_second": answered / seconds}


def _tables(workload: Workload) -> tuple[PromptTable, RequestTable]:
    prompts = workload.prompts
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    tokens = np.concatenate([np.array(prompt, dtype=np.int32) for prompt in prompts])
    params = SamplingParams(max_tokens=workload.max_tokens, ignore_eos=True)
    row = np.arange(len(prompts))
    keys = np.stack([row, row], axis=1).astype(np.uint64)
    table = PromptTable(tokens, offsets, (params,), np.zeros(len(prompts), dtype=np.int32), {})
    return table, RequestTable(row, np.zeros(len(prompts), dtype=np.int32), keys)
