"""`SamplingParams`: what scripts written for vLLM do with theirs, and what becomes of it."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from batchllm import SamplingParams, StructuredOutputsParams, core
from batchllm.errors import ArgumentError
from batchllm.llm_params import params_of_model


def resolved(**given: Any) -> core.SamplingParams:
    return SamplingParams(**given).resolved(seed=7, max_tokens=99)


def test_what_a_script_does_with_one() -> None:
    def shorter(given: SamplingParams | None) -> SamplingParams:
        assert isinstance(given, SamplingParams)
        changed = given.clone()
        changed.max_tokens = 5
        changed.stop.append("y")  # type: ignore[union-attr]
        return changed

    params = SamplingParams(stop="x", seed=3)
    assert (shorter(params).max_tokens, shorter(params).stop) == (5, ["x", "y"])
    assert (params.max_tokens, params.stop) == (16, ["x"])
    assert shorter(params).resolved(seed=0, max_tokens=1) == core.SamplingParams(
        temperature=1.0, max_tokens=5, stop=("x", "y"), seed=3
    )
    assert copy.copy(params) == params == pickle.loads(pickle.dumps(params))
    with pytest.raises(AttributeError):
        params.max_token = 5  # type: ignore[attr-defined]


def test_what_none_stands_for() -> None:
    assert (resolved().seed, resolved(seed=-1).seed, resolved(seed=0).seed) == (7, 7, 0)
    assert (resolved().max_tokens, resolved(max_tokens=None).max_tokens) == (16, 99)
    nothing = dict.fromkeys(("temperature", "top_p", "top_k", "n", "stop", "logit_bias", "regex"))
    assert resolved(**nothing) == resolved(top_k=-1)
    assert resolved(**nothing).temperature == 1.0


def test_true_is_one_log_probability_as_in_vllm() -> None:
    asked = [resolved(logprobs=given) for given in (None, False, True, 0, 4)]
    assert [(one.logprobs, one.top_logprobs) for one in asked] == [
        (False, 0),
        (False, 0),
        (True, 1),
        (True, 0),
        (True, 4),
    ]
    assert [resolved(prompt_logprobs=given).prompt_logprobs for given in (None, False, True, 0, 4)] == [
        None,
        None,
        1,
        0,
        4,
    ]


def test_keywords_without_effect() -> None:
    harmless = {
        "detokenize": False,
        "spaces_between_special_tokens": False,
        "output_kind": 2,
        "extra_args": {},
    }
    assert resolved(**harmless, flat_logprobs=True, logits_processors=None) == resolved()
    with pytest.warns(UserWarning, match="extra_args: without effect") as said:
        SamplingParams(extra_args={"mine": 1})
    assert said[0].filename == __file__


CHOICE = {"choice": ["yes", "no"]}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (StructuredOutputsParams(**CHOICE), {"choice": ("yes", "no")}),
        (StructuredOutputsParams(regex="a+"), {"regex": "a+"}),
        (StructuredOutputsParams(json={"type": "null"}), {"json_schema": '{"type": "null"}'}),
        (StructuredOutputsParams(json={}), {"json_schema": "{}"}),
        (StructuredOutputsParams(grammar="start: X"), {"grammar": "start: X"}),
        (StructuredOutputsParams(json_object=True), {"json_schema": '{"type": "object"}'}),
        (CHOICE, {"choice": ("yes", "no")}),
        (SimpleNamespace(regex="a+", backend="xgrammar"), {"regex": "a+"}),
    ],
)
def test_structured_outputs(asked: Any, expected: dict[str, Any]) -> None:
    for keyword in ("structured_outputs", "guided_decoding"):
        assert resolved(**{keyword: asked}) == resolved(**expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 0}, "n must be at least 1, found the number 0"),
        ({"logprobs": -1}, "logprobs must be at least 0, found the number -1"),
        ({"logprobs": 101}, "logprobs must be at most 100, found the number 101"),
        ({"top_k": -5}, "top_k must be at least 0, found the number -5"),
        ({"stop_token_ids": [3, "x"]}, "stop_token_ids[1] must be a whole number, found the text `x`"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be true or false"),
        ({"min_tokens": 17}, "min_tokens 17 but max_tokens 16; lower min_tokens"),
        (
            {"structured_outputs": CHOICE, "regex": "a"},
            "structured_outputs must have one of choice, regex, json",
        ),
        ({"structured_outputs": {}}, "and grammar, found none of them"),
        ({"structured_outputs": {**CHOICE, "json": {}}}, "and grammar, found json and choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice must not be empty"),
        (
            {"structured_outputs": {"json": "{"}},
            "structured_outputs.json must be a JSON schema, found text that",
        ),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs has no structural_tag in BatchLLM",
        ),
    ],
)
def test_errors_name_the_fields_as_vllm_does(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**given)
    assert isinstance(caught.value, ArgumentError)
    assert str(caught.value).startswith("SamplingParams: ") and words in str(caught.value)


def test_what_is_not_to_be_had() -> None:
    with pytest.raises(ArgumentError, match="SamplingParams has no thinking_token_budget in BatchLLM"):
        SamplingParams(thinking_token_budget=5)
    with pytest.raises(TypeError, match="max_token'"):
        SamplingParams(max_token=5)  # type: ignore[call-arg]


def test_what_was_assigned_is_checked_when_it_is_read() -> None:
    params = SamplingParams()
    params.temperature = -1.0
    with pytest.raises(ArgumentError, match="SamplingParams: temperature must be at least 0"):
        params.resolved(seed=0, max_tokens=1)


def test_parameters_of_a_model() -> None:
    said = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=77, eos_token_id=3)
    assert params_of_model(said) == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=77)
    assert params_of_model(GenerationConfig()) == params_of_model(None) == SamplingParams()
