"""What scripts written for vLLM expect of `LLM`: samples, lengths, prompts in any container, fields of outputs."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from batchllm import LLM, SamplingParams, StructuredOutputsParams
from batchllm.errors import ModelError
from batchllm.executor.trace import StepTrace
from batchllm.report.progress import Stage
from tests.executor.test_gate import dynamic_rope, longrope
from tests.executor.tiny_models import make_model
from tests.jobs import KV_TOKEN_BYTES
from tests.tiny_tokenizer import EOS, byte_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPTS = ["Once upon a time", "Once upon a hill", "Something else"]


@cache
def llm_of(folder: Path) -> LLM:
    return LLM(str(folder), device="cpu", min_shared_tokens=4)


@pytest.fixture
def llm(model_folder: Path) -> LLM:
    return llm_of(model_folder)


def texts(llm: LLM, **given: Any) -> list[str]:
    params = SamplingParams(temperature=1.0, max_tokens=8, **given)
    return [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]


# Samples


def test_calls_without_a_seed_differ_and_a_new_llm_repeats_them(model_folder: Path) -> None:
    one, same, other = (LLM(str(model_folder), device="cpu", seed=seed) for seed in (None, 0, 5))
    calls = [texts(one) for _ in range(3)]
    assert [texts(same) for _ in range(3)] == calls
    assert len(set(map(tuple, [*calls, texts(other), texts(same, seed=0)]))) == 5
    assert texts(one, seed=3) == texts(same, seed=3) == texts(other, seed=3)
    assert texts(one, seed=0) == texts(other, seed=0)


def test_a_message_is_sampled_anew_as_well(llm: LLM) -> None:
    message = [{"role": "user", "content": "Hello"}]
    answers = [llm.chat(message, SamplingParams(max_tokens=8), use_tqdm=False) for _ in range(3)]
    assert len({tuple(answer[0].outputs[0].token_ids) for answer in answers}) == 3


# Lengths


def test_no_max_tokens_is_all_that_the_model_reads(model_folder: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    prompts = [[5] * 500, [6] * 490, [7] * 511]
    lengths = [len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
    assert lengths == [12, 22, 1]
    shorter = LLM(str(model_folder), device="cpu", max_model_len=20)
    with pytest.warns(UserWarning, match="the prompt has 20 tokens; the model reads at most 19"):
        outputs = shorter.generate([[5] * 10, [5] * 17, [5] * 20], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [10, 3, 0]
    assert {output.outputs[0].finish_reason for output in outputs[:2]} == {"length"}
    (limited,) = shorter.generate([[5] * 10], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert len(limited.outputs[0].token_ids) == 10


def test_no_max_tokens_where_the_model_is_exact_up_to_some_length(tmp_path: Path) -> None:
    make_model(longrope()).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    options: dict[str, Any] = {"device": "cpu", "skip_tokenizer_init": True}
    with pytest.raises(ModelError, match=r"model type phi3 .*longrope"):
        LLM(str(tmp_path), **options).generate([[5] * 30], params, use_tqdm=False)
    (output,) = LLM(str(tmp_path), max_model_len=48, **options).generate([[5] * 30], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 18
    make_model(dynamic_rope()).save_pretrained(tmp_path / "dynamic")  # exact up to all that it reads
    (output,) = LLM(str(tmp_path / "dynamic"), **options).generate([[5] * 30], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 18


def test_outputs_without_a_limit_run_side_by_side(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one that is as long as the model reads is memory for many as they are."""
    monkeypatch.setattr("batchllm.planner.lengths.UNLIMITED_GUESS", 20)
    small = LLM(str(model_folder), device="cpu", kv_memory=540 * KV_TOKEN_BYTES)
    small.trace = StepTrace()
    params = SamplingParams(max_tokens=None, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    outputs = small.generate([f"{number}. Yes or no?" for number in range(12)], params, use_tqdm=False)
    assert {output.outputs[0].text for output in outputs} <= {"yes", "no"}
    assert max(record.running for record in small.trace.records) > 6


def test_a_model_that_states_no_length_needs_max_tokens(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchllm.executor.model.ModelRunner.max_length", None)
    llm = LLM(str(model_folder), device="cpu")
    with pytest.raises(ValueError, match="this model states none; give max_tokens, or max_model_len to LLM"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=None), use_tqdm=False)
    assert llm.generate(PROMPTS, GREEDY, use_tqdm=False)[0].outputs[0].error is None


# Prompts


def test_prompts_in_any_container(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    containers: list[Any] = [
        tuple(PROMPTS),
        (prompt for prompt in PROMPTS),
        map(str, PROMPTS),
        np.array(PROMPTS),
    ]
    containers += [np.array(PROMPTS, dtype=object), pl.Series(PROMPTS), dict.fromkeys(PROMPTS).keys()]
    for given in containers:
        assert llm.generate(given, GREEDY, use_tqdm=False) == expected
    pandas = pytest.importorskip("pandas")
    assert llm.generate(pandas.Series(PROMPTS, index=[7, 8, 9]), GREEDY, use_tqdm=False) == expected


def test_token_ids_in_any_container(llm: LLM) -> None:
    ids = byte_tokenizer()(PROMPTS[0])["input_ids"]
    (expected,) = llm.generate([ids], GREEDY, use_tqdm=False)
    for given in (ids, iter(ids), np.array(ids), [torch.tensor(ids)], np.array([ids]), pl.Series([ids])):
        assert llm.generate(given, GREEDY, use_tqdm=False) == [expected]


def test_conversations_in_a_generator(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = llm.chat(conversations, GREEDY, use_tqdm=False)
    assert llm.chat((messages for messages in conversations), GREEDY, use_tqdm=False) == expected


# Parameters


def test_without_parameters_those_of_the_model(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    said = {"temperature": 0.3, "top_k": 1, "top_p": 0.8, "max_new_tokens": 5, "eos_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(said))
    llm = LLM(str(folder), device="cpu")
    params = SamplingParams(temperature=0.3, top_k=1, top_p=0.8, max_tokens=5)
    assert llm.get_default_sampling_params() == params
    outputs = [llm.generate(PROMPTS, use_tqdm=False) for _ in range(2)]
    assert outputs[0] == outputs[1] == llm.generate(PROMPTS, params, use_tqdm=False)  # top_k 1 is greedy
    assert {len(output.outputs[0].token_ids) for output in outputs[0]} == {5}
    assert (
        LLM(str(folder), device="cpu", generation_config="vllm").get_default_sampling_params()
        == SamplingParams()
    )
    with pytest.raises(ValueError, match="generation_config must be auto or vllm"):
        LLM(str(folder), device="cpu", generation_config="elsewhere")


def test_parameters_that_change_from_call_to_call(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    for count in (2, 4):
        params.max_tokens = count
        assert len(llm.generate(PROMPTS, params, use_tqdm=False)[0].outputs[0].token_ids) == count
    each = (SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count) for count in (1, 3, 2))
    outputs = llm.generate(PROMPTS, each, use_tqdm=False)  # type: ignore[arg-type]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 3, 2]


def test_structured_outputs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert {output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)} <= {
        "yes",
        "no",
    }


def test_stop_strings_need_a_tokenizer(model_folder: Path) -> None:
    llm = LLM(str(model_folder), device="cpu", skip_tokenizer_init=True)
    with pytest.raises(
        ValueError, match="stop, bad_words, choice, regex, json_schema and grammar need a tokenizer"
    ):
        llm.generate([[5, 6]], SamplingParams(stop="x"), use_tqdm=False)


# Outputs


def test_why_an_output_has_stopped(llm: LLM) -> None:
    (free,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=30), use_tqdm=False)
    third = free.outputs[0].token_ids[2]
    letter = next(letter for letter in free.outputs[0].text if letter.isascii())
    ending = {EOS: 100.0}
    asked = {
        "token": SamplingParams(temperature=0.0, stop_token_ids=[third]),
        "text": SamplingParams(temperature=0.0, max_tokens=30, stop=["never", letter]),
        "end": SamplingParams(temperature=0.0, logit_bias=ending, stop="x", stop_token_ids=[EOS]),
        "length": SamplingParams(temperature=0.0, max_tokens=1, stop="never"),
    }
    outputs = llm.generate([PROMPTS[0]] * 4, list(asked.values()), use_tqdm=False)
    found = [(output.outputs[0].finish_reason, output.outputs[0].stop_reason) for output in outputs]
    assert found == [("stop", third), ("stop", letter), ("stop", None), ("length", None)]
    assert all(output.outputs[0].finished() for output in outputs)


def test_prompt_tokens_taken_from_the_work_for_others(llm: LLM) -> None:
    shared, long = "The same beginning of all. ", "Alone."
    outputs = llm.generate([shared + "One?", shared + "Two?", shared + "Two?", long], GREEDY, use_tqdm=False)
    found = [output.num_cached_tokens for output in outputs]
    assert sorted(found[:2]) == [0, len(shared)]
    assert found[2] == len(outputs[2].prompt_token_ids)
    assert found[3] == 0
    several = llm.generate([shared], SamplingParams(n=2, max_tokens=2), use_tqdm=False)
    assert several[0].num_cached_tokens == 0


def test_log_probabilities_of_sampled_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=3.0, max_tokens=20, logprobs=2, seed=1)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    sample = output.outputs[0]
    assert sample.logprobs is not None and sample.cumulative_logprob is not None
    ranks = set()
    for token, beside in zip(sample.token_ids, sample.logprobs, strict=True):
        assert next(iter(beside)) == token
        assert {one.rank for one in beside.values()} >= {1, 2} and len(beside) in (2, 3)
        assert all(one.decoded_token == byte_tokenizer().decode([other]) for other, one in beside.items())
        ranks.add(beside[token].rank)
    assert None in ranks  # a token that is not among the most probable is there all the same
    total = sum(beside[token].logprob for token, beside in zip(sample.token_ids, sample.logprobs))
    assert sample.cumulative_logprob == pytest.approx(total, abs=1e-3)
    (plain,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert plain.outputs[0].logprobs is plain.outputs[0].cumulative_logprob is None
    assert plain.metrics is plain.lora_request is plain.outputs[0].lora_request is None


def test_progress_counts_what_is_computed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line does: shared prompt tokens are no work."""
    stages: list[Stage] = []

    class Shown:
        def __init__(self, quiet: bool) -> None: ...

        @contextmanager
        def stage(self, name: str, total: int) -> Any:
            stages.append(Stage(name, total, 0, lambda _: None))
            yield stages[-1]

    monkeypatch.setattr("batchllm.llm.Progress", Shown)
    prompts = [f"The same beginning of all of them. {number}" for number in range(8)]
    outputs = llm.generate(prompts, GREEDY)
    assert llm.last_run is not None
    decoded = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert stages[0].tokens == llm.last_run.computed_tokens + decoded
    assert llm.last_run.computed_tokens < sum(len(output.prompt_token_ids) for output in outputs) / 2
    assert stages[0].rows == 8 and stages[0].saved_fraction is not None
    llm.score(["The same beginning"], [[" one", " two"]])
    assert stages[1].tokens == llm.last_run.computed_tokens and stages[1].rows == 2
