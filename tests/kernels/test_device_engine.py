"""The GPU's engine on a CPU: launches one ahead, repeated decode steps in graphs, memory that runs out.

Kernels are their torch references here; graphs freeze what a CUDA graph freezes (recorded_graph).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from batchllm_kernels.reference_set import TorchKernels
from batchllm_kernels.tile_config import TileConfig, tile_config

from batchllm.core import SamplingParams
from batchllm.errors import JobError
from batchllm.executor import device_engine, device_model
from batchllm.executor.device import Gpu, Placement
from batchllm.executor.device_engine import DeviceEngine
from batchllm.executor.engine import Engine
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.paged_pool import PagedPool
from batchllm.executor.parity import check_parity
from tests.executor.harness import Outcome, run
from tests.executor.test_exactness import Optimist, prompts_of_every_kind
from tests.executor.tiny_models import configurations, make_model
from tests.kernels.recorded_graph import CpuRecorder, RecordedKernels

CPU = torch.device("cpu")
MAX_TOKENS = 14
FUSED = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"}


@cache
def expected(architecture: str, params: SamplingParams) -> list[Any]:
    """What the CPU's engine answers."""
    model = make_model(configurations()[architecture])
    return run(model, prompts_of_every_kind(), params, max_step_tokens=64).results


@cache
def device_runner(architecture: str) -> ModelRunner:
    placement = Placement(Gpu("torch", True, 1 << 40, CPU))
    runner = prepare_model(make_model(configurations()[architecture]), placement=placement)
    assert runner.fuse() == (architecture in FUSED)
    return runner


def run_on_device(architecture: str, params: SamplingParams, **options: Any) -> Outcome:
    runner = device_runner(architecture)
    kernels = RecordedKernels(TorchKernels(cpu_noise))
    runner.backend = PagedBackend(CPU, page_size=16, kernels=kernels)  # type: ignore[arg-type]
    runner.unfuse()
    runner.fuse()

    make_recorder, make = options.pop("make_recorder", CpuRecorder), options.pop("engine", DeviceEngine)

    def make_engine(*arguments: Any) -> Engine:
        engine: Engine = make(*arguments, recorder=make_recorder(kernels))
        return engine

    prompts = options.pop("prompts", prompts_of_every_kind())
    return run(runner, prompts, params, make_engine=make_engine, **{"max_step_tokens": 64, **options})


def cpu_noise(keys: torch.Tensor, indices: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The Gumbel noise of the CPU's sampler."""
    from batchllm.executor.random_numbers import draw_words, gumbel_noise

    words = torch.from_numpy(draw_words(keys.numpy().view(np.uint64), indices.numpy()))
    return gumbel_noise(words, torch.arange(vocabulary))


ARCHITECTURES = ["llama", "qwen3", "qwen3_moe", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_the_cpu(architecture: str) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS)
    outcome = run_on_device(architecture, params)
    assert outcome.results == expected(architecture, params)
    assert outcome.engine.pool.used == 0 and outcome.stats.preemptions == 0
    stats = outcome.engine.decode.stats  # type: ignore[attr-defined]
    assert stats.launches and stats.replayed + stats.launched > stats.launches, "no step was repeated"


def decoded_tokens(outcome: Outcome) -> int:
    """Of all sequences; several requests may have the same one."""
    firsts = outcome.plan.request[outcome.plan.request_ptr[:-1]]
    return sum(len(outcome.results[request].tokens) for request in firsts)


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny steps": {"max_step_tokens": 5},
    "little memory": {"kv_tokens": 400, "max_step_tokens": 40},
    "recovery": {"kv_tokens": 240, "estimator": Optimist()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_schedule_changes_an_answer(variant: str) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS)
    outcome = run_on_device("llama", params, **VARIANTS[variant])
    assert outcome.results == expected("llama", params)
    assert (outcome.stats.preemptions > 0) == (variant == "recovery")
    assert outcome.stats.output_tokens == decoded_tokens(outcome)


def test_sampled_answers_and_log_probabilities() -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, n=3, logprobs=True)
    found, wanted = run_on_device("llama", params).results, expected("llama", params)
    assert [result.tokens for result in found] == [result.tokens for result in wanted]
    for mine, theirs in zip(found, wanted):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)


