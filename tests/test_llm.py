"""`batchllm.LLM`: vLLM's offline calling convention."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import batchllm
from batchllm import LLM, SamplingParams
from batchllm.errors import ModelError, UserError
from batchllm.scoring import TokenSpan
from tests.executor.test_gate import longrope
from tests.executor.tiny_models import make_model
from tests.tiny_tokenizer import byte_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPTS = ["Once upon a time", "Once upon a hill", "Something else", "Once upon a time"]


@cache
def llm_of(folder: Path) -> LLM:
    return LLM(model=str(folder), min_shared_tokens=4)


@pytest.fixture
def llm(model_folder: Path) -> LLM:
    return llm_of(model_folder)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM, model_folder: Path) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
        assert output.prompt == prompt
        assert output.prompt_token_ids == ids[0].tolist()
        assert output.finished
        assert list(output.outputs[0].token_ids) == expected[0, ids.shape[1] :].tolist()
        assert output.outputs[0].text == tokenizer.decode(
            output.outputs[0].token_ids, skip_special_tokens=True
        )
        assert output.outputs[0].finish_reason in ("length", "stop")
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3"]


def test_one_prompt_alone(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert output.prompt == PROMPTS[0]


def test_every_way_to_give_a_prompt_is_the_same(llm: LLM) -> None:
    ids = byte_tokenizer()(PROMPTS[0])["input_ids"]
    ways = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    outputs = llm.generate(ways, GREEDY, use_tqdm=False)
    assert len({output.outputs[0].token_ids for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [PROMPTS[0], None, PROMPTS[0], None]
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs == outputs[0].outputs
    assert llm.generate(ways[3], GREEDY, use_tqdm=False)[0].outputs == outputs[0].outputs


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_only_bad_prompts(llm: LLM) -> None:
    outputs = llm.generate(["", "x" * 600], GREEDY, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]


def test_defaults_are_those_of_vllm(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16
    assert SamplingParams() == batchllm.core.SamplingParams(temperature=1.0, max_tokens=16)


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (1, 3, 2)]
    outputs = llm.generate(PROMPTS[:3], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 3, 2]


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="4 prompts need as many SamplingParams or one, found 2"):
        llm.generate(PROMPTS, [GREEDY, GREEDY], use_tqdm=False)


def test_samples_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8)
    first, again = (llm.generate(PROMPTS[:2], params, use_tqdm=False) for _ in range(2))
    assert first == again
    assert [sample.index for sample in first[0].outputs] == [0, 1, 2]
    assert len({sample.token_ids for output in first for sample in output.outputs}) == 6
    other = llm.generate(
        PROMPTS[:2], SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=4), use_tqdm=False
    )
    assert other != first


def test_stop_strings(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=30), use_tqdm=False)
    character = next(letter for letter in free.outputs[0].text if letter.isascii())
    stopping = SamplingParams(temperature=0.0, max_tokens=30, stop=character)
    (stopped,) = llm.generate(PROMPTS[0], stopping, use_tqdm=False)
    assert stopped.outputs[0].text == free.outputs[0].text.split(character)[0]
    assert stopped.outputs[0].finish_reason == "stop"


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    sample = output.outputs[0]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids)
    assert all(-20 < value < 0 and math.isfinite(value) for value in sample.logprobs)


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    (same,) = llm.generate("[user] Hello\n[assistant] ", GREEDY, use_tqdm=False)
    assert output.outputs == same.outputs
    assert len(llm.chat([conversation, conversation], GREEDY, use_tqdm=False)) == 2
    (open_end,) = llm.chat(conversation, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert open_end.prompt_token_ids == byte_tokenizer()("[user] Hello\n")["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "the prompt is empty"), ("x" * 600, "at most 511"), ([5, 99_999], "token id 99,999")],
)
def test_a_bad_prompt_is_an_error_of_its_own(llm: LLM, prompt: object, reason: str) -> None:
    before, bad, after = llm.generate([PROMPTS[0], prompt, PROMPTS[1]], GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert reason in str(bad.outputs[0].error)
    assert (bad.outputs[0].text, bad.outputs[0].token_ids) == ("", ())
    good = llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    assert [before.outputs, after.outputs] == [output.outputs for output in good]


def test_a_prompt_of_another_kind(llm: LLM) -> None:
    with pytest.raises(TypeError, match="prompt 1 must be text or a list of token ids"):
        llm.generate([PROMPTS[0], 3.5], GREEDY, use_tqdm=False)


def test_a_parameter_out_of_range() -> None:
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=-1.0)


def test_arguments_of_vllm_without_effect_are_named_once(model_folder: Path) -> None:
    with pytest.warns(UserWarning, match="enforce_eager, gpu_memory_utilization: without effect"):
        LLM(model=str(model_folder), gpu_memory_utilization=0.9, enforce_eager=True)


def test_unknown_arguments_are_refused(model_folder: Path) -> None:
    with pytest.raises(TypeError, match="'gpu_memory'"):
        LLM(model=str(model_folder), gpu_memory=3)
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        LLM(model=str(model_folder), tensor_parallel_size=2)


def test_without_tokenizer_only_token_ids(model_folder: Path) -> None:
    llm = LLM(model=str(model_folder), skip_tokenizer_init=True, kv_memory="1MiB")
    (output,) = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 0
    assert output.outputs[0].text == ""
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY, use_tqdm=False)


def test_models_that_cannot_be_exact_are_refused(tmp_path: Path) -> None:
    make_model(longrope()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = LLM(model=str(tmp_path))
    assert len(llm.generate([[5] * 40], GREEDY, use_tqdm=False)) == 1
    with pytest.raises(ModelError, match=r"model type phi3 .*longrope"):
        llm.generate([[5] * 43], GREEDY, use_tqdm=False)


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        LLM(model=str(tmp_path / "nowhere"))


def test_one_long_prompt_does_not_stop_the_others(tmp_path: Path) -> None:
    make_model(longrope()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = LLM(model=str(tmp_path))
    short, long = llm.generate([[5] * 40, [5] * 43], GREEDY, use_tqdm=False)
    assert short.outputs[0].error is None
    assert "exact only up to 48 tokens" in str(long.outputs[0].error)
    spans = [TokenSpan([5] * 49, 1), TokenSpan([5] * 50, 1)]
    scores, answers = llm.score_and_generate([*spans, ([5] * 43, GREEDY)], use_tqdm=False)
    assert scores[0].error is None and "at most 49" in str(scores[1].error)
    assert "exact only up to 48 tokens" in str(answers[0].error)
    [score] = llm.score_documents([[5] * 100], 6, use_tqdm=False)  # in windows that it is exact for
    assert score.error is None and len(score.token_ids) == 100


def test_rows_that_cannot_be_are_refused_beside_scores_too(llm: LLM) -> None:
    prompt = byte_tokenizer()(PROMPTS[0])["input_ids"]
    wrong = [{"allowed_token_ids": [70_000]}, {"regex": "a(b"}, {"stop_token_ids": [70_000], "min_tokens": 1}]
    items = [(prompt, SamplingParams(temperature=0.0, max_tokens=3, **params)) for params in wrong]
    scores, answers = llm.score_and_generate([TokenSpan([*prompt, 9], 4), *items], use_tqdm=False)
    assert scores[0].error is None
    assert "generate.allowed_token_ids names token 70,000" in str(answers[0].error)
    assert str(answers[1].error).startswith("generate.regex cannot be used")
    assert answers[2].error is None


def test_without_tokenizer_no_texts_that_end_an_answer(model_folder: Path) -> None:
    llm = LLM(model=str(model_folder), skip_tokenizer_init=True, kv_memory="1MiB")
    for params in (SamplingParams(stop=["."]), SamplingParams(bad_words=["x"])):
        with pytest.raises(ValueError, match=r"stop, bad_words, .* need a tokenizer"):
            llm.generate([[5, 6, 7]], params, use_tqdm=False)
        with pytest.raises(ValueError, match="need a tokenizer"):
            llm.score_and_generate([([5, 6, 7], params)], use_tqdm=False)


def test_what_the_generation_config_would_do_is_said(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    with pytest.warns(
        UserWarning, match=r"states repetition_penalty 1\.05, .*; SamplingParams\.repetition_penalty"
    ):
        LLM(model=str(folder), kv_memory="1MiB")
