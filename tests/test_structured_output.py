"""Structured output on tiny random models: every answer satisfies what its row asks for, or says why not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import batchllm
from batchllm.core import SamplingParams as CoreParams
from batchllm.executor import structure
from batchllm.executor.grammars import compile_grammar, load_vocabulary
from tests.jobs import exit_code_of, make_job, read_output, save_model
from tests.json_schemas import WRITTEN, random_schema
from tests.native import needs_kernels
from tests.tiny_tokenizer import EOS, VOCABULARY, byte_tokenizer

SCHEMAS = [*WRITTEN.values(), *(random_schema(seed) for seed in range(200 - len(WRITTEN)))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> batchllm.LLM:
    return batchllm.LLM(str(model), kv_memory="64MiB", min_shared_tokens=4)


def params(**values: Any) -> Any:
    return batchllm.SamplingParams(**{"temperature": 1.0, "max_tokens": 400, "seed": 1, **values})


def answers(llm: batchllm.LLM, many: list[Any]) -> list[Any]:
    prompts = [f"Question {number}: " for number in range(len(many))]
    return [output.outputs[0] for output in llm.generate(prompts, many, use_tqdm=False)]


def test_answers_satisfy_their_schemas(llm: batchllm.LLM) -> None:
    assert len(SCHEMAS) == 200
    found = answers(llm, [params(json_schema=schema) for schema in SCHEMAS])
    for schema, answer in zip(SCHEMAS, found):
        assert answer.finish_reason == "stop", (schema, answer.error)
        jsonschema.validate(json.loads(answer.text), schema)


def test_choices_patterns_and_grammars(llm: batchllm.LLM) -> None:
    choice = ("yes", "no", 'a "quoted" one', "über\nall", "yes, but")
    lark = 'start: expr\nexpr: NUMBER (OP NUMBER){0,3}\nOP: "+" | "-"\nNUMBER: /[0-9]{1,3}/'
    plain = params(max_tokens=5)
    found = answers(
        llm, [params(choice=choice), params(regex="[a-c]{2,5}(-[0-9])?"), params(grammar=lark)] * 8 + [plain]
    )
    for number in range(0, 24, 3):
        assert found[number].text in choice
        assert re.fullmatch("[a-c]{2,5}(-[0-9])?", found[number + 1].text)
        assert re.fullmatch(r"[0-9]{1,3}([+-][0-9]{1,3}){0,3}", found[number + 2].text)
    assert len({answer.text for answer in found}) > 12
    assert found[24] == answers(llm, [params(choice=choice)] * 24 + [plain])[24]  # the plain row is as ever


def test_greedy_rows_and_probabilities(llm: batchllm.LLM) -> None:
    (answer,) = answers(llm, [params(temperature=0.0, choice=["maybe"], logprobs=2)])
    assert answer.text == "maybe" and len(answer.logprobs) == len("maybe")
    for token, beside in zip(answer.token_ids, answer.logprobs):
        assert beside[token].logprob < -1.0  # of the model's own logits, not of those left
        assert len(beside) == 2 + (beside[token].rank is None)  # the token, and the two most probable


def test_an_answer_that_does_not_end_in_time_says_so(llm: batchllm.LLM) -> None:
    cut, ended, stopped = answers(
        llm,
        [
            params(regex="[a-z]{50}", max_tokens=9),
            params(regex="a*", max_tokens=9),
            params(regex="(ab)*c", stop="b"),
        ],
    )
    assert cut.finish_reason == "error"
    assert cut.error == "9 tokens were not enough for an answer that satisfies regex; raise max_tokens"
    assert ended.error is None and set(ended.text) <= {"a"}
    assert stopped.text == "c" or stopped.error == (
        "a stop string or token came before an answer that satisfies regex; remove it"
    )


IMPOSSIBLE = {
    '{"type": "integer", "minimum": 5, "maximum": 3}': "minimum (5) is greater than maximum (3)",
    '{"enum": []}': "Unsatisfiable schema",
    "false": "is false, which no text satisfies",
    '{"not": {"type": "string"}}': "Unimplemented keys",
    '{"$ref": "#/nowhere"}': "does not exist",
    '{"type": "strin"}': "Invalid type: strin",
    '{"type": "string", "pattern": "(?=a)b"}': "look-around",
    '{"a": ': "must be a JSON schema, found text that is not JSON",
    "[1]": "must be a JSON schema, which is a mapping, found a list",
}


def test_a_schema_that_cannot_be_used_costs_its_row_only(tmp_path: Path, model: Path) -> None:
    schemas = ['{"type": "boolean"}', *IMPOSSIBLE, None]
    rows = [{"id": number, "prompt": "Q: ", "schema": schema} for number, schema in enumerate(schemas)]
    generate = {"max_tokens": 12, "temperature": 1.0, "json_schema": {"column": "schema"}}
    job = make_job(tmp_path, model, rows, generate=generate)
    assert exit_code_of("run", job, "--quiet") == 3
    table = read_output(tmp_path / "out")
    assert table["output"][0] in ("true", "false")
    for error, reason in zip(table["error"][1:-1], IMPOSSIBLE.values()):
        assert reason in error and "json_schema" in error and "\n" not in error, error
    assert table["error"][-1] is None  # null: no schema


def test_patterns_and_grammars_that_cannot_be_used(llm: batchllm.LLM) -> None:
    found = answers(
        llm,
        [
            params(regex="a(b"),
            params(regex=r"[^\s\S]"),
            params(grammar="start: nothing"),
            params(choice=["x"]),
        ],
    )
    assert "unclosed group" in found[0].error and found[0].error.startswith("generate.regex cannot be used")
    assert found[1].error == "generate.regex cannot be used: no text satisfies it"
    assert "unknown name" in found[2].error
    assert found[3].text == "x"


def test_a_structure_that_is_too_large_is_named_and_others_go_on(llm: batchllm.LLM) -> None:
    large, small = answers(llm, [params(regex="(a{1000}){1000}", max_tokens=9), params(regex="[ab]{6}")])
    assert large.error is not None and large.error.startswith("generate.regex cannot be followed")
    assert "\n" not in large.error and len(large.error) < 400
    assert small.error is None and re.fullmatch("[ab]{6}", small.text)


def test_masks_are_made_in_another_thread(llm: batchllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next step is computed, and once for every token but the last."""
    import threading

    made: list[str] = []
    allowed = structure.StructureMasks._allowed

    def noted(self: Any, matchers: Any) -> Any:
        made.append(threading.current_thread().name)
        return allowed(self, matchers)

    monkeypatch.setattr(structure.StructureMasks, "_allowed", noted)
    answers(llm, [params(regex="[ab]{6}")] * 3)
    assert len(made) == 6 and all(name.startswith("structure") for name in made)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_checked_tokens_are_those_that_masks_lead_to(
    llm: batchllm.LLM, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Whether masks are made for every token, where the last was small, or only where tries have failed."""
    asked = [
        params(temperature=temperature, max_tokens=40, **limit)
        for schema in SCHEMAS[:20]
        for limit in (
            {"json_schema": schema},
            {"regex": r"[^q]*\."},
            {"json_schema": schema, "top_p": 0.9},
            {},
        )
    ]
    monkeypatch.setattr(structure, "_FEW", 1)
    asked.append(params(regex="[a-z]{9}", allowed_token_ids=byte_tokenizer().encode("12")))
    found = []
    for most in (2.0, structure._MOST, 0.0):
        monkeypatch.setattr(structure, "_MOST", most)
        made: list[int] = []
        count_masks(monkeypatch, made)
        found.append((answers(llm, asked), sum(made)))
    (masked, every), (mixed, some), (checked, few) = found
    assert masked == mixed == checked
    assert masked[-1].error == "after 0 tokens no token is allowed by the row's parameters"
    assert every > some > few


def count_masks(monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    allowed = structure.StructureMasks._allowed

    def noted(self: Any, matchers: Any) -> Any:
        made.append(len(matchers))
        return allowed(self, matchers)

    monkeypatch.setattr(structure.StructureMasks, "_allowed", noted)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 256])
def test_what_has_no_bit_is_forbidden(native: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(structure, "native_kernels", lambda _dtype: None)
    vocabulary = load_vocabulary(byte_tokenizer(), VOCABULARY, [EOS])
    masks = structure.StructureMasks(vocabulary, size)
    bits = np.random.default_rng(size).integers(-(2**31), 2**31, (5, 8), dtype=np.int32)
    logits, wide = torch.randn(5, size), torch.zeros(5, 300)
    wide[:, :size] = logits
    may_come = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :size].astype(bool)
    rows = [4, 0, 2]
    masks._forbid(wide[:, :size], rows, bits[rows])
    may_come[[1, 3]] = True
    assert torch.equal(wide[:, :size], logits.masked_fill(torch.from_numpy(~may_come), -torch.inf))
    assert not wide[:, size:].any()


def test_masks_agree_with_the_matcher() -> None:
    vocabulary = load_vocabulary(byte_tokenizer(), VOCABULARY, [EOS])
    matcher = compile_grammar(CoreParams(regex="a?"), vocabulary)
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == sorted([byte_tokenizer().encode("a")[0], EOS])


def test_log_probabilities_are_those_of_the_models_own_logits(llm: batchllm.LLM) -> None:
    """Masks are put into the logits themselves, where nobody reads them afterwards."""
    asked = [params(logprobs=3, max_tokens=2, **limit) for limit in ({}, {"choice": ["qq", "zz"]})]
    free, held = (output.outputs[0] for output in llm.generate(["Question: "] * 2, asked, use_tqdm=False))
    assert held.text in ("qq", "zz")
    found = [
        {one.rank: (token, one.logprob) for token, one in answer.logprobs[0].items() if one.rank}
        for answer in (free, held)
    ]
    for rank in (1, 2, 3):
        assert found[0][rank] == pytest.approx(found[1][rank], abs=1e-4)
    assert held.logprobs[0][held.token_ids[0]].logprob < -1  # among all tokens, not among two


def test_an_end_that_only_the_generation_config_names(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is None
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 128_009]}))
    rows = [{"id": "0", "prompt": "Q: "}]
    job = make_job(tmp_path / "job", folder, rows, generate={"max_tokens": 9, "choice": ["yes", "no"]})
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_output(tmp_path / "job" / "out")["output"][0] in ("yes", "no")
