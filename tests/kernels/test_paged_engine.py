"""The GPU's code path, kernels included, on a CPU: greedy tokens equal transformers' own, KV bookkeeping holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchllm_kernels.kernel_set import TritonKernels

from batchllm.core import SamplingParams
from batchllm.executor.device import Gpu, Placement
from batchllm.executor.device_engine import DeviceEngine
from batchllm.executor.model import prepare_model
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.paged_pool import PagedPool
from tests.executor.harness import run
from tests.executor.test_exactness import Optimist
from tests.executor.tiny_models import VOCABULARY, configurations, generate_alone, make_model
from tests.kernels.recorded_graph import CpuRecorder, RecordedKernels

# Pages that nobody has written to hold anything, and the interpreter computes with it before it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

MAX_TOKENS = 5


def prompts() -> list[list[int]]:
    """Two levels of sharing, a prompt that begins another, one by itself."""
    random = np.random.default_rng(2)

    def text(length: int) -> list[int]:
        return random.integers(4, VOCABULARY, length).tolist()

    system = text(21)
    document = system + text(18)
    made = [document + text(length) for length in (3, 14)] + [system + text(15), text(29)]
    return [*made, made[0][:41], made[2]]


# Windows and soft caps, sinks, keys wider than values, our own forward pass in small steps, recovery.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain modules": ("llama", {}),
    "our own forward pass": ("qwen3", {"kv_tokens": 160, "max_step_tokens": 24}),
    "window and soft cap": ("gemma2", {}),
    "sinks": ("gpt_oss", {}),
    "wide keys": ("deepseek_v3", {}),
    "recovery": ("mistral", {"kv_tokens": 128, "max_step_tokens": 64, "estimator": Optimist()}),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_output_equals_transformers(name: str, device: torch.device) -> None:
    architecture, options = CASES[name]
    model: Any = make_model(small(configurations()[architecture]))
    expected = [generate_alone(model, prompt, MAX_TOKENS) for prompt in prompts()]
    runner = prepare_model(model, placement=Placement(Gpu("interpreter", True, 1 << 40, device)))
    kernels = RecordedKernels(TritonKernels())
    runner.backend = PagedBackend(device, page_size=16, kernels=kernels)  # type: ignore[arg-type]
    fuses = runner.fuse() if name != "plain modules" else False
    assert fuses == (architecture in ("qwen3", "mistral"))
    recorder = CpuRecorder(kernels) if device.type == "cpu" else None

    def make_engine(*arguments: Any) -> DeviceEngine:
        return DeviceEngine(*arguments, recorder=recorder)

    outcome = run(
        runner, prompts(), SamplingParams(max_tokens=MAX_TOKENS), make_engine=make_engine, **options
    )
    assert [list(result.tokens) for result in outcome.results] == expected
    assert isinstance(outcome.engine.pool, PagedPool)
    assert outcome.engine.pool.used == 0, "KV memory leaked"
    assert (outcome.stats.preemptions > 0) == (name == "recovery")


def small(config: Any) -> Any:
    """Two layers: the interpreter is slow."""
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config
