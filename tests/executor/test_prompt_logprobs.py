"""Log-probabilities of prompts' own tokens, through shared nodes, copies, chunks and little memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from batchllm.core import PromptLogprobs, PromptTable, SamplingParams, SequenceResult
from batchllm.dataset.keys import make_requests
from batchllm.executor import scores as scores_module
from batchllm.executor.engine import EngineOptions
from batchllm.executor.engines import engine_for
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.stopping import StopRules
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.prompt_reads import wanted_tokens
from tests.executor.tiny_models import EOS, VOCABULARY, configurations, generate_alone, make_model

Row = tuple[list[int], int | None]  # prompt, prompt_logprobs


@cache
def runner(name: str) -> ModelRunner:
    return prepare_model(make_model(configurations()[name]))


@cache
def plain(name: str) -> torch.nn.Module:
    return make_model(configurations()[name])


def rows() -> list[Row]:
    """Shared nodes with and without rows that ask, duplicates, prompts that end where others go on, copies."""
    random = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return random.integers(4, VOCABULARY, count).tolist()

    root, other = tokens(20), tokens(16)
    found: list[Row] = []
    for question in range(4):
        middle = root + tokens(9)
        found += [(middle + tokens(count), top) for count, top in ((3, None), (5, 2), (1, 0), (8, 5))]
        found.append((middle, 3 if question % 2 else None))  # ends at a shared node
    found += [(root, 1), (root, 1), (root, None)]  # duplicates
    copied = [*other, 9, 10]  # from a row that does not ask
    found += [(copied + tokens(4), top) for top in (None, 4)]
    found += [([11, 12, *tokens(6)], top) for top in (None, 2, VOCABULARY + 5)]
    found += [([11], 2), ([13], None), ([11, 12], 0)]
    return found


def run(
    name: str, given: Sequence[Row], *, kv_tokens: int = 4096, step: int = 64, fused: bool = False
) -> tuple[list[SequenceResult], int, int]:
    """(result of each row, prompt tokens computed, distinct ones)"""
    model = runner(name)
    if fused:
        assert model.fuse()
    params = [SamplingParams(max_tokens=4, prompt_logprobs=top) for _, top in given]
    distinct = tuple(dict.fromkeys(params))
    table = PromptTable(
        np.array([token for prompt, _ in given for token in prompt], dtype=np.int32),
        np.cumsum([0, *(len(prompt) for prompt, _ in given)]),
        distinct,
        np.array([distinct.index(one) for one in params], dtype=np.int32),
        {},
    )
    requests = make_requests(table, None, b"")
    plan = build_plan(table, requests, np.ones(len(given), bool), PlanOptions(min_shared_tokens=4))
    rules, options = StopRules(frozenset([EOS]), None), EngineOptions(kv_tokens, step)
    engine = engine_for(model, plan, table, requests, rules, options)
    answers: dict[int, SequenceResult] = {}
    for finished in engine.run():
        for result in finished:
            assert result.error is None
            pointers = plan.request_ptr[result.sequence : result.sequence + 2]
            answers |= dict.fromkeys(plan.request[slice(*pointers)].tolist(), result)
    model.unfuse()
    distinct_tokens = plan.stats.distinct_tokens
    return [answers[row] for row in range(len(given))], engine.stats.prompt_tokens_computed, distinct_tokens


def check(name: str, given: Sequence[Row], results: Sequence[SequenceResult]) -> None:
    for (prompt, top), result in zip(given, results, strict=True):
        assert list(result.tokens) == generate_alone(plain(name), prompt, 4)
        if top is None:
            assert result.prompt_logprobs is None
        else:
            assert result.prompt_logprobs is not None
            compare(result.prompt_logprobs, name, prompt, min(top, VOCABULARY))


def compare(found: PromptLogprobs, name: str, prompt: list[int], top: int) -> None:
    with torch.inference_mode():
        dense = torch.log_softmax(plain(name)(torch.tensor([prompt])).logits[0].double(), -1)[:-1].numpy()
    assert found.tokens.tolist() == prompt
    assert found.top_tokens.shape == found.top_logprobs.shape == (len(prompt), top)
    assert np.isnan(found.logprobs[0]) and (found.top_tokens[0] == -1).all()
    following = np.array(prompt[1:], dtype=np.int64)
    np.testing.assert_allclose(found.logprobs[1:], dense[np.arange(len(dense)), following], atol=1e-4, rtol=0)
    largest = -np.sort(-dense, axis=1)[:, :top]
    np.testing.assert_allclose(found.top_logprobs[1:], largest, atol=1e-4, rtol=0)
    named = np.take_along_axis(dense, found.top_tokens[1:].astype(np.int64), axis=1)
    np.testing.assert_allclose(named, largest, atol=1e-4, rtol=0)
    assert all(len(set(row)) == top for row in found.top_tokens[1:].tolist())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_they_are_those_of_each_prompt_alone(name: str) -> None:
    results, computed, distinct = run(name, rows())
    check(name, rows(), results)
    assert computed == distinct  # asking for them computes nothing twice


@pytest.mark.parametrize(("kv_tokens", "step"), [(4096, 7), (70, 16), (50, 5)])
def test_small_steps_and_little_memory_change_nothing(kv_tokens: int, step: int) -> None:
    check("llama", rows(), run("llama", rows(), kv_tokens=kv_tokens, step=step)[0])


def test_fused_layers_and_slices_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "SLICE_VALUES", 3 * VOCABULARY)
    check("llama", rows(), run("llama", rows(), fused=True)[0])


def test_a_shared_token_is_listed_once_however_many_rows_ask() -> None:
    prefix = list(range(4, 24))
    prompts = [[*prefix, 30 + number, 31] for number in range(10)]
    params = SamplingParams(prompt_logprobs=1)
    table = PromptTable(
        np.array(prompts, dtype=np.int32).ravel(), np.arange(11) * 22, (params,), np.zeros(10, np.int32), {}
    )
    requests = make_requests(table, None, b"")
    plan = build_plan(table, requests, np.ones(10, bool), PlanOptions(min_shared_tokens=4))
    assert len(wanted_tokens(plan, table).target) == 19 + 10 * 2
