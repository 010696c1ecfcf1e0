"""Seconds of steps: their parts follow from the figures of the profile and the model, and from nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig, MistralConfig

from batchllm.errors import JobError
from batchllm.planner.cost import step_costs
from batchllm.planner.fit import nonnegative_fit
from batchllm.planner.hardware import NAMES, DeviceProfile, RateCurve, ready_profile
from batchllm.planner.loads import StepLoads
from batchllm.planner.model_shape import model_shape

CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
SHAPE = model_shape(LlamaConfig(**CONFIG))
LAYER = 2 * SHAPE.layers[0].active_parameters  # FLOPs of a token
FREE = DeviceProfile(
    name="a device on which nothing takes time",
    layer_rate=RateCurve((1.0,), (float("inf"),)),
    logit_rate=RateCurve((1.0,), (float("inf"),)),
    weight_bandwidth=float("inf"),
    shared_flops=float("inf"),
    own_flops=float("inf"),
    kv_bandwidth=float("inf"),
    overlapped=False,
    step_seconds=0.0,
    layer_seconds=0.0,
    read_seconds=0.0,
    token_seconds=0.0,
    chunk_seconds=0.0,
    row_seconds=0.0,
)
LOADS = {
    "steps": 1,
    "prompt_tokens": 100,
    "decode_tokens": 28,
    "logit_rows": 30,
    "chunks": 31,
    "own_pairs": 6000,
    "own_kv_read": 900,
    "shared_reads": 2,
    "shared_pairs": 50_000,
    "shared_kv_read": 700,
    "copied_tokens": 5,
}


def loads(**changes: float) -> StepLoads:
    return StepLoads(**{name: np.array([float(value)]) for name, value in {**LOADS, **changes}.items()})


def seconds(profile: DeviceProfile, shape=SHAPE, **changes: float) -> float:
    return step_costs(shape, profile, loads(**changes), 2).total_seconds


def rate(flops: float) -> RateCurve:
    return RateCurve((1.0,), (flops,))


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [
        ("layer_rate", rate(1e9), 12 * 128 * LAYER / 1e9),
        ("logit_rate", rate(1e9), 30 * 2 * 1024 * 32_000 / 1e9),
        (
            "weight_bandwidth",
            1e9,
            (12 * LAYER + 2 * 1024 * 32_000) / 1e9,
        ),  # 2 bytes each, LAYER is twice as many
        ("shared_flops", 1e9, 12 * 50_000 * 4 * 16 * 64 / 1e9),
        ("own_flops", 1e9, 12 * 6000 * 4 * 16 * 64 / 1e9),
        ("kv_bandwidth", 1e9, 1600 * SHAPE.kv_bytes_per_token(2) / 1e9),
        ("step_seconds", 0.5, 0.5),
        ("layer_seconds", 0.5, 12 * 0.5),
        ("read_seconds", 0.5, 12 * 2 * 0.5),
        ("token_seconds", 0.5, 12 * 128 * 0.5),
        ("chunk_seconds", 0.5, 31 * 0.5),
        ("row_seconds", 0.5, 30 * 0.5),
    ],
)
def test_each_figure_costs_what_it_says(figure, value, expected):
    assert seconds(FREE) == 0
    profile = replace(FREE, **{figure: value})
    assert seconds(profile) == pytest.approx(expected)
    assert seconds(profile, steps=7) == pytest.approx(7 * expected)


def test_a_product_is_bound_by_arithmetic_or_by_its_weights():
    profile = replace(FREE, layer_rate=rate(1e12), weight_bandwidth=1e11)
    few, many = ({"prompt_tokens": tokens, "decode_tokens": 0, "logit_rows": 0} for tokens in (1, 1000))
    assert seconds(profile, **few) == pytest.approx(12 * LAYER / 1e11)
    assert seconds(profile, **many) == pytest.approx(12 * LAYER * 1000 / 1e12)


def test_attention_hides_reads_where_they_overlap():
    slow = replace(FREE, shared_flops=1e9, kv_bandwidth=1e6)
    pairs, reads = seconds(replace(FREE, shared_flops=1e9)), seconds(replace(FREE, kv_bandwidth=1e6))
    assert seconds(slow) == pytest.approx(pairs + reads)
    assert seconds(replace(slow, overlapped=True)) == pytest.approx(max(pairs, reads))


def test_windows_bound_what_is_attended_to():
    windowed = model_shape(MistralConfig(**CONFIG, sliding_window=16))
    profile = replace(FREE, shared_flops=1e9, own_flops=1e9)
    assert seconds(profile, windowed) == pytest.approx(12 * 128 * 16 * 4 * 16 * 64 / 1e9)
    few = {"shared_pairs": 100, "own_pairs": 50}
    assert seconds(profile, windowed, **few) == pytest.approx(seconds(profile, **few))


def test_a_short_last_layer_works_for_rows_with_logits_only():
    profile = replace(FREE, layer_rate=rate(1e9), short_last_layer=True)
    keys_and_values = 2 * 1024 * 2 * 4 * 64
    last = 30 * LAYER + 98 * keys_and_values
    assert seconds(profile) == pytest.approx((11 * 128 * LAYER + last) / 1e9)
    pairs = replace(FREE, shared_flops=1e9, short_last_layer=True)
    assert seconds(pairs) == pytest.approx((11 + 30 / 128) * 50_000 * 4 * 16 * 64 / 1e9)


def test_rates_between_the_measured_ones():
    curve = RateCurve((1.0, 100.0), (1e9, 1e11))
    assert curve.at(np.array([0.0, 1.0, 10.0, 100.0, 5000.0])) == pytest.approx([1e9, 1e9, 1e10, 1e11, 1e11])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ready_profiles_are_within_what_such_devices_do(name, dtype):
    profile = ready_profile(name.upper(), dtype, threads=2)
    peak = float(profile.layer_rate.at(np.array([4096.0]))[0])
    assert 1e10 < profile.shared_flops <= peak < 2e15
    assert 5e9 < profile.kv_bandwidth < 8e12
    assert (profile.memory_bytes is None) == (name == "cpu")
    assert not profile.calibrated
    decode = step_costs(SHAPE, profile, loads(prompt_tokens=0), 2).total_seconds
    prefill = step_costs(SHAPE, profile, loads(prompt_tokens=4000, own_pairs=8e6), 2).total_seconds
    assert 0 < decode < prefill


def test_h200_is_as_measured():
    """Design figures: bfloat16 products 769-798 TFLOP/s, copies 4.3 TB/s."""
    profile = ready_profile("h200", "bfloat16")
    assert 769e12 <= float(profile.layer_rate.at(np.array([8192.0]))[0]) <= 798e12
    assert profile.kv_bandwidth == pytest.approx(4.3e12, rel=0.01)


def test_unknown_hardware_is_a_users_error():
    with pytest.raises(JobError, match="did you mean h100"):
        ready_profile("h10O", "bfloat16")
    with pytest.raises(JobError, match="choose from h100, h200, a100, l40s, mi300x, cpu"):
        ready_profile("abacus", "bfloat16")


def test_fit_finds_the_parts_and_never_a_negative_one():
    rng = np.random.default_rng(0)
    features = rng.uniform(0, [1, 1e4, 1e8, 10], (12, 4))
    true = np.array([2e-3, 0.0, 3e-9, 5e-4])
    assert nonnegative_fit(features, features @ true) == pytest.approx(true, rel=1e-6, abs=1e-12)
    noisy = features @ true * rng.uniform(0.9, 1.1, 12)
    found = nonnegative_fit(features, noisy)
    assert (found >= 0).all()
    assert found[2] == pytest.approx(3e-9, rel=0.3)
    falling = nonnegative_fit(np.array([[1.0, 1.0], [1.0, 10.0]]), np.array([5.0, 1.0]))
    assert falling[1] == 0  # no part costs less than nothing
