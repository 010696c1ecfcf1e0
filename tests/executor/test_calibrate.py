"""Measuring this device: a usable profile from any architecture, probe steps that say what they do, a cache."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from batchllm.core import SamplingParams
from batchllm.executor import calibrate as calibrate_module
from batchllm.executor import profile_cache
from batchllm.executor.calibrate import calibrate
from batchllm.executor.model import prepare_model
from batchllm.executor.probe_steps import probe_steps
from batchllm.planner.cost import step_costs
from batchllm.planner.hardware import ready_profile
from batchllm.planner.loads import StepLoads
from batchllm.planner.model_shape import model_shape
from tests.executor.tiny_models import COMMON, configurations, make_model

GREEDY = SamplingParams()


def test_probe_steps_are_counted_like_the_simulator_counts():
    steps = probe_steps(None)
    for step in steps:
        batch = step.batch
        held = np.array([chunk.held_before for chunk in batch.chunks])
        count = np.array([chunk.count for chunk in batch.chunks])
        assert step.tokens == len(batch.tokens) == count.sum()
        assert step.chunks == len(batch.chunks)
        assert step.own_pairs == (held * count + count * (count + 1) // 2).sum()
        assert step.shared_reads == len(batch.shared_reads)
        readers = [sum(chunk.count for chunk in read.chunks) for read in batch.shared_reads]
        lengths = [read.length for read in batch.shared_reads]
        assert step.shared_pairs == sum(n * length for n, length in zip(readers, lengths))
        assert step.kv_read == (held + count).sum() + sum(lengths)
        assert batch.slots.max() < step.slots
        assert len(np.unique(batch.slots)) == len(batch.slots)
    assert all(max(step.batch.positions) < 300 for step in probe_steps(300))
    assert len(probe_steps(300)) < len(steps)
    assert probe_steps(10)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "one layer"])
def test_every_architecture_gives_a_usable_profile(architecture, monkeypatch):
    config = (
        LlamaConfig(**{**COMMON, "num_hidden_layers": 1})
        if architecture == "one layer"
        else configurations()[architecture]
    )
    model = prepare_model(make_model(config))
    profile = calibrate(model, replace(GREEDY, temperature=0.7, top_p=0.9))
    assert profile.calibrated
    numbers = [getattr(profile, field.name) for field in fields(profile) if field.type == "float"]
    assert all(number >= 0 for number in numbers)
    shape = model_shape(model.text_config)
    loads = StepLoads(*np.array([[1.0, 64, 32, 40, 40, 4000, 900, 2, 9000, 300, 0]]).T)
    found = step_costs(shape, profile, loads, 4).total_seconds
    assert 0 < found < 30


def test_it_leaves_the_model_as_it_was():
    model = prepare_model(make_model(configurations()["llama"]))
    ids = torch.arange(5, 12).unsqueeze(0)
    calibrate(model)
    fresh = make_model(configurations()["llama"])
    with torch.inference_mode():
        from batchllm.executor.parity import check_parity

        check_parity(model)
        model.unfuse()
        model.model.set_attn_implementation("eager")
        assert torch.equal(model.model(ids).logits, fresh(ids).logits)


def test_large_steps_are_left_out_when_time_is_short(monkeypatch):
    model = prepare_model(make_model(LlamaConfig(**{**COMMON, "max_position_embeddings": 8192})))
    full = calibrate(model).layer_rate.rows
    monkeypatch.setattr(calibrate_module, "_BUDGET_SECONDS", 0.0)
    assert calibrate(model).layer_rate.rows == full[:1]


# ---- the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profile_cache, "native_kernels", lambda _dtype: None)  # nothing is compiled there
    return tmp_path / "cache" / "batchllm" / "profiles"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """Calls of `calibrate`, which returns at once."""
    calls: list[SamplingParams] = []

    def instead(_model: object, params: SamplingParams) -> object:
        calls.append(params)
        return replace(ready_profile("cpu", "float32"), weight_bandwidth=float("inf"), calibrated=True)

    monkeypatch.setattr(calibrate_module, "calibrate", instead)
    return calls


class Model:
    dtype = torch.float32


def test_measured_once_for_each_model_dtype_and_way_of_sampling(cache, measured):
    def get(fingerprint="a", dtype=torch.float32, params=GREEDY, may_measure=True):
        model = Model()
        model.dtype = dtype
        return profile_cache.calibrated_profile(model, fingerprint, params, may_measure=may_measure)

    assert get(may_measure=False) is None
    first = get()
    assert first == get() == get(params=replace(GREEDY, max_tokens=99)) == get(may_measure=False)
    assert len(measured) == 1
    assert profile_cache.stored_profile("a", "float32", GREEDY) == first
    get("b")
    get(dtype=torch.bfloat16)
    get(params=replace(GREEDY, temperature=1.0))
    assert len(measured) == len(list(cache.iterdir())) == 4


def test_a_cache_that_does_not_work_is_no_fault(cache, measured, monkeypatch):
    def get():
        return profile_cache.calibrated_profile(Model(), "a", GREEDY, may_measure=True)

    first = get()
    (file,) = cache.iterdir()
    for broken in (b"", b"{}", b"\xff", json.dumps([1]).encode(), b'{"layer_rate": {"rows": 3}}'):
        file.write_bytes(broken)
        assert get() == first
    assert len(measured) == 6
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert get() == first
    assert len(measured) == 7


def test_nothing_is_compiled_to_find_that_nothing_is_kept(cache, monkeypatch):
    monkeypatch.delattr(profile_cache, "native_kernels")
    assert profile_cache.stored_profile("a", "float32", GREEDY) is None


def test_measured_anew_with_or_without_the_kernels(cache, measured, monkeypatch):
    for kernels in (None, object(), None):
        monkeypatch.setattr(profile_cache, "native_kernels", lambda _dtype, kernels=kernels: kernels)
        profile_cache.calibrated_profile(Model(), "a", GREEDY, may_measure=True)
    assert len(measured) == len(list(cache.iterdir())) == 2
