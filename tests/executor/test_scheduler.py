"""What the scheduler shares, how it keeps to its memory, and that nothing it does changes a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.core import SamplingParams
from batchllm.executor.kv_buffers import KvBuffers
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.scheduler import Scheduler
from batchllm.planner.plan import PlanOptions, build_plan
from tests.executor.harness import Outcome, prompt_table, request_table, run
from tests.executor.tiny_models import VOCABULARY, configurations, generate_alone, make_model

MAX_TOKENS = 12


class Constant:
    """Expects every sequence to decode so many more tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def learn(self, *_: np.ndarray) -> None:
        pass

    def estimate(
        self, params: np.ndarray, decoded: np.ndarray, limits: np.ndarray, group: np.ndarray
    ) -> np.ndarray:
        return np.full(len(decoded), self._tokens, dtype=np.int64)


@cache
def llama() -> tuple[Any, ModelRunner]:
    model = make_model(configurations()["llama"])
    return model, prepare_model(model)


@contextmanager
def transformers_attention() -> Iterator[Any]:
    """The model with transformers' own attention, for the oracles."""
    model, _ = llama()
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation("batchllm")


@cache
def alone(prompt: tuple[int, ...]) -> list[int]:
    with transformers_attention() as model:
        return generate_alone(model, prompt, MAX_TOKENS)


def random_text(random: np.random.Generator, length: int) -> list[int]:
    tokens: list[int] = random.integers(4, VOCABULARY, length).tolist()
    return tokens


def random_prompts(random: np.random.Generator) -> list[list[int]]:
    """A tree with shared stretches of any length, prompts that end where others branch, and repeated ones."""
    stretches: list[list[int]] = [[]]
    for _ in range(random.integers(1, 5)):
        parent = stretches[random.integers(len(stretches))]
        stretches.append(parent + random_text(random, int(random.integers(1, 25))))
    prompts = []
    for _ in range(random.integers(3, 11)):
        above = stretches[random.integers(len(stretches))]
        prompt = above + random_text(random, int(random.integers(0, 9)))
        prompts.append(prompt or random_text(random, 1))
    prompts += [prompts[random.integers(len(prompts))] for _ in range(random.integers(0, 3))]
    return [prompts[index] for index in random.permutation(len(prompts))]


def check_memory(outcome: Outcome, kv_tokens: int) -> None:
    assert outcome.stats.kv_tokens_peak <= kv_tokens
    assert outcome.engine.pool.used == 0, "KV memory leaked"
    assert not outcome.engine.scheduler.running
    assert not outcome.engine._kept_logits, "logits leaked"


@pytest.mark.parametrize("seed", range(60))
def test_no_schedule_changes_a_token(seed: int) -> None:
    """Small random jobs in memory barely enough for the longest sequence, with any step size and any foresight."""
    random = np.random.default_rng(seed)
    prompts = random_prompts(random)
    needed = max(map(len, prompts)) + MAX_TOKENS
    kv_tokens = needed + int(random.integers(0, 30))
    estimator = [Constant(1), Constant(MAX_TOKENS), None, Constant(4)][seed % 4]
    outcome = run(
        llama()[1],
        prompts,
        SamplingParams(max_tokens=MAX_TOKENS),
        kv_tokens=kv_tokens,
        max_step_tokens=int(random.integers(3, 65)),
        min_shared_tokens=int(random.integers(1, 12)),
        estimator=estimator,
    )
    assert [list(result.tokens) for result in outcome.results] == [alone(tuple(p)) for p in prompts]
    check_memory(outcome, kv_tokens)


def test_the_stress_above_reaches_recovery() -> None:
    """Otherwise the optimists would test nothing."""
    random = np.random.default_rng(2)
    system = random_text(random, 20)
    prompts = [system + random_text(random, 3) for _ in range(8)]
    outcome = run(
        llama()[1],
        prompts,
        SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
        kv_tokens=60,
        estimator=Constant(1),
    )
    assert outcome.stats.preemptions > 0
    assert outcome.stats.prompt_tokens_computed > outcome.plan.stats.planned_tokens
    check_memory(outcome, 60)


