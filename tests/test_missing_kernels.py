"""A run without the kernels in C says why, where something can be done about it; its metrics say it always."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from batchllm import LLM
from batchllm.executor import native
from batchllm.executor.device import Gpu, Placement
from batchllm.executor.model import ModelRunner, prepare_model
from tests.executor.tiny_models import configurations, make_model
from tests.jobs import exit_code_of, make_job, questions, read_metrics
from tests.test_chunks_run import rag_job, rag_rows
from tests.test_score_job import score_job

REASON = "gcc could not compile them: few.h:54: error: a constant is needed"
NOTE = f"the kernels in C are missing, so this takes several times as long as it could: {REASON}"


@pytest.fixture(autouse=True)
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda _folder: REASON)
    monkeypatch.setattr(native, "cpu_has_bfloat16_products", lambda: True)


def runner(dtype: torch.dtype) -> ModelRunner:
    return prepare_model(make_model(configurations()["llama"]).to(dtype))


@pytest.mark.parametrize("kind", ["answers", "scores"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_says_why_it_is_slow(
    kind: str, dtype: str, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "answers":
        job = make_job(tmp_path, model_folder, questions(3))
    else:
        job = score_job(tmp_path, model_folder, {"continuation": " here"})
    assert exit_code_of("run", job, "--set", f"model.dtype={dtype}") == 0
    assert (NOTE in capsys.readouterr().err) == (dtype == "bfloat16")
    reason = read_metrics(tmp_path / "out")["without_kernels"]
    assert reason == (REASON if dtype == "bfloat16" else "they are for bfloat16, and the model is in float32")


def test_an_llm_and_precompute_say_so_too(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="kernels in C are missing"):
        LLM(str(model_folder), device="cpu", dtype="bfloat16", kv_memory="1MiB")
    job = rag_job(tmp_path, model_folder, rag_rows([[0, 1]]))
    assert exit_code_of("precompute", job, "--set", "model.dtype=bfloat16") == 0
    assert NOTE in capsys.readouterr().err


def test_only_what_can_be_mended_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner(torch.bfloat16)
    assert native.missing_kernels_note(model) == NOTE
    model.placement = Placement(Gpu("a GPU", True, 1 << 30, torch.device("cpu")))
    assert native.missing_kernels_note(model) is None and native.why_no_kernels(model) is None
    model.placement = Placement()
    monkeypatch.setattr(native, "cpu_has_bfloat16_products", lambda: False)
    assert native.missing_kernels_note(model) is None and native.why_no_kernels(model) == REASON
    monkeypatch.setattr(native, "library", lambda _folder: object())
    assert native.why_no_kernels(model) is None
