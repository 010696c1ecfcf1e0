"""Which device is chosen, what it is said to lack, and KV memory that fits it. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from batchllm.errors import JobError, ModelError
from batchllm.executor import budget, device_memory, model
from batchllm.executor.budget import kv_token_budget
from batchllm.executor.device import Gpu, Machine, Placement, choose_device, this_machine
from batchllm.executor.device_memory import activation_bytes, largest_pool
from batchllm.executor.model import prepare_model
from batchllm.executor.ready_model import load_ready_model
from tests.executor.tiny_models import configurations, make_model

CPU = torch.device("cpu")
GPU = Gpu("a GPU", True, 80 << 30, CPU)
LACKING = {
    "no GPU": (Machine(None, "torch finds no GPU"), "torch finds no GPU"),
    "triton": (Machine(GPU, has_triton=False), "triton is not installed; run pip install triton or"),
    "bfloat16": (Machine(Gpu("Tesla T4", False, 16 << 30, CPU)), "Tesla T4 does not compute in bfloat16"),
    "memory": (Machine(Gpu("a GPU", True, 15 << 30, CPU)), "weights take 16.0 GB and a GPU has 16.1 GB free"),
}
WEIGHTS = 16_000_000_000


@pytest.mark.parametrize("lack", LACKING)
def test_cuda_is_refused_and_auto_falls_back(lack: str) -> None:
    machine, reason = LACKING[lack]
    with pytest.raises(JobError) as refusal:
        choose_device("cuda", WEIGHTS, machine)
    sentence = str(refusal.value)
    assert reason in sentence and "engine.device" in sentence and sentence.endswith("set it to cpu.")
    fallen_back = choose_device("auto", WEIGHTS, machine)
    assert fallen_back.gpu is None and fallen_back.device == CPU
    assert fallen_back.note is not None and reason.split(";")[0] in fallen_back.note
    assert choose_device("cpu", WEIGHTS, machine) == Placement()


def test_a_gpu_that_works_is_taken() -> None:
    for wanted in ("auto", "cuda"):
        assert choose_device(wanted, WEIGHTS, Machine(GPU)) == Placement(GPU)
    assert choose_device("cpu", WEIGHTS, Machine(GPU)).gpu is None


def test_what_is_quantised_runs_on_the_cpu() -> None:
    with pytest.raises(JobError, match=r"works on a CPU only; leave model.quantize out or set it to cpu"):
        choose_device("cuda", WEIGHTS, Machine(GPU), "int8_dynamic")
    placement = choose_device("auto", WEIGHTS, Machine(GPU), "int8_dynamic")
    assert placement == Placement(
        note="engine.device: auto runs on the CPU, for model.quantize works on a CPU only"
    )
    with pytest.raises(ModelError, match=r"works on a CPU only: set engine.device: cpu or leave"):
        load_ready_model("no such folder", placement=Placement(GPU), quantize="int8_dynamic")


def test_this_machine_says_what_is_missing() -> None:
    machine = this_machine()
    assert (machine.gpu is None) == (not torch.cuda.is_available())
    assert machine.gpu is not None or machine.missing


def test_a_pool_that_does_not_fit_is_made_smaller() -> None:
    asked: list[int] = []

    def make(tokens: int) -> int:
        asked.append(tokens)
        if tokens > 700:
            raise torch.OutOfMemoryError
        return tokens

    assert largest_pool(make, 1000) == asked[-1] <= 700
    assert asked[:2] == [1000, 1000], "what nothing refers to any more is given back first"
    assert asked[-1] > 0.85 * 700, "no smaller than it has to be"
    with pytest.raises(JobError, match="no room for 10,000 tokens"):
        largest_pool(make, 10_000)
    with pytest.raises(JobError):
        largest_pool(make, 1000, smallest=900)


def test_activations_grow_with_the_step_and_the_model() -> None:
    llama = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    size = activation_bytes(llama, torch.bfloat16, 8192, 1024)
    assert 2e9 < size < 6e9
    assert activation_bytes(llama, torch.bfloat16, 4096, 1024) < size
    assert activation_bytes(llama, torch.bfloat16, 8192, 2048) == size + 1024 * 128_256 * 6
    for config in configurations().values():
        assert activation_bytes(config.get_text_config(), torch.float32, 8, 8) > 0


def test_kv_gets_what_weights_and_activations_leave() -> None:
    runner = prepare_model(make_model(configurations()["llama"]), placement=Placement(GPU))
    each = runner.backend.bytes_per_token(runner.layers, runner.dtype)
    needed = activation_bytes(runner.text_config, runner.dtype, 64, 64)
    free = 2 * needed + 1000 * each
    assert kv_token_budget(runner, "auto", 64, free) == int(0.97 * free - needed) // each
    assert kv_token_budget(runner, 10 * each, 64, free) == 10
    with pytest.raises(JobError, match=r"lower engine\.max_step_tokens"):
        kv_token_budget(runner, "auto", 64, needed)
    assert device_memory.free_bytes(CPU) > 0


def test_weights_that_do_not_fit_after_all_are_one_sentence(
    model_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "prepare_model", refuse)
    with pytest.raises(ModelError, match="do not fit in the GPU's memory"):
        model.load_model(str(model_folder))


def test_what_an_earlier_run_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a budget that follows free memory would be smaller in every run."""
    runner = prepare_model(make_model(configurations()["llama"]))
    kept = [runner.backend.make_pool(runner.layers, 64, runner.dtype).keys[0].data_ptr()]
    assert runner.backend.make_pool(runner.layers, 64, runner.dtype).keys[0].data_ptr() in kept
    asked: list[str] = []
    monkeypatch.setattr(runner.backend, "release_kept", lambda: asked.append("release"))
    monkeypatch.setattr(budget, "free_bytes", lambda _device: asked.append("free") or 1 << 30)
    kv_token_budget(runner, 1 << 20)
    assert asked == ["free"]
    kv_token_budget(runner, "auto")
    assert asked == ["free", "release", "free"]