SAMPLED = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.9, n=5, ignore_eos=True)


@pytest.mark.parametrize("kv_tokens", [400, 70])
def test_samples_of_a_prompt_share_all_of_it(kv_tokens: int) -> None:
    """Also when memory lets only two of them run at a time."""
    prompt = random_text(np.random.default_rng(0), 40)
    outcome = run(llama()[1], [prompt], SAMPLED, kv_tokens=kv_tokens)
    assert outcome.stats.prompt_tokens_computed == len(prompt)
    assert outcome.stats.output_tokens == 5 * MAX_TOKENS
    assert len({result.tokens for result in outcome.results}) == 5, "samples of one prompt must differ"
    check_memory(outcome, kv_tokens)


def test_samples_do_not_depend_on_how_many_run_at_a_time() -> None:
    prompts = [random_text(np.random.default_rng(seed), 30) for seed in range(3)]
    wide = run(llama()[1], prompts, SAMPLED)
    narrow = run(llama()[1], prompts, SAMPLED, kv_tokens=60, max_step_tokens=7, estimator=Constant(1))
    assert narrow.stats.preemptions > 0
    assert [result.tokens for result in narrow.results] == [result.tokens for result in wide.results]


def test_identical_greedy_prompts_are_computed_once() -> None:
    prompt = random_text(np.random.default_rng(0), 40)
    outcome = run(llama()[1], [prompt] * 6, SamplingParams(max_tokens=MAX_TOKENS, n=2))
    assert outcome.stats.prompt_tokens_computed == len(prompt)
    assert outcome.stats.output_tokens == len(alone(tuple(prompt)))
    assert [list(result.tokens) for result in outcome.results] == [alone(tuple(prompt))] * 12


