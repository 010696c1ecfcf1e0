"""Scores of given tokens, through shared nodes, copies, chunks, little memory and slices of logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from batchllm.core import SamplingParams
from batchllm.dataset.keys import make_requests
from batchllm.executor import engine as engine_module
from batchllm.executor import scores as scores_module
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.stopping import StopRules
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.planner.score_reads import plan_score_reads
from batchllm.scoring import TokenSpan, mixed_table, windows
from tests.executor.tiny_models import EOS, VOCABULARY, configurations, generate_alone, make_model

Item = TokenSpan | tuple[Sequence[int], SamplingParams]
GENERATED = SamplingParams(max_tokens=5)


@cache
def runner(name: str) -> ModelRunner:
    return prepare_model(make_model(configurations()[name]))


@cache
def plain(name: str) -> torch.nn.Module:
    return make_model(configurations()[name])


def few_shot_items() -> list[Item]:
    """Everything that makes a score come from somewhere else: shared contexts, equal prompts with other last tokens,
    continuations within shared nodes, prefixes too short for a node, a span that is another's context."""
    random = np.random.default_rng(3)

    def tokens(count: int) -> list[int]:
        return random.integers(4, VOCABULARY, count).tolist()

    items: list[Item] = []
    root = tokens(20)
    for _ in range(3):
        question = root + tokens(9)
        for choice in ([5], [6], [7, 8, 9], [7, 8, 10], [7, *tokens(12)], [7, *tokens(12)]):
            items.append(TokenSpan(question + choice, len(question)))
        items.append((question, GENERATED))
    long = tokens(30)
    items += [TokenSpan(long + tokens(count), first) for count in (1, 5) for first in (1, 10, 30)]
    items += [TokenSpan([11, 12, *tokens(7)], 1) for _ in range(4)]  # two tokens in common: copied
    items += [TokenSpan([11, 12, 13], 1), TokenSpan([11, 12], 1)]
    items.append(([11, 12], GENERATED))
    return items


def run(
    name: str, items: Sequence[Item], *, kv_tokens: int = 4096, step: int = 64, fused: bool = False
) -> tuple[list[tuple[np.ndarray, np.ndarray] | tuple[int, ...]], Engine]:
    model = runner(name)
    if fused:
        assert model.fuse()
    table, scored = mixed_table(items, None, VOCABULARY)
    requests = make_requests(table, None, b"")
    plan = build_plan(table, requests, np.ones(len(requests), bool), PlanOptions(min_shared_tokens=4))
    reads = plan_score_reads(plan, table, requests, scored)
    options = EngineOptions(kv_tokens, step)
    engine = Engine(
        model, plan, table, requests, StopRules(frozenset([EOS]), None), options, score_reads=reads
    )
    answers: dict[int, tuple[int, ...]] = {}
    for finished in engine.run():
        engine.pool.check_integrity()
        for result in finished:
            assert result.error is None
            pointers = plan.request_ptr[result.sequence : result.sequence + 2]
            answers |= dict.fromkeys(plan.request[slice(*pointers)].tolist(), result.tokens)
    model.unfuse()
    found: list[tuple[np.ndarray, np.ndarray] | tuple[int, ...]] = []
    for row, item in enumerate(items):
        if isinstance(item, TokenSpan):
            assert answers[row] == ()
            numbers = reads.of_row(row)
            found.append((engine.scores.logprob[numbers], engine.scores.greedy[numbers]))
        else:
            found.append(answers[row])
    return found, engine


def dense(name: str, span: TokenSpan) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        logits = plain(name)(torch.tensor([span.tokens])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)[span.first - 1 : -1]
    target = torch.tensor(span.tokens[span.first :])
    chosen = logprobs.gather(1, target[:, None])[:, 0]
    return chosen.numpy(), (logprobs.argmax(-1) == target).numpy()


