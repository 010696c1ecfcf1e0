"""Measures what this device does with this very model, in a few seconds: a DeviceProfile for the cost model.

The model's own modules run on a few representative steps, but only their first layers: the forward pass is left once
enough layers have called attention. Scheduling and sampling are measured by an engine whose model answers at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.executor.backend import CpuBackend
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.forward_context import StepAttention
from batchllm.executor.greedy_head import needs_only_largest
from batchllm.executor.kv_buffers import KvBuffers
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.model import ModelRunner
from batchllm.executor.probe_steps import ProbeStep, probe_steps
from batchllm.executor.step import StepBatch
from batchllm.executor.stopping import StopRules
from batchllm.planner.fit import nonnegative_fit
from batchllm.planner.hardware import DeviceProfile, RateCurve
from batchllm.planner.model_shape import ModelShape, model_shape
from batchllm.planner.plan import PlanOptions, build_plan

_clock = time.perf_counter
_LAYERS = 3  # that run of each probe step; the first one also plans the step's reads
_BUDGET_SECONDS = 2.5
_LOGIT_ROWS = (1, 16, 64)
_SEQUENCES = (4, 48)
_DECODED = 6


@dataclass
class _Timing:
    """Of one probe step."""

    step: ProbeStep
    layer_seconds: float  # a layer without its attention
    attention_seconds: float  # of a layer
    plan_seconds: float  # once a step: which stretches are read


def calibrate(model: ModelRunner, params: SamplingParams | None = None) -> DeviceProfile:
    """A profile of this device running `model`, sampling with `params`. Takes a few seconds, the largest model too."""
    shape = model_shape(model.text_config)
    timings = _time_steps(model)
    params = params or SamplingParams()
    fixed, row = _engine_overhead(model, params, shape.vocabulary)
    plan_fixed, plan_chunk = _plan_overhead(timings)
    attention = _attention_fit(timings, shape, model.dtype.itemsize)
    return DeviceProfile(
        name="this device",
        layer_rate=_layer_rate(timings, shape),
        logit_rate=_logit_rate(model, shape, params),
        weight_bandwidth=float("inf"),  # the measured rates of few rows know it
        shared_flops=attention.shared_flops,
        own_flops=attention.own_flops,
        kv_bandwidth=attention.kv_bandwidth,
        overlapped=False,
        step_seconds=fixed + plan_fixed,
        layer_seconds=attention.layer_seconds,
        read_seconds=attention.read_seconds,
        token_seconds=attention.token_seconds,
        chunk_seconds=plan_chunk,
        row_seconds=row,
        calibrated=True,
        short_last_layer=model.fused,
    )


# ---- layers and attention


def _time_steps(model: ModelRunner) -> list[_Timing]:
    """Small steps first, and no larger ones once the time is spent."""
    started = _clock()
    steps = probe_steps(model.max_length)
    pool = KvPool(KvBuffers.empty(model.layers, max(step.slots for step in steps), model.dtype))
    _fill(pool)
    _time_step(model, pool, steps[0])  # the first pass of a process is slow
    timings: list[_Timing] = []
    for step in steps:
        spent = _clock() - started
        if timings and spent + _expected_seconds(step, timings[-1]) > _BUDGET_SECONDS:
            continue
        repeats = 3 if step.tokens <= 64 else 1
        runs = [_time_step(model, pool, step) for _ in range(repeats)]
        timings.append(min(runs, key=lambda run: run.layer_seconds + run.attention_seconds))
    return timings


def _expected_seconds(step: ProbeStep, last: _Timing) -> float:
    seconds = _LAYERS * (last.layer_seconds + last.attention_seconds)
    return seconds * max(1.0, step.tokens / last.step.tokens)


def _fill(pool: KvPool) -> None:
    """Numbers like real ones: zeros would be memory that does not exist yet, and exp(0) everywhere."""
    for buffer in (*pool.keys[:_LAYERS], *pool.values[:_LAYERS]):
        buffer.normal_()


class _Enough(Exception):
    """Leaves a forward pass."""


@dataclass
class _TimedAttention:
    """`StepAttention` that notes when it is entered and left, and ends the pass after some layers."""

    inner: StepAttention
    layers: int
    entered: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)

    @property
    def logit_rows(self) -> Tensor | None:
        return self.inner.logit_rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.entered.append(_clock())
        if len(self.entered) > self.layers:
            raise _Enough
        output = self.inner.attend(layer, query, key, value, **options)
        self.left.append(_clock())
        return output


def _time_step(model: ModelRunner, pool: KvPool, step: ProbeStep) -> _Timing:
    attention = _TimedAttention(CpuBackend().attention(pool, step.batch), min(_LAYERS, len(model.layers) - 1))
    started = _clock()
    with suppress(_Enough):
        model.forward(step.batch, attention)
    if not attention.left:  # a model of one layer: all of it
        return _Timing(step, _clock() - started, 0.0, 0.0)
    between = [start - end for start, end in zip(attention.entered[1:], attention.left)]
    inside = [end - start for start, end in zip(attention.entered, attention.left)]
    later = inside[1:] or inside
    per_layer = float(np.median(later))
    return _Timing(step, float(np.median(between)), per_layer, max(0.0, inside[0] - per_layer))


def _layer_rate(timings: list[_Timing], shape: ModelShape) -> RateCurve:
    """By rows; of steps with equally many the mean."""
    flops = shape.flops_per_token / len(shape.layers)
    by_rows: dict[int, list[float]] = {}
    for timing in timings:
        by_rows.setdefault(timing.step.tokens, []).append(timing.layer_seconds)
    rows = sorted(by_rows)
    rates = [count * flops / max(1e-9, float(np.mean(by_rows[count]))) for count in rows]
    return RateCurve(tuple(map(float, rows)), tuple(rates))


@dataclass(frozen=True)
class _Attention:
    layer_seconds: float
    read_seconds: float
    token_seconds: float
    shared_flops: float
    own_flops: float
    kv_bandwidth: float


def _attention_fit(timings: list[_Timing], shape: ModelShape, value_bytes: int) -> _Attention:
    """Seconds of a layer's attention = fixed + shared nodes + tokens + shared pairs + own pairs + KV read."""
    steps = [timing.step for timing in timings]
    features = np.array(
        [[1, s.shared_reads, s.tokens, s.shared_pairs, s.own_pairs, s.kv_read] for s in steps],
        dtype=np.float64,
    )
    seconds = np.array([timing.attention_seconds for timing in timings])
    fixed, node, token, shared, own, read = nonnegative_fit(features, seconds).tolist()
    flops = shape.flops_per_pair / len(shape.layers)
    kv_values = sum(layer.kv_values for layer in shape.layers) / len(shape.layers)
    return _Attention(
        layer_seconds=fixed,
        read_seconds=node,
        token_seconds=token,
        shared_flops=_rate(flops, shared),
        own_flops=_rate(flops, own),
        kv_bandwidth=_rate(kv_values * value_bytes, read),
    )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else float("inf")


