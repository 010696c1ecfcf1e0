"""The GPU's engine on a CPU: launches one ahead, repeated decode steps in graphs, memory that runs out.

Kernels are their torch references here; graphs freeze what a CUDA graph freezes (recorded_graph).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from batchllm_kernels.reference_set import TorchKernels

from batchllm.core import SamplingParams
from batchllm.errors import JobError
from batchllm.executor import device_engine
from batchllm.executor.device import Gpu, Placement
from batchllm.executor.device_engine import DeviceEngine
from batchllm.executor.engine import Engine
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.paged_pool import PagedPool
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

    def make_engine(*arguments: Any) -> Engine:
        return DeviceEngine(*arguments, recorder=CpuRecorder(kernels))

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


def test_a_step_that_waits_for_the_device_is_never_recorded() -> None:
    runner = device_runner("qwen3_moe")  # transformers' experts pick their tokens on the host
    outcome = run_on_device("qwen3_moe", SamplingParams(max_tokens=6, ignore_eos=True))
    stats = outcome.engine.decode.stats  # type: ignore[attr-defined]
    assert runner.fused and stats.recorded == stats.replayed == 0 and stats.launched > 1


@pytest.mark.parametrize("failing", [2, 5, 9])
def test_memory_that_runs_out_in_a_step_is_answered_by_a_smaller_pool(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS)
    fail_in(monkeypatch, lambda call: call == failing)
    outcome = run_on_device("llama", params, kv_tokens=2048)
    assert outcome.results == expected("llama", params)
    assert isinstance(outcome.engine.pool, PagedPool) and 1500 < outcome.engine.pool.capacity < 2048
    assert outcome.engine.pool.used == 0


def test_a_step_that_never_fits_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, lambda call: True)
    with pytest.raises(JobError, match=r"does not suffice for one step; lower engine\.max_step_tokens"):
        run_on_device("llama", SamplingParams(max_tokens=4))


def fail_in(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Forward passes for which `fails` holds find no memory."""
    calls = 0
    logits = ModelRunner.logits

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise torch.OutOfMemoryError
        return logits(*arguments)

    monkeypatch.setattr(ModelRunner, "logits", failing)


def test_what_is_decoded_beyond_an_end_is_left_out() -> None:
    params = SamplingParams(max_tokens=40)
    found, wanted = run_on_device("llama", params), expected("llama", params)
    assert found.results == wanted
    assert {result.finish_reason for result in wanted} == {"stop", "length"}, "the test needs both"
    assert device_engine.MOST_REPEATS > 1
