"""Seconds of each step of a job on a device: arithmetic, memory traffic and fixed costs, from the steps' loads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.planner.hardware import DeviceProfile
from batchllm.planner.loads import StepLoads
from batchllm.planner.model_shape import ModelShape

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one step of each entry of the loads, by what they go to."""

    steps: FloatArray  # [entries] as in the loads: how often each entry counts
    layers: FloatArray  # [entries] products with the layers' weights, and reading those
    logits: FloatArray  # [entries] the output projection
    attention: FloatArray  # [entries]
    overhead: FloatArray  # [entries] launches, scheduling, sampling, writing KV

    @property
    def seconds(self) -> FloatArray:
        """[entries]"""
        total: FloatArray = self.layers + self.logits + self.attention + self.overhead
        return total

    @property
    def total_seconds(self) -> float:
        """Of the whole run."""
        return float((self.steps * self.seconds).sum())


def step_costs(
    shape: ModelShape, profile: DeviceProfile, loads: StepLoads, bytes_per_value: float
) -> StepCosts:
    """`bytes_per_value`: of a weight, and of a number in KV."""
    number = len(shape.layers)
    overhead = (
        profile.step_seconds
        + number * (profile.layer_seconds + profile.read_seconds * loads.shared_reads)
        + number * profile.token_seconds * loads.tokens
        + profile.chunk_seconds * loads.chunks
        + profile.row_seconds * loads.logit_rows
    )
    return StepCosts(
        steps=loads.steps,
        layers=_layer_seconds(shape, profile, loads, bytes_per_value),
        logits=_logit_seconds(shape, profile, loads.logit_rows, bytes_per_value),
        attention=_attention_seconds(shape, profile, loads, bytes_per_value),
        overhead=overhead,
    )


def _layer_seconds(
    shape: ModelShape, profile: DeviceProfile, loads: StepLoads, bytes_per_value: float
) -> FloatArray:
    """A product takes as long as its arithmetic or as reading its weights, whichever is longer."""
    tokens, rows = loads.tokens, loads.logit_rows
    compute = tokens * shape.flops_per_token / profile.layer_rate.at(tokens)
    if profile.short_last_layer:
        last = shape.layers[-1]
        keys_and_values = min(shape.hidden_size * last.kv_values, last.attention_parameters)
        saved = 2 * (tokens - rows) * (last.active_parameters - keys_and_values)
        compute -= np.maximum(saved, 0.0) / profile.layer_rate.at(tokens)
    read = sum(count * layer.read_parameters(tokens) for layer, count in Counter(shape.layers).items())
    memory = np.where(tokens > 0, read * bytes_per_value / profile.weight_bandwidth, 0.0)
    return np.maximum(compute, memory)


def _logit_seconds(
    shape: ModelShape, profile: DeviceProfile, rows: FloatArray, bytes_per_value: float
) -> FloatArray:
    compute = rows * shape.flops_per_logit_row / profile.logit_rate.at(rows)
    weights = shape.hidden_size * shape.vocabulary * bytes_per_value
    return np.maximum(compute, np.where(rows > 0, weights / profile.weight_bandwidth, 0.0))


def _attention_seconds(
    shape: ModelShape, profile: DeviceProfile, loads: StepLoads, bytes_per_value: float
) -> FloatArray:
    """Both kinds of reads. In layers with a window, roughly the part of them that lies within it."""
    compute, kv_values = np.zeros(len(loads)), np.zeros(len(loads))
    pair_seconds = loads.shared_pairs / profile.shared_flops + loads.own_pairs / profile.own_flops
    full = shape.layers[:-1] if profile.short_last_layer else shape.layers
    counted = [(layer, np.full(len(loads), float(count))) for layer, count in Counter(full).items()]
    if profile.short_last_layer:
        counted.append((shape.layers[-1], np.minimum(1.0, loads.logit_rows / np.maximum(loads.tokens, 1.0))))
    for layer, seen in counted:
        if layer.window is not None:
            seen = seen * np.minimum(1.0, loads.tokens * layer.window / np.maximum(loads.pairs, 1.0))
        compute += seen * layer.flops_per_pair * pair_seconds
        kv_values += seen * layer.kv_values * loads.kv_read
    memory = kv_values * bytes_per_value / profile.kv_bandwidth
    combined: FloatArray = np.maximum(compute, memory) if profile.overlapped else compute + memory
    return combined