def test_steps_are_replayed_without_the_host() -> None:
    """Rows and plans are sent when a sequence starts or ends, or a plan's horizon is reached; not for every step."""
    prompts = [[number, 7, 8, 9, 10, 11] for number in range(4, 10)]
    params = SamplingParams(max_tokens=97, ignore_eos=True)
    outcome = run_on_device("llama", params, prompts=prompts, max_step_tokens=256)
    stats = outcome.engine.decode.stats  # type: ignore[attr-defined]
    assert outcome.stats.output_tokens == 6 * 97
    assert stats.launched == 1 and stats.recorded == 1 and stats.replayed == 95
    assert stats.loads == 1 and stats.launches == 3
    assert stats.plans <= 4


def test_a_step_that_waits_for_the_device_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it tried: torch does not recover from that."""
    mlp = device_model._Layer.mlp

    def waiting(self: Any, normed: torch.Tensor) -> torch.Tensor:
        return mlp(self, normed * bool(normed.isfinite().all()))

    monkeypatch.setattr(device_model._Layer, "mlp", waiting)
    prompts = [[number, 7, 8, 9, 10, 11] for number in range(4, 10)]
    outcome = run_on_device("llama", SamplingParams(max_tokens=9, ignore_eos=True), prompts=prompts)
    engine: Any = outcome.engine
    stats = engine.decode.stats
    assert (stats.launched, stats.recorded, stats.replayed) == (8, 0, 0)
    assert engine._recorder.records == 0
    assert "waits for the device" in stats.not_recorded


def test_experts_in_float32_are_not_recorded() -> None:
    prompts = [[number, 7, 8, 9, 10, 11] for number in range(4, 10)]
    outcome = run_on_device("qwen3_moe", SamplingParams(max_tokens=9, ignore_eos=True), prompts=prompts)
    stats = outcome.engine.decode.stats  # type: ignore[attr-defined]
    assert (stats.launched, stats.recorded) == (8, 0) and stats.not_recorded


class SettlingRecorder(CpuRecorder):
    """The first step waits for the device, to set something up; no other does."""

    watched = 0

    def watch(self, step: Callable[[], object]) -> str | None:
        self.watched += 1
        return super().watch(step) or ("something is set up" if self.watched == 1 else None)


def test_a_step_that_waits_at_first_only_is_recorded() -> None:
    prompts = [[number, 7, 8, 9, 10, 11] for number in range(4, 10)]
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    outcome = run_on_device("llama", params, prompts=prompts, make_recorder=SettlingRecorder)
    stats = outcome.engine.decode.stats  # type: ignore[attr-defined]
    assert (stats.launched, stats.recorded, stats.replayed) == (2, 1, 6)
    assert stats.not_recorded == ""


class FailingRecorder(CpuRecorder):
    def record(self, *_: Any) -> None:
        self.records += 1
        self.failure = "recording failed"


def test_a_step_that_cannot_be_recorded_after_all_is_not_tried_again() -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    outcome = run_on_device("llama", params, prompts=[[5, 6, 7]], make_recorder=FailingRecorder)
    engine: Any = outcome.engine
    assert engine.decode.stats.launched == 8 and engine._recorder.records == 1
    assert engine.decode.stats.not_recorded == "recording failed"


@pytest.fixture
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collection")
def test_a_pool_and_its_graphs_are_gone_with_their_engine() -> None:
    outcome = run_on_device("llama", SamplingParams(max_tokens=MAX_TOKENS))
    engine: Any = outcome.engine
    assert engine.decode.stats.recorded
    pool, decode = weakref.ref(engine.pool), weakref.ref(engine.decode)
    del outcome, engine
    assert pool() is None and decode() is None


class KeptEngine(DeviceEngine):
    made: KeptEngine

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        KeptEngine.made = self


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("failing", ["a step", "the caller"])
def test_a_run_that_is_broken_off_gives_memory_back(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("it fails")

    def fail_once_recorded(_: PagedPool) -> None:
        if KeptEngine.made.decode.stats.recorded:
            raise error

    if failing == "a step":
        fail_in(monkeypatch, lambda call: call == 12, error)
    else:
        monkeypatch.setattr(PagedPool, "check_integrity", fail_once_recorded)
    with pytest.raises(ValueError, match="it fails"):
        run_on_device("llama", SamplingParams(max_tokens=MAX_TOKENS), engine=KeptEngine)
    error.__traceback__ = None
    engine: Any = KeptEngine.made
    assert engine.decode.stats.recorded, "no graph was alive"
    assert engine.pool.keys == engine.pool.values == [] and not engine.decode._batches


def test_tiles_suit_the_type_of_the_model() -> None:
    configs: list[TileConfig] = []

    class Noted(TorchKernels):
        def tree_attention(self, *arguments: Any) -> torch.Tensor:
            configs.append(arguments[5])
            return super().tree_attention(*arguments)

    runner = device_runner("llama")
    backend = PagedBackend(CPU, page_size=16, kernels=Noted(cpu_noise))
    backend.target = "sm_90"
    runner.backend = backend
    runner.unfuse()
    check_parity(runner)
    heads = runner.config.num_attention_heads, runner.config.num_key_value_heads
    dim = runner.layers[0].key_dim
    assert set(configs) == {tile_config(*heads, dim, dim, "sm_90", 16, float32=True)}


def test_steps_without_logits_do_not_reach_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt's middle; transformers' experts cannot be called with no token at all."""
    mlp = device_model._Layer.mlp

    def checked(self: Any, normed: torch.Tensor) -> torch.Tensor:
        assert len(normed), "no token for the experts"
        return mlp(self, normed)

    monkeypatch.setattr(device_model._Layer, "mlp", checked)
    params = SamplingParams(max_tokens=3)
    outcome = run_on_device("qwen3_moe", params, max_step_tokens=5)
    assert outcome.results == expected("qwen3_moe", params)


