"""`batchllm plan`: everything a run does before the model is loaded, and what that foretells. Writes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from batchllm.advice import Situation, advice
from batchllm.collection import resume_collection
from batchllm.core import Plan, PromptTable
from batchllm.dataset.keys import make_requests
from batchllm.dataset.load import load_rows, validate_columns
from batchllm.dataset.reader import open_input
from batchllm.dataset.reorder_gain import possible_reordering
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import JobError
from batchllm.executor.gate import check_lengths
from batchllm.executor.model_config import load_config
from batchllm.executor.model_folder import check_model_folder, fingerprint
from batchllm.forecast import (
    Forecast,
    expected_outputs,
    forecast,
    ordered_plan,
    plan_options,
    simulate_plan,
    this_device,
)
from batchllm.history import past_lengths, teach
from batchllm.job import JobSpec
from batchllm.limits import longest_sequence, refuse_long_prompts, refuse_unknown_tokens
from batchllm.planner.auto_values import cpu_kv_bytes, step_tokens
from batchllm.planner.explain import DeviceReport, PlanReport, biggest_prefixes, level_reports
from batchllm.planner.hardware import BYTES_PER_VALUE, DeviceProfile, ready_profile
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.model_shape import ModelShape, model_shape
from batchllm.planner.plan import draft_plan
from batchllm.planner.savings import ComputedTokens, computed_tokens
from batchllm.planner.simulate import SimulationOptions
from batchllm.planner.workers import divided
from batchllm.report.progress import Progress
from batchllm.report.stopwatch import Stopwatch

_SHOWN_TOKENS = 40  # of a prefix; more than fit on a line


def explain_job(
    job: JobSpec, hardware: Sequence[str] = (), workers: int = 1, *, quiet: bool = False
) -> PlanReport:
    """Plans all rows of the job as if none had been answered. Raises UserError.

    `hardware`: names of ready profiles to forecast for beside this machine.
    """
    if job.score is not None:
        raise JobError(
            f"{job.source}: batchllm plan knows no score jobs; run it with --limit to see what it shares"
        )
    progress, watch = Progress(quiet=quiet), Stopwatch()
    with watch.time("open"):
        check_model_folder(job.model.path, job.model.trust_remote_code, need_weights=False)
        config, limit = load_config(job.model.path, job.model.trust_remote_code)
        tokenizer = load_tokenizer(job.model.path, job.model.trust_remote_code)
        data = open_input(job.input, job.source)
        validate_columns(job, data.schema)
    resume_collection()
    text_config, dtype = config.get_text_config(), _dtype(job, config)
    shape = model_shape(text_config)
    threads = torch.get_num_threads()
    named = [ready_profile(name, dtype, threads) for name in _names(hardware)]
    with tempfile.TemporaryDirectory(prefix="batchllm-plan-") as work_dir:
        with watch.time("tokenize"), progress.stage("tokenizing", data.num_rows) as stage:
            rows = load_rows(job, data, tokenizer, Path(work_dir), stage)
        prompts = refuse_long_prompts(rows.prompts, shape.max_length)
        prompts = refuse_unknown_tokens(prompts, shape.vocabulary)
        check_lengths(limit, longest_sequence(prompts), config.model_type)
        past = past_lengths(job.plan.history, job.source, job.input.id, rows.ids)
        lengths = LengthEstimator()
        with watch.time("plan"):
            requests = make_requests(prompts, None, b"")
            draft = draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), plan_options(job))
            teach(lengths, past, prompts.params, draft.row_group)
            draft = draft.expecting(lengths.mean_total)
        with watch.time("forecast"):
            here = this_device(fingerprint(job.model.path, job.model.quantize), dtype, prompts)
            options = _memory(job, here, shape, dtype)
            plan, reason = ordered_plan(draft, job.engine.order, shape, here, dtype, options)
            devices = tuple(
                _device(job, profile, workers, plan, prompts, lengths, shape, dtype)
                for profile in (here, *named)
            )
        with watch.time("explain"):
            reordering = possible_reordering(job, data)
            case = Situation(job, tokenizer, prompts, plan, lengths, shape.max_length, devices, reordering)
            report = _report(case, shape, computed_tokens(draft), reason)
    return replace(report, reordering_saves=rows.reordering_saves, seconds=watch.seconds())


def _dtype(job: JobSpec, config: Any) -> str:
    """The name of what weights are loaded as."""
    if job.model.dtype != "auto":
        return job.model.dtype
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in BYTES_PER_VALUE else "float32"


def _names(hardware: Sequence[str]) -> list[str]:
    return [name for given in hardware for name in given.split(",") if name.strip()]


def _memory(job: JobSpec, profile: DeviceProfile, shape: ModelShape, dtype: str) -> SimulationOptions:
    """What the device leaves for KV, and the steps it takes."""
    size = BYTES_PER_VALUE[dtype]
    budget = _kv_bytes(job, profile, _weight_bytes(job, shape, dtype))
    step = step_tokens(job.engine.max_step_tokens, gpu=profile.memory_bytes is not None)
    return SimulationOptions(budget // shape.kv_bytes_per_token(size), step)


def _device(
    job: JobSpec,
    profile: DeviceProfile,
    workers: int,
    plan: Plan,
    prompts: PromptTable,
    lengths: LengthEstimator,
    shape: ModelShape,
    dtype: str,
) -> DeviceReport:
    size = BYTES_PER_VALUE[dtype]
    weights, options = _weight_bytes(job, shape, dtype), _memory(job, profile, shape, dtype)
    budget = options.kv_tokens * shape.kv_bytes_per_token(size)
    report = DeviceReport(profile.name, workers, 0.0, 0, 0, weights, budget, 0, 0, profile.calibrated)
    if options.kv_tokens < 1:
        return replace(report, failed_sequences=plan.num_sequences)
    forecasts, failed = [], 0
    for part in divided(plan, expected_outputs(plan, prompts, lengths), workers):
        simulation, outputs = simulate_plan(part, prompts, lengths, options)
        forecasts.append(forecast(simulation, outputs, part.num_sequences, shape, profile, dtype))
        failed += simulation.failed
    found = reduce(Forecast.beside, forecasts)
    return replace(
        report,
        seconds=found.seconds,
        steps=found.steps,
        computed_tokens=found.prompt_tokens_computed,
        kv_peak_bytes=found.kv_peak_bytes,
        failed_sequences=failed,
    )


def _weight_bytes(job: JobSpec, shape: ModelShape, dtype: str) -> int:
    """As they lie in memory. `model.quantize` makes a byte of each weight of the layers, but for routed experts."""
    size = BYTES_PER_VALUE[dtype]
    linear = sum(layer.attention_parameters + layer.dense_parameters for layer in shape.layers)
    return shape.weight_bytes(size) - (int((size - 1) * linear) if job.model.quantize else 0)


def _kv_bytes(job: JobSpec, profile: DeviceProfile, weight_bytes: int) -> int:
    """As the job says, else what a run would take."""
    if profile.memory_bytes is not None and not isinstance(job.engine.kv_memory, int):
        return max(0, profile.memory_bytes - weight_bytes)
    return cpu_kv_bytes(job.engine.kv_memory, psutil.virtual_memory().available - weight_bytes)


def _report(case: Situation, shape: ModelShape, computed: ComputedTokens, order_reason: str) -> PlanReport:
    prompts, plan = case.prompts, case.plan
    outputs = int(expected_outputs(plan, prompts, case.lengths).sum())
    history = case.job.plan.history

    def words(row: int, start: int, end: int) -> str:
        first = int(prompts.offsets[row]) + start
        tokens = prompts.tokens[first : first + min(end - start, _SHOWN_TOKENS)]
        return " ".join(str(case.tokenizer.decode(tokens.tolist())).split())

    return PlanReport(
        job=case.job.source,
        model=Path(case.job.model.path).name,
        parameters=shape.parameters,
        rows=prompts.num_rows,
        faulty_rows=len(prompts.faults),
        requests=plan.stats.requests,
        sequences=plan.stats.sequences,
        prompt_tokens=plan.stats.prompt_tokens,
        longest_prompt=int(np.diff(prompts.offsets).max(initial=0)),
        output_tokens=outputs,
        output_source=f"from {history}" if history else "every answer as long as max_tokens",
        sample_rows=case.job.plan.sample_rows or 0,
        computed_tokens=plan.stats.planned_tokens,
        optimum_tokens=plan.stats.distinct_tokens,
        single_level_tokens=computed.best_single_level,
        published_rule_tokens=computed.published_rule,
        reordering_saves=0,
        order_reason=order_reason,
        levels=level_reports(plan),
        prefixes=biggest_prefixes(plan, words),
        shared_prefixes=plan.stats.shared_nodes,
        devices=case.devices,
        warnings=advice(case),
        seconds={},
    )
