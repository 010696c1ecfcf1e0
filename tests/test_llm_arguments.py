"""The arguments of `LLM` and of its methods: ours, checked as a job's are, and those of vLLM."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from batchllm import LLM, SamplingParams
from batchllm.executor.device import Machine
from batchllm.llm_arguments import check_call, our_arguments, readable_length, sections_of
from tests.tiny_tokenizer import byte_tokenizer

OURS = {
    "model": "m",
    "dtype": "auto",
    "device": "cpu",
    "quantize": None,
    "trust_remote_code": False,
    "kv_memory": "auto",
    "max_step_tokens": "auto",
    "min_shared_tokens": 32,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("half", "float16"),
        ("float", "float32"),
        ("bfloat16", "bfloat16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        ("auto", "auto"),
        (None, "auto"),
    ],
)
def test_every_name_of_a_dtype(dtype: Any, name: str) -> None:
    assert sections_of({**OURS, "dtype": dtype})[0].dtype == name


def test_the_dtype_is_what_is_loaded(model_folder: Path) -> None:
    assert LLM(str(model_folder), device="cpu", dtype=torch.bfloat16).config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "bf16"}, "LLM: dtype must be auto, float32, bfloat16 or float16, found the text `bf16`"),
        ({"dtype": torch.float64}, "LLM: dtype must be auto, float32, bfloat16 or float16, found the text `float64`"),
        ({"kv_memory": 4e9}, "LLM: kv_memory must be a size such as 4GiB, or auto, found the number 4000000000.0"),
        ({"kv_memory": "x"}, "LLM: kv_memory must be a size such as 4GiB or a number of bytes, found the text `x`"),
        ({"max_step_tokens": "8k"}, "LLM: max_step_tokens must be a whole number or auto, found the text `8k`"),
        ({"min_shared_tokens": 0}, "LLM: min_shared_tokens must be at least 1, found the number 0"),
        ({"device": "gpu"}, "LLM: device must be auto, cpu or cuda, found the text `gpu`"),
        ({"quantize": "int3"}, "LLM: quantize must be int8_weight_only or int8_dynamic, found the text `int3`"),
        ({"model": ""}, "LLM: model must not be empty"),
        ({"trust_remote_code": "yes"}, "LLM: trust_remote_code must be true or false, found the text `yes`"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LLM(**{"model": "m", **given})
    assert str(caught.value) == message


def test_the_harness_class_checks_them_too(model_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from batchllm.evals.harness_model import BatchLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BatchLM(str(model_folder), device="cpu").llm.device_note == ""
    with pytest.raises(ValueError, match="LLM: dtype must be"):
        BatchLM(str(model_folder), dtype="bf16")
    sampled = BatchLM(str(model_folder), device="cpu")._params({"do_sample": True, "until": []})
    assert not isinstance(sampled, str) and (sampled.temperature, sampled.seed) == (
        1.0,
        0,
    )  # the same every night
    with pytest.raises(ValueError, match="LLM: max_step_tokens must be"):
        BatchLM(str(model_folder), max_step_tokens="8k")


def test_auto_is_an_answer_everywhere(model_folder: Path) -> None:
    llm = LLM(
        str(model_folder), device="cpu", min_shared_tokens="auto", kv_memory="auto", max_step_tokens="auto"
    )
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].error is None


AT_THEIR_DEFAULTS = {
    "revision": None,
    "tokenizer_revision": None,
    "tokenizer_mode": "auto",
    "quantization": None,
    "max_num_batched_tokens": None,
    "kv_cache_memory_bytes": None,
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "download_dir": None,
    "load_format": "auto",
    "disable_custom_all_reduce": False,
    "override_generation_config": {},
    "hf_overrides": None,
    "enable_lora": False,
    "speculative_config": None,
    "chat_template": None,
    "enforce_eager": False,
    "runner": "auto",
}


def test_what_asks_for_nothing_is_taken_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert our_arguments(OURS, AT_THEIR_DEFAULTS) == OURS
        check_call("generate()", {"lora_request": None, "priority": [1, 2], "tokenization_kwargs": {}})


def test_other_names_for_the_same() -> None:
    found = our_arguments(OURS, {"max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 1 << 30})
    assert (found["max_step_tokens"], found["kv_memory"]) == (8192, 1 << 30)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes and kv_memory say the same"):
        our_arguments({**OURS, "kv_memory": "1GiB"}, {"kv_cache_memory_bytes": 5})
    with pytest.raises(ValueError, match="LLM: max_step_tokens must be a whole number"):
        LLM("m", max_num_batched_tokens="8k")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"quantization": "awq"},
            "LLM() has no 'quantization' in BatchLLM; give quantize='int8_weight_only'",
        ),
        ({"revision": "v2"}, "LLM() has no 'revision' in BatchLLM; download that version"),
        (
            {"kv_cache_dtype": "fp8"},
            "LLM() has no 'kv_cache_dtype' in BatchLLM; keys and values have the dtype",
        ),
        ({"enable_lora": True}, "merge the adapter"),
        ({"tokenizer_mode": "mistral"}, "LLM() has no 'tokenizer_mode'"),
        ({"max_step_token": 5}, "LLM() has no 'max_step_token' in BatchLLM; did you mean 'max_step_tokens'?"),
        ({"xyz": 5}, "LLM() has no 'xyz' in BatchLLM; leave it out"),
    ],
)
def test_what_is_not_to_be_had_names_what_to_do(others: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        LLM("m", **others)
    assert message in str(caught.value)


def test_arguments_of_calls(model_folder: Path) -> None:
    llm = LLM(str(model_folder), device="cpu")
    (output,) = llm.generate("Hello", GREEDY, use_tqdm=False, lora_request=None, priority=None)
    assert output.outputs[0].error is None
    message = [{"role": "user", "content": "Hello"}]
    assert llm.chat(message, GREEDY, use_tqdm=False, lora_request=None, chat_template_content_format="auto")
    with pytest.raises(TypeError, match=r"generate\(\) has no 'lora_request' in BatchLLM; merge the adapter"):
        llm.generate("Hello", lora_request="adapter")
    with pytest.raises(TypeError, match=r"chat\(\) has no 'tokenization_kwargs' in BatchLLM; tokenise"):
        llm.chat(message, tokenization_kwargs={"truncation": True})
    with pytest.raises(TypeError, match=r"sampling_params must be batchllm.SamplingParams, found dict"):
        llm.generate("Hello", {"temperature": 0})  # type: ignore[arg-type]


def test_a_tokenizer_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("token*", "chat_template*"))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = LLM(str(bare), tokenizer=str(tmp_path / "tokenizer"), device="cpu")
    same = LLM(str(model_folder), device="cpu")
    first, second = (llm.generate("Hello", GREEDY, use_tqdm=False)[0] for llm in (given, same))
    assert first == second


def test_the_length_that_is_asked_for() -> None:
    assert [readable_length(512, given) for given in (None, -1, 64, 512)] == [512, 512, 64, 512]
    assert readable_length(None, 64) == 64
    for given, words in (
        (513, "max_model_len is 513 and the model reads at most 512"),
        ("4k", "a number of tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            readable_length(512, given)  # type: ignore[arg-type]


def test_a_gpu_that_cannot_be_used_is_said(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchllm.llm.this_machine", lambda: Machine(None, "torch finds no GPU"))
    with pytest.warns(UserWarning, match="^device: auto runs on the CPU, for torch finds no GPU$") as said:
        LLM(str(model_folder))
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(str(model_folder), device="cpu")
