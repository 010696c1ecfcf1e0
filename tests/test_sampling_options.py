"""Sampling options in whole runs: as defaults of the job, as columns, and through `LLM`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import batchllm
from batchllm.candidates import Candidates
from batchllm.core import RequestResult
from batchllm.core import SamplingParams as CoreParams
from tests.executor.harness import prompt_table, request_table
from tests.jobs import exit_code_of, make_job, read_output, save_model
from tests.tiny_tokenizer import EOS, byte_tokenizer

PROMPTS = [f"Number {number}: " for number in range(12)]
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> batchllm.LLM:
    return batchllm.LLM(str(model), kv_memory="16MiB", min_shared_tokens=4)


def params(**values: Any) -> Any:
    return batchllm.SamplingParams(**{"temperature": 1.5, "max_tokens": 10, "seed": 1, **values})


def answers(llm: batchllm.LLM, many: Any) -> list[Any]:
    return [output.outputs for output in llm.generate(PROMPTS, many, use_tqdm=False)]


def written(outputs: list[Any]) -> list[Any]:
    return [(answer.index, answer.token_ids, answer.text, answer.finish_reason) for answer in outputs]


EVERY_KIND = [
    params(),
    params(repetition_penalty=1.8),
    params(logit_bias={70: 8.0}),
    params(allowed_token_ids=[65, 66, 67]),
    params(bad_words=["a", "b"], frequency_penalty=1.5),
    params(min_tokens=9),
    params(regex="[a-z]{4}"),
    params(temperature=0.0, presence_penalty=2.0),
    params(top_k=3, logprobs=4),
    params(best_of=3),
    params(stop=["e", "a"], include_stop_str_in_output=True),
    params(temperature=0.0),
]


def test_what_a_row_asks_for_changes_nothing_for_others(llm: batchllm.LLM) -> None:
    together = answers(llm, EVERY_KIND)
    for row in range(len(EVERY_KIND)):
        alone = llm.generate([PROMPTS[row]], EVERY_KIND[row], use_tqdm=False)[0].outputs
        assert written(alone) == written(together[row]), EVERY_KIND[row]
    other = answers(llm, [params(temperature=0.0)] * 12)
    mixed = answers(llm, [EVERY_KIND[row] if row % 2 else params(temperature=0.0) for row in range(12)])
    for row in range(12):
        assert written(mixed[row]) == written(together[row] if row % 2 else other[row])


def test_tokens_stay_within_what_is_allowed(llm: batchllm.LLM) -> None:
    for (answer,) in answers(llm, params(allowed_token_ids=[65, 66, EOS], bad_words=["ab"])):
        assert set(answer.token_ids) <= {65, 66, EOS}
    words = TOKENIZER.encode("qzx")
    for (answer,) in answers(
        llm, params(logit_bias=dict.fromkeys(words, 60.0), max_tokens=40, bad_words=["qz"])
    ):
        assert set(answer.token_ids) <= set(words) and "qz" not in answer.text


def test_an_answer_has_at_least_min_tokens(llm: batchllm.LLM) -> None:
    often = {EOS: 50.0, TOKENIZER.encode("q")[0]: 51.0}
    ended = answers(llm, params(logit_bias=often, stop=["q"], temperature=0.7))
    assert all(len(answer.token_ids) == 1 for (answer,) in ended)
    later = answers(llm, params(logit_bias=often, stop=["q"], min_tokens=4, temperature=0.7))
    assert {len(answer.token_ids) for (answer,) in later} == {4}
    for (answer,) in later:  # earlier stop strings did not end it, so they stay
        assert answer.text.startswith("qqq") and answer.text in ("qqq", "qqqq"[:3])


def test_stop_strings_and_special_tokens_in_the_text(llm: batchllm.LLM) -> None:
    end = {EOS: 60.0}
    letters = dict.fromkeys(TOKENIZER.encode("xyz"), 60.0)
    for include in (False, True):
        for (answer,) in answers(
            llm,
            params(logit_bias=letters, stop=["yz", "zx"], max_tokens=60, include_stop_str_in_output=include),
        ):
            assert answer.finish_reason == "stop"
            written = TOKENIZER.decode(answer.token_ids)
            assert written[-2:] in ("yz", "zx")
            assert answer.text == (written if include else written[:-2])
    ((shown,), *_) = answers(llm, params(logit_bias=end, skip_special_tokens=False))
    ((left_out,), *_) = answers(llm, params(logit_bias=end))
    assert (shown.text, left_out.text) == ("<eos>", "")


def test_best_of_keeps_the_most_probable(llm: batchllm.LLM) -> None:
    best = answers(llm, params(n=2, best_of=8, logprobs=0))
    for outputs in best:
        assert [answer.index for answer in outputs] == [0, 1]
        assert mean_logprob(outputs[0]) >= mean_logprob(outputs[1])
    single = answers(llm, params(logprobs=0))
    gain = [mean_logprob(some[0]) - mean_logprob(one[0]) for some, one in zip(best, single)]
    assert np.mean(gain) > 0.05
    assert all(answer.logprobs is None for (answer,) in answers(llm, params(best_of=2)))


def mean_logprob(answer: Any) -> float:
    assert answer.cumulative_logprob is not None
    return float(answer.cumulative_logprob / len(answer.token_ids))


def test_candidates_are_ranked_when_all_of_a_row_are_known() -> None:
    params = CoreParams(temperature=1.0, n=2, best_of=4)
    prompts = prompt_table([[1, 2], [3, 4]], params)
    candidates = Candidates(prompts, request_table(2, 2), None, b"")
    assert len(candidates.requests) == 8
    done = np.array([False, False, False, True])
    assert candidates.pending(np.array([True, True, False, True])).tolist() == [False] * 4 + [True] * 4
    values = {
        0: (-2.0,),
        1: (-1.0, -1.2),
        2: None,
        3: (-0.5, -3.0),
        7: (-1.0,),
        6: (-1.0,),
        5: None,
        4: (-9.0,),
    }
    settled = []
    for request, logprobs in values.items():
        reason: Any = "error" if logprobs is None else "stop"
        result = RequestResult(request, str(request), (request,), reason, None, 2, 0, logprobs)
        settled.append([(one.request, one.output, one.logprobs) for one in candidates.settle([result], done)])
    assert settled == [[], [], [], [(0, "1", None), (1, "3", None)], [], [], [], [(2, "6", None)]]


def test_rows_that_choose_do_not_reorder_those_that_have_nothing_to_choose() -> None:
    chooses, all_stay = (CoreParams(temperature=1.0, n=2, best_of=best_of) for best_of in (4, 2))
    prompts = prompt_table([[1, 2], [3, 4]], chooses)
    prompts = replace(prompts, params=(chooses, all_stay), params_of=np.array([0, 1], dtype=np.int32))
    candidates = Candidates(prompts, request_table(2, 2), None, b"")
    assert len(candidates.requests) == 6
    assert [params.logprobs for params in candidates.prompts.params] == [True, False]
    results = [
        RequestResult(request, str(request), (request,), "stop", None, 2, 0, (float(request),))
        for request in range(6)
    ]
    settled = candidates.settle(results, np.zeros(4, dtype=bool))
    assert [(one.request, one.output) for one in settled] == [(0, "3"), (1, "2"), (2, "4"), (3, "5")]


def test_top_logprobs_hold_the_token_that_greedy_takes(llm: batchllm.LLM) -> None:
    for (answer,) in answers(llm, params(temperature=0.0, logprobs=3)):
        for token, beside in zip(answer.token_ids, answer.logprobs, strict=True):
            assert next(iter(beside)) == token
            assert [one.rank for one in beside.values()] == [1, 2, 3]
            first, second, third = (one.logprob for one in beside.values())
            assert first >= second >= third
        chosen = [beside[token].logprob for token, beside in zip(answer.token_ids, answer.logprobs)]
        assert answer.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-3)


def test_parameters_in_columns(tmp_path: Path, model: Path) -> None:
    rows = [
        {"id": 0, "prompt": "Q: ", "bias": None, "word": None, "low": 0, "top": 2, "penalty": 1.0},
        {"id": 1, "prompt": "Q: ", "bias": '{"72": 90, "73": 90}', "word": ["x"], "low": 6, "top": 0, "penalty": 1.0},
        {"id": 2, "prompt": "Q: ", "bias": '{"x": 1}', "word": None, "low": 0, "top": 0, "penalty": 1.0},
        {"id": 3, "prompt": "Q: ", "bias": None, "word": [""], "low": 0, "top": 0, "penalty": 1.0},
        {"id": 4, "prompt": "Q: ", "bias": None, "word": None, "low": 30, "top": 0, "penalty": 1.0},
        {"id": 5, "prompt": "Q: ", "bias": None, "word": None, "low": -1, "top": 0, "penalty": 1.0},
        {"id": 6, "prompt": "Q: ", "bias": None, "word": None, "low": 0, "top": 0, "penalty": 0.0},
        {"id": 7, "prompt": "Q: ", "bias": '{"999": 1}', "word": None, "low": 0, "top": 0, "penalty": 1.0},
        {"id": 8, "prompt": "Q: ", "bias": None, "word": None, "low": 0, "top": None, "penalty": 1.0},
    ]  # fmt: skip
    names = {
        "logit_bias": "bias",
        "bad_words": "word",
        "min_tokens": "low",
        "top_logprobs": "top",
        "repetition_penalty": "penalty",
    }
    generate = {key: {"column": name} for key, name in names.items()}
    job = make_job(tmp_path, model, rows, generate={"max_tokens": 8, "temperature": 0.9, **generate})
    assert exit_code_of("run", job, "--quiet") == 3
    table = read_output(tmp_path / "out")
    assert table["error"].to_list() == [
        None,
        None,
        "column `bias`: logit_bias must have token ids as keys, found the text `x`",
        "column `word`: bad_words must not contain an empty text",
        "column `low`: min_tokens 30 but max_tokens 8; lower min_tokens",
        "column `low`: min_tokens must be at least 0, found the number -1",
        "column `penalty`: repetition_penalty must be greater than 0, found the number 0.0",
        "generate.logit_bias names token 999; the model knows 262 tokens",
        "column `top` is null",
    ]
    assert set(table["output_tokens"][1]) <= {72, 73} and len(table["output_tokens"][1]) >= 6
    first = table["top_logprobs"][0]
    assert len(first) == len(table["output_tokens"][0]) and {len(beside) for beside in first} == {2}


def test_best_of_in_a_job_goes_on_where_it_stopped(tmp_path: Path, model: Path) -> None:
    rows = [{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    generate = {"n": 2, "best_of": 5, "temperature": 1.2}
    whole = make_job(tmp_path / "whole", model, rows, generate=generate)
    assert exit_code_of("run", whole, "--quiet") == 0
    expected = read_output(tmp_path / "whole" / "out")
    assert expected["sample"].to_list() == [0, 1] * len(rows)
    part = make_job(tmp_path / "part", model, rows, generate=generate)
    assert exit_code_of("run", part, "--quiet", "--limit", "5") == 0
    assert exit_code_of("run", part, "--quiet") == 0
    assert read_output(tmp_path / "part" / "out").equals(expected)
