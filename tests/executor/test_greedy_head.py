"""Greedy tokens chosen without all logits: the same as with them, in whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from batchllm.core import SamplingParams
from batchllm.executor import greedy_head
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.greedy_head import GreedyHead, needs_only_largest
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.native import native_kernels
from batchllm.executor.stopping import StopRules
from batchllm.planner.plan import PlanOptions, build_plan
from tests.executor.harness import prompt_table, request_table
from tests.executor.test_exactness import prompts_of_every_kind
from tests.executor.tiny_models import COMMON, EOS, configurations, make_model
from tests.native import needs_kernels

pytestmark = needs_kernels
GREEDY = SamplingParams(max_tokens=12)
DRAWN = SamplingParams(max_tokens=12, temperature=0.8)


@pytest.fixture(autouse=True)
def _byte_products() -> None:
    kernels = native_kernels(torch.bfloat16)
    if kernels is not None and not greedy_head.can_screen(kernels):
        pytest.skip("needs a CPU with AVX-512 VNNI")


def runner(config: Any, change: Any = None) -> ModelRunner:
    """In bfloat16, with fused layers where there are any, and packed weights."""
    model = make_model(config).to(torch.bfloat16)
    if change is not None:
        with torch.no_grad():
            change(model)
    found = prepare_model(model)
    if not found.fuse(packed=True):
        found.pack()
    return found


def answers(
    model: ModelRunner, params: Sequence[SamplingParams], **options: int
) -> tuple[list[Any], list[int]]:
    """Results of prompts that take these parameters in turn, and how many rows of each step were screened."""
    prompts = prompts_of_every_kind()
    table = replace(
        prompt_table(prompts, params[0]),
        params=tuple(params),
        params_of=np.arange(len(prompts), dtype=np.int32) % len(params),
    )
    requests = request_table(len(prompts), 1)
    plan = build_plan(table, requests, np.ones(len(prompts), dtype=bool), PlanOptions(min_shared_tokens=4))
    limits = EngineOptions(kv_tokens=4096, max_step_tokens=options.get("max_step_tokens", 60))
    engine = Engine(model, plan, table, requests, StopRules(frozenset([EOS]), None), limits)
    screened: list[int] = []
    head = model.greedy_head
    if head is not None:
        choose = head.tokens
        head.tokens = lambda states: screened.append(len(states)) or choose(states)  # type: ignore[method-assign, func-returns-value, assignment]
    results = [result for finished in engine.run() for result in finished]
    if head is not None:
        del head.tokens
    return sorted(results, key=lambda result: result.sequence), screened


def assert_same(
    model: ModelRunner, params: Sequence[SamplingParams], monkeypatch: pytest.MonkeyPatch, **options: int
) -> list[int]:
    """With screening and without; returns the rows of each screened step."""
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "greedy_head", None)
        expected, _ = answers(model, params, **options)
    found, screened = answers(model, params, **options)
    assert found == expected
    return screened


def repeat_rows(model: Any) -> None:
    """Pairs of tokens with equal logits, so that the smaller id has to be taken."""
    model.lm_head.weight[50:] = model.lm_head.weight[3:50]


def one_large_state(model: Any) -> None:
    """One that no logit depends on; beside it, the others are 0 as integers."""
    model.model.norm.weight[7] = 3e4
    model.lm_head.weight[:, 7] = 0


@pytest.mark.parametrize(
    ("architecture", "max_step_tokens"),
    [("llama", 5), ("llama", 60), ("mistral", 60), ("qwen2", 60), ("qwen3", 60)],
)
def test_greedy_runs(architecture: str, max_step_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configurations()[architecture]
    config.tie_word_embeddings = False
    screened = assert_same(runner(config), [GREEDY], monkeypatch, max_step_tokens=max_step_tokens)
    assert sum(screened) > 100


def test_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """These return the states of all tokens, not only of those with logits."""
    model = prepare_model(make_model(LlamaConfig(**COMMON)).to(torch.bfloat16))
    model.pack()
    assert sum(assert_same(model, [GREEDY], monkeypatch)) > 100


def test_of_equal_logits_the_smaller_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner(LlamaConfig(**COMMON), repeat_rows)
    assert sum(assert_same(model, [GREEDY], monkeypatch)) > 100
    assert all(token < 50 for result in answers(model, [GREEDY])[0] for token in result.tokens)


OTHERS = {
    "drawn": DRAWN,
    "logprobs": replace(GREEDY, logprobs=True),
    "top logprobs": replace(GREEDY, top_logprobs=2),
    "penalty": replace(GREEDY, repetition_penalty=1.3),
    "bias": replace(GREEDY, logit_bias=((5, 100.0),)),
    "allowed": replace(GREEDY, allowed_token_ids=(5, 6, 9)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_steps_in_which_a_row_needs_its_logits(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_only_largest(GREEDY) and not needs_only_largest(OTHERS[other])
    few = replace(OTHERS[other], max_tokens=3)  # steps with it and steps without
    model = runner(LlamaConfig(**COMMON))
    screened = assert_same(model, [GREEDY, few, GREEDY], monkeypatch)
    assert screened
    assert not answers(model, [OTHERS[other]])[1]


def test_too_many_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits are computed after all; and soon without trying."""
    monkeypatch.setattr(greedy_head, "_SEEN", 40)
    config = LlamaConfig(**{**COMMON, "vocab_size": 3000})
    model = runner(config, one_large_state)
    screened = assert_same(model, [GREEDY], monkeypatch)
    assert 40 <= sum(screened) < 100
    assert model.greedy_head is not None and not model.greedy_head.pays


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "qwen3_moe"])
def test_models_whose_logits_may_be_something_else(architecture: str) -> None:
    assert runner(configurations()[architecture]).greedy_head is None


def test_layers_it_cannot_be_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner(LlamaConfig(**COMMON, tie_word_embeddings=True)).greedy_head is None

    def add_bias(model: Any) -> None:
        model.lm_head.bias = torch.nn.Parameter(torch.ones(97, dtype=torch.bfloat16))

    def spoil(model: Any) -> None:
        model.lm_head.weight[4, 4] = float("nan")

    assert runner(LlamaConfig(**COMMON), add_bias).greedy_head is None
    assert runner(LlamaConfig(**COMMON), spoil).greedy_head is None
    model = runner(LlamaConfig(**COMMON))
    assert isinstance(model.greedy_head, GreedyHead)
    model.unfuse()
    assert model.greedy_head is None
    monkeypatch.setattr(greedy_head, "_MOST_BYTES", 97 * 32 - 1)
    model.pack()
    assert model.greedy_head is None
    model.unfuse()
    monkeypatch.setattr(greedy_head, "_MOST_BYTES", 97 * 32)
    model.pack()
    assert model.greedy_head is not None