def check(name: str, items: Sequence[Item], found: list) -> None:
    for item, answer in zip(items, found, strict=True):
        if isinstance(item, TokenSpan):
            logprobs, greedy = dense(name, item)
            np.testing.assert_allclose(answer[0], logprobs, atol=1e-4, rtol=0)
            assert (answer[1] == greedy).all()
        else:
            assert list(answer) == generate_alone(plain(name), item[0], GENERATED.max_tokens)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_scores_are_those_of_each_text_alone(name: str) -> None:
    items = few_shot_items()
    check(name, items, run(name, items)[0])


@pytest.mark.parametrize(("kv_tokens", "step"), [(4096, 7), (60, 16), (45, 5)])
def test_small_steps_and_little_memory_change_nothing(kv_tokens: int, step: int) -> None:
    items = few_shot_items()
    check("llama", items, run("llama", items, kv_tokens=kv_tokens, step=step)[0])


def test_fused_layers_give_only_the_rows_that_are_read() -> None:
    items = few_shot_items()
    check("llama", items, run("llama", items, fused=True)[0])


def test_logits_are_held_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "SLICE_VALUES", 3 * VOCABULARY)
    sizes = []
    read = scores_module.ScoreStore.read

    def counted(self: scores_module.ScoreStore, scores: object, first: int, logits: torch.Tensor) -> None:
        sizes.append(len(logits))
        read(self, scores, first, logits)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module.ScoreStore, "read", counted)
    items = few_shot_items()
    for fused in (False, True):
        check("llama", items, run("llama", items, fused=fused)[0])
    assert max(sizes) == 3


def test_a_shared_context_is_computed_once() -> None:
    items = few_shot_items()
    _, engine = run("llama", items)
    assert engine.stats.prompt_tokens_computed == engine.plan.stats.distinct_tokens
    assert engine.stats.output_tokens <= 5 * sum(not isinstance(item, TokenSpan) for item in items)


@pytest.mark.parametrize(("length", "limit"), [(1, 8), (8, 8), (9, 8), (16, 8), (27, 8), (5, 1)])
def test_every_token_of_a_document_is_in_one_window(length: int, limit: int) -> None:
    tokens = list(range(100, 100 + length))
    spans = windows(tokens, 7, limit)
    assert [token for span in spans for token in span.tokens[span.first :]] == tokens
    assert spans[0].tokens[0] == 7
    for span in spans:
        assert len(span.tokens) - 1 <= limit
    for span in spans[1:]:
        assert len(span.tokens) - 1 == limit  # filled up with context


def test_scores_of_rows_that_copy_from_one_that_never_fits() -> None:
    """The first of three that share a token does not fit in memory: what was to be read there is read elsewhere."""
    random = np.random.default_rng(1)
    texts = [[11, 20 + number, *random.integers(4, VOCABULARY, 3).tolist()] for number in range(5)]
    texts[0] += random.integers(4, VOCABULARY, 60).tolist()
    texts[1] += random.integers(4, VOCABULARY, 50).tolist()
    items = [TokenSpan(text, 1) for text in texts]
    table, scored = mixed_table(items, None, VOCABULARY)
    requests = make_requests(table, None, b"")
    plan = build_plan(table, requests, np.ones(5, bool), PlanOptions(min_shared_tokens=4, order="input"))
    assert plan.node_copied.tolist() == [0, 1, 1, 1, 1]
    reads = plan_score_reads(plan, table, requests, scored)
    rules, options = StopRules(frozenset([EOS]), None), EngineOptions(40)
    engine = Engine(runner("llama"), plan, table, requests, rules, options, score_reads=reads)
    errors = {result.sequence: result.error for finished in engine.run() for result in finished}
    assert [errors[row] is None for row in range(5)] == [False, False, True, True, True]
    for row in (2, 3, 4):
        logprobs, _ = dense("llama", items[row])
        np.testing.assert_allclose(engine.scores.logprob[reads.of_row(row)], logprobs, atol=1e-4, rtol=0)