OUT_OF_MEMORY = {
    "torch": torch.OutOfMemoryError(),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "a graph": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("failing", [2, 5, 9])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_in_a_step_is_answered_by_a_smaller_pool(
    failing: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS)
    fail_in(monkeypatch, lambda call: call == failing, OUT_OF_MEMORY[error])
    outcome = run_on_device("llama", params, kv_tokens=2048)
    assert outcome.results == expected("llama", params)
    assert isinstance(outcome.engine.pool, PagedPool) and 1500 < outcome.engine.pool.capacity < 2048
    assert outcome.engine.pool.used == 0


def test_a_step_that_never_fits_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, lambda call: True)
    with pytest.raises(JobError, match=r"does not suffice for one step; lower engine\.max_step_tokens"):
        run_on_device("llama", SamplingParams(max_tokens=4))


def test_any_other_error_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, lambda call: call == 5, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_on_device("llama", SamplingParams(max_tokens=MAX_TOKENS))


def fail_in(
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[int], bool],
    error: Exception = OUT_OF_MEMORY["torch"],
) -> None:
    """Forward passes for which `fails` holds raise `error`."""
    calls = 0
    logits = ModelRunner.logits

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise error
        return logits(*arguments)

    monkeypatch.setattr(ModelRunner, "logits", failing)


def test_what_is_decoded_beyond_an_end_is_left_out() -> None:
    params = SamplingParams(max_tokens=40)
    found, wanted = run_on_device("llama", params), expected("llama", params)
    assert found.results == wanted
    assert {result.finish_reason for result in wanted} == {"stop", "length"}, "the test needs both"
    assert device_engine.MOST_REPEATS > 1