@pytest.mark.parametrize("kv_tokens", [4000, 160])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_computed_is_what_was_planned(seed: int, kv_tokens: int) -> None:
    """As long as nothing has to step back: also in little memory, with pessimistic estimates."""
    prompts = random_prompts(np.random.default_rng(100 + seed))
    outcome = run(
        llama()[1],
        prompts,
        SamplingParams(max_tokens=MAX_TOKENS),
        kv_tokens=kv_tokens,
        min_shared_tokens=1,
        estimator=Constant(MAX_TOKENS),
    )
    assert outcome.stats.preemptions == 0
    assert outcome.stats.prompt_tokens_computed == outcome.plan.stats.planned_tokens
    assert outcome.plan.stats.planned_tokens == len(
        {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    )


@pytest.mark.parametrize("seed", range(6))
def test_prefixes_too_short_for_a_node_are_copied(seed: int) -> None:
    """The plan counts them once although each sequence keeps its own copy."""
    prompts = random_prompts(np.random.default_rng(200 + seed))
    params = SamplingParams(max_tokens=MAX_TOKENS)
    outcome = run(llama()[1], prompts, params, min_shared_tokens=100, estimator=Constant(MAX_TOKENS))
    assert outcome.plan.stats.shared_nodes == 0
    assert outcome.plan.node_copied.sum() > 0
    assert outcome.stats.prompt_tokens_computed == outcome.plan.stats.planned_tokens
    assert [list(result.tokens) for result in outcome.results] == [alone(tuple(p)) for p in prompts]


def test_what_cannot_fit_alone_is_an_error_and_the_others_go_on() -> None:
    random = np.random.default_rng(4)
    system = random_text(random, 20)
    short = [system + random_text(random, 3) for _ in range(4)]
    too_long_prompt = system + random_text(random, 60)
    prompts = [short[0], too_long_prompt, *short[1:], random_text(random, 5)]
    outcome = run(llama()[1], prompts, SamplingParams(max_tokens=MAX_TOKENS), kv_tokens=50)
    failed = outcome.results.pop(1)
    assert failed.finish_reason == "error"
    assert failed.tokens == ()
    assert "do not fit in KV memory" in str(failed.error)
    del prompts[1]
    assert [list(result.tokens) for result in outcome.results] == [alone(tuple(p)) for p in prompts]
    check_memory(outcome, 50)


def test_an_output_that_outgrows_memory_is_an_error_and_the_others_go_on() -> None:
    random = np.random.default_rng(6)
    long, short = random_text(random, 40), [random_text(random, 5) for _ in range(3)]
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    outcome = run(llama()[1], [short[0], long, *short[1:]], params, kv_tokens=45, estimator=Constant(1))
    failed = outcome.results.pop(1)
    assert failed.finish_reason == "error"
    assert "KV memory ran out" in str(failed.error)
    assert all(len(result.tokens) == MAX_TOKENS for result in outcome.results)
    check_memory(outcome, 45)


def test_a_step_never_holds_more_tokens_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, runner = llama()
    sizes = []
    forward = ModelRunner.forward

    def recorded(self: ModelRunner, batch: Any, attention: Any) -> Any:
        sizes.append(len(batch.tokens))
        return forward(self, batch, attention)

    monkeypatch.setattr(ModelRunner, "forward", recorded)
    prompts = random_prompts(np.random.default_rng(8))
    run(runner, prompts, SamplingParams(max_tokens=MAX_TOKENS), max_step_tokens=6)
    assert max(sizes) == 6


def test_sequences_end_at_the_length_of_the_model() -> None:
    config = configurations()["llama"]
    config.max_position_embeddings = 30
    prompts = [random_text(np.random.default_rng(0), length) for length in (29, 25, 10)]
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    outcome = run(make_model(config), prompts, params)
    assert [len(result.tokens) for result in outcome.results] == [1, 5, MAX_TOKENS]
    assert {result.finish_reason for result in outcome.results} == {"length"}


def test_logprobs_are_those_of_the_model() -> None:
    prompts = [random_text(np.random.default_rng(seed), 9) for seed in range(3)]
    outcome = run(llama()[1], prompts, SamplingParams(max_tokens=5, logprobs=True), max_step_tokens=4)
    for prompt, result in zip(prompts, outcome.results):
        with transformers_attention() as model, torch.inference_mode():
            logits = model(torch.tensor([prompt + list(result.tokens)])).logits[0]
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
        expected = rows.gather(1, torch.tensor(result.tokens).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(result.logprobs, expected.numpy(), atol=1e-4)


def test_repeated_steps_stay_within_the_length_of_the_model() -> None:
    """Rows that ran on beyond it would need positions that the model does not have."""
    most, lengths = 40, [*[8] * 70, 34]  # memory behind the last one is free: its leaf can grow
    prompts = [[4 + row, *[3] * (length - 1)] for row, length in enumerate(lengths)]
    params = tuple(SamplingParams(max_tokens=limit, ignore_eos=True) for limit in (30, 500))
    params_of = np.array([row % 2 for row in range(len(lengths))], dtype=np.int32)
    table = replace(prompt_table(prompts, params[0]), params=params, params_of=params_of)
    plan = build_plan(
        table, request_table(len(prompts), 1), np.ones(len(prompts), bool), PlanOptions(order="input")
    )
    pool = KvPool(KvBuffers.empty([], 5000, None))
    scheduler = Scheduler(plan, table, pool, Constant(1), 2048, most, 4096)
    furthest = repeated = 0
    while batch := scheduler.schedule():
        repeats = scheduler.repeats(batch, 32) if batch.only_decodes else 1
        if batch.only_decodes:
            furthest = max(furthest, int(batch.positions.max()) + repeats)
            repeated += repeats > 1
        scheduler.advance(batch, repeats)
        tokens = np.full((repeats, len(batch.samples)), 5)
        scheduler.settle(batch, tokens, None, lambda run: len(run.output) >= run.limit)
    assert furthest <= most
    assert repeated >= 4


def test_nothing_is_remembered_of_sequences_that_fail() -> None:
    random = np.random.default_rng(6)
    prompts = [random_text(random, 5), random_text(random, 40)]
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, repetition_penalty=1.1)
    outcome = run(llama()[1], prompts, params, kv_tokens=45, estimator=Constant(1))
    assert "KV memory ran out" in str(outcome.results[1].error)
    assert not outcome.engine.rules._histories