def _plan_overhead(timings: list[_Timing]) -> tuple[float, float]:
    """Seconds a step and seconds a chunk."""
    features = np.array([[1, timing.step.chunks] for timing in timings], dtype=np.float64)
    seconds = np.array([max(1e-6, timing.plan_seconds) for timing in timings])
    fixed, chunk = nonnegative_fit(features, seconds).tolist()
    return fixed, chunk


# ---- the output projection


@torch.inference_mode()
def _logit_rate(model: ModelRunner, shape: ModelShape, params: SamplingParams) -> RateCurve:
    """With the choice of the token, where that needs no logits."""
    layer = model.model.get_output_embeddings()
    head = model.greedy_head if needs_only_largest(params) else None

    def project(states: Tensor) -> object:
        return layer(states).float() if head is None else head.tokens(states)

    rates = []
    for rows in _LOGIT_ROWS:
        states = torch.randn(rows, shape.hidden_size).to(model.dtype)
        seconds = _fastest(lambda states=states: project(states))  # type: ignore[misc]
        rates.append(rows * shape.flops_per_logit_row / seconds)
    return RateCurve(tuple(map(float, _LOGIT_ROWS)), tuple(rates))


def _fastest(work: Callable[[], object], repeats: int = 2) -> float:
    seconds = []
    for _ in range(repeats):
        started = _clock()
        work()
        seconds.append(_clock() - started)
    return max(1e-9, min(seconds))


# ---- scheduling and sampling


class _InstantModel:
    """Answers with the same logits always, or at once with tokens if it `chooses`."""

    exact_length = None

    def __init__(self, model: ModelRunner, rows: int, vocabulary: int, chooses: bool) -> None:
        self.layers, self.dtype = model.layers[:1], model.dtype
        self.backend = CpuBackend()
        self._logits = torch.randn(rows, vocabulary)
        self._chooses = chooses

    def forward(self, batch: StepBatch, _attention: object) -> Tensor:
        return self._logits[: len(batch.logit_rows)]

    def greedy_tokens(self, batch: StepBatch, _attention: object) -> NDArray[np.int64] | None:
        return np.zeros(len(batch.logit_rows), dtype=np.int64) if self._chooses else None


def _engine_overhead(model: ModelRunner, params: SamplingParams, vocabulary: int) -> tuple[float, float]:
    """Seconds of a step and seconds of a sampled row, everything but the model."""
    few, many = (_engine_seconds(model, params, vocabulary, count) for count in _SEQUENCES)
    row = max(0.0, many - few) / (_SEQUENCES[1] - _SEQUENCES[0])
    return max(0.0, few - row * _SEQUENCES[0]), row


def _engine_seconds(model: ModelRunner, params: SamplingParams, vocabulary: int, sequences: int) -> float:
    """The median step of `sequences` that all decode."""
    chosen = SamplingParams(
        max_tokens=_DECODED,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        ignore_eos=True,
        logprobs=params.logprobs,
    )
    tokens = (np.arange(sequences * 8) % vocabulary).astype(np.int32)
    offsets = np.arange(0, len(tokens) + 1, 8)
    prompts = PromptTable(tokens, offsets, (chosen,), np.zeros(sequences, dtype=np.int32), {})
    row = np.arange(sequences)
    key = np.stack([row, row], axis=1).astype(np.uint64)
    requests = RequestTable(row, np.zeros(sequences, dtype=np.int32), key)
    plan = build_plan(prompts, requests, np.ones(sequences, dtype=bool), PlanOptions())
    chooses = needs_only_largest(chosen) and model.greedy_head is not None
    stub: Any = _InstantModel(model, sequences, vocabulary, chooses)
    options = EngineOptions(kv_tokens=sequences * (_DECODED + 64))
    engine = Engine(stub, plan, prompts, requests, StopRules(frozenset(), None), options)
    marks = [_clock()]
    for _ in engine.run():
        marks.append(_clock())
    return float(np.median(np.diff(marks)[1:-1]))
