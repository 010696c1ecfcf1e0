"""`model.quantize`: the key, a whole job in each mode, and no answer of one taken for another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import batchllm
from batchllm.errors import JobError, ModelError
from batchllm.executor import device, quantize
from batchllm.executor.model_folder import fingerprint
from batchllm.executor.quantize import QUANTIZATIONS
from batchllm.job import load_job
from tests.jobs import exit_code_of, make_job, questions, read_metrics, texts
from tests.tiny_tokenizer import byte_tokenizer

ROWS = questions(4)


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> Path:
    return make_job(tmp_path, model_folder, ROWS)


def test_the_key_takes_the_modes_and_nothing_else(job: Path) -> None:
    assert load_job(job).model.quantize is None
    for quantization in QUANTIZATIONS:
        assert load_job(job, [f"model.quantize={quantization}"]).model.quantize == quantization
    with pytest.raises(JobError, match="quantize must be int8_weight_only or int8_dynamic, found"):
        load_job(job, ["model.quantize=int4"])


def test_each_mode_is_another_model(model_folder: Path) -> None:
    prints = {fingerprint(str(model_folder), mode) for mode in (None, *QUANTIZATIONS)}
    assert len(prints) == 3
    assert fingerprint(str(model_folder)) in prints


def test_without_torchao_nothing_starts(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    assert exit_code_of("run", job, "--set", "model.quantize=int8_dynamic") == 2
    assert "pip install torchao" in capsys.readouterr().err
    assert not (job.parent / "out").exists()
    with pytest.raises(ModelError, match="pip install torchao"):
        batchllm.LLM(model=str(model_folder), quantize="int8_dynamic")


def test_a_job_in_each_mode_and_no_resume_across_modes(job: Path, model_folder: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    answers = {}
    assert exit_code_of("run", job) == 0
    for quantization in QUANTIZATIONS:
        assert exit_code_of("run", job, "--set", f"model.quantize={quantization}") == 0
        assert read_metrics(job.parent / "out")["rows_resumed"] == 0
        answers[quantization] = texts(job.parent / "out")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name.endswith("_proj"))
    expected = {(row["id"], 0): _answer(model, row["prompt"]) for row in ROWS}
    assert answers["int8_weight_only"] == expected
    assert exit_code_of("run", job, "--set", "model.quantize=int8_dynamic") == 0
    assert read_metrics(job.parent / "out")["rows_resumed"] == len(ROWS)


def test_llm_takes_the_same_argument(model_folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    greedy = batchllm.SamplingParams(temperature=0, max_tokens=2)
    llm = batchllm.LLM(model=str(model_folder), quantize="int8_weight_only")
    assert llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].finish_reason == "length"
    with pytest.raises(ModelError, match="must be int8_weight_only or int8_dynamic"):
        batchllm.LLM(model=str(model_folder), quantize="int3")


def _answer(model: torch.nn.Module, prompt: str) -> str:
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_gpu_is_refused_or_left_alone(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    gpu = device.Gpu("a GPU", True, 80 << 30, torch.device("cpu"))
    monkeypatch.setattr(device, "this_machine", lambda: device.Machine(gpu))
    arguments = ("run", job, "--set", "model.quantize=int8_weight_only", "--set")
    assert exit_code_of(*arguments, "engine.device=cuda") == 2
    assert "model.quantize works on a CPU only; leave model.quantize out or set it" in capsys.readouterr().err
    assert not (job.parent / "out").exists()
    assert exit_code_of(*arguments, "engine.device=auto") == 0
    assert "runs on the CPU, for model.quantize works on a CPU only" in capsys.readouterr().err


def test_a_plan_counts_a_byte_for_each_weight_of_a_layer(
    job: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for arguments in ((), ("--set", "model.quantize=int8_dynamic")):
        assert exit_code_of("plan", job, "--json", *arguments) == 0
        sizes.append(json.loads(capsys.readouterr().out)["devices"][0]["weight_bytes"])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert sizes[0] - sizes[1] == 3 * sum(linear.weight.numel() for linear in linears)
