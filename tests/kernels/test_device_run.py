"""Whole jobs on the GPU's code path, kernels in the interpreter: the same answers as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batchllm.executor import device as devices
from batchllm.executor.device import Gpu, Machine
from batchllm.llm import LLM
from batchllm.llm_params import SamplingParams
from tests.jobs import exit_code_of, make_job, questions, read_output

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture
def machine(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU where there is none: its tensors are the CPU's, its kernels run in the interpreter."""
    if device.type != "cuda":
        found = Machine(Gpu("interpreter", True, 1 << 40, device))
        monkeypatch.setattr(devices, "this_machine", lambda: found)
        monkeypatch.setattr("batchllm.llm.this_machine", lambda: found)


@pytest.mark.usefixtures("machine")
def test_a_job_gives_the_answers_of_the_cpu(model_folder: Path, tmp_path: Path) -> None:
    """Prompts of several pages, two levels of sharing; short, for the interpreter takes long over each token."""
    system = "Answer in one word. "
    topic = system + "The topic is number 1, as was agreed before. "
    prompts = [topic + "Red?", topic + "Blue, or not?", system + "Why?", "Alone."]
    rows = [{"id": str(number), "prompt": prompt} for number, prompt in enumerate(prompts)]
    answers = []
    for device in ("cpu", "cuda"):
        job = make_job(
            tmp_path / device,
            model_folder,
            rows,
            generate={"max_tokens": 4, "logprobs": True},
            engine={"device": device, "kv_memory": "4MiB", "min_shared_tokens": 8},
        )
        assert exit_code_of("run", job) == 0
        answers.append(read_output(tmp_path / device / "out"))
    on_cpu, on_gpu = answers
    assert on_gpu["shared_tokens"].sum() > len(topic)
    assert on_gpu["output"].to_list() == on_cpu["output"].to_list()
    assert on_gpu["output_tokens"].to_list() == on_cpu["output_tokens"].to_list()


def test_a_job_without_a_gpu_says_so(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "this_machine", lambda: Machine(None, "torch finds no GPU"))
    rows = questions(2)
    refused = make_job(tmp_path / "cuda", model_folder, rows, engine={"device": "cuda"})
    assert exit_code_of("run", refused) == 2
    assert "cuda cannot be used, for torch finds no GPU" in capfd.readouterr().err
    assert not (tmp_path / "cuda" / "out").exists()
    fallen_back = make_job(tmp_path / "auto", model_folder, rows, engine={"device": "auto"})
    assert exit_code_of("run", fallen_back) == 0
    assert "auto runs on the CPU, for torch finds no GPU" in capfd.readouterr().err


@pytest.mark.usefixtures("machine")
def test_llm_takes_a_device(model_folder: Path) -> None:
    prompts: list[Any] = ["The same beginning, then one.", "The same beginning, then two."]
    params = SamplingParams(temperature=0.8, top_p=0.9, n=2, max_tokens=3)
    texts = [
        [
            [output.token_ids for output in one.outputs]
            for one in made.generate(prompts, params, use_tqdm=False)
        ]
        for made in (LLM(str(model_folder), device=device) for device in ("cpu", "cuda"))
    ]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="device must be"):
        LLM(str(model_folder), device="gpu")
