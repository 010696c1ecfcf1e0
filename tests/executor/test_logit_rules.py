"""Penalties, biases and tokens ruled out, against a plain numpy account of them, row by row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.core import Plan, PromptTable, SamplingParams
from batchllm.executor.logit_rules import LogitRules, bad_word_tokens
from batchllm.executor.running import Running
from batchllm.executor.sampler import choose_tokens
from batchllm.planner.plan import PlanOptions, build_plan
from tests.executor.harness import request_table
from tests.tiny_tokenizer import byte_tokenizer

VOCABULARY = 262
EOS = 257
TOKENIZER = byte_tokenizer()
FORBIDDEN = -np.inf

SETTINGS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=0.5),
    SamplingParams(frequency_penalty=-0.8),
    SamplingParams(presence_penalty=1.3),
    SamplingParams(frequency_penalty=0.4, presence_penalty=-0.2, logit_bias=((5, 2.5), (9, -100.0))),
    SamplingParams(logit_bias=((0, 1.0), (261, 3.0))),
    SamplingParams(bad_words=("q", "ab", "xyz")),
    SamplingParams(allowed_token_ids=(3, 5, 9, 66)),
    SamplingParams(allowed_token_ids=(3, 65, 66), bad_words=("b",), logit_bias=((3, 4.0),)),
    SamplingParams(max_tokens=20, min_tokens=7, stop_token_ids=(11,)),
    SamplingParams(max_tokens=20, min_tokens=3),
    SamplingParams(max_tokens=20, min_tokens=20, ignore_eos=True, stop_token_ids=(12,)),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, min_tokens=9, bad_words=("an",)),
]


def reference(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """What one row's logits become, written down from the definitions."""
    row = logits.astype(np.float64).copy()
    for token in {*prompt, *output}:
        row[token] = (
            row[token] / params.repetition_penalty
            if row[token] > 0
            else row[token] * params.repetition_penalty
        )
    for token, times in Counter(output).items():
        row[token] -= params.frequency_penalty * times + params.presence_penalty
    for token, bias in params.logit_bias:
        row[token] += bias
    if params.allowed_token_ids:
        row[[token for token in range(VOCABULARY) if token not in params.allowed_token_ids]] = FORBIDDEN
    for word in params.bad_words:
        for text in (word, " " + word):
            tokens = TOKENIZER.encode(text, add_special_tokens=False)
            if len(tokens) == 1 or output[-len(tokens) + 1 :] == tokens[:-1]:
                row[tokens[-1]] = FORBIDDEN
    if len(output) < params.min_tokens:
        row[list(params.stop_token_ids)] = FORBIDDEN
        if not params.ignore_eos:
            row[EOS] = FORBIDDEN
    return row


def world(
    settings: list[SamplingParams],
) -> tuple[Plan, PromptTable, list[list[int]], list[list[int]]]:
    """Prompts and outputs with repeated tokens; some outputs end just before the last letter of a bad word."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 40, 12 + row).tolist() for row in range(len(settings))]
    outputs = [random.integers(20, 90, row % 9).tolist() for row in range(len(settings))]
    endings = {7: "x a", 13: " a"}
    for row, text in endings.items():
        if row < len(outputs):
            outputs[row] += TOKENIZER.encode(text)
    offsets = np.cumsum([0, *map(len, prompts)])
    tokens = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    table = PromptTable(tokens, offsets, tuple(settings), np.arange(len(settings), dtype=np.int32), {})
    requests = request_table(len(settings), 1)
    plan = build_plan(table, requests, np.ones(len(settings), bool), PlanOptions(min_shared_tokens=4))
    return plan, table, prompts, outputs


def running(plan: Plan, table: PromptTable, row: int, output: list[int]) -> Running:
    sequence = next(s for s in range(plan.num_sequences) if plan.request[plan.request_ptr[s]] == row)
    leaf = int(plan.sequence_node[sequence])
    length = int(table.offsets[row + 1] - table.offsets[row])
    params = table.params[row]
    return Running(sequence, leaf, (), int(plan.node_start[leaf]), length, params, 99, output)


def rules_of(plan: Plan, table: PromptTable) -> LogitRules:
    return LogitRules(plan, table, frozenset([EOS]), TOKENIZER)


def test_every_rule_is_its_definition_and_rows_do_not_mix() -> None:
    plan, table, prompts, outputs = world(SETTINGS)
    logits = torch.randn(len(SETTINGS), VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    runs = [running(plan, table, row, outputs[row]) for row in range(len(SETTINGS))]
    before = logits.clone()
    changed = rules_of(plan, table).apply(logits, runs).numpy()
    assert (logits == before).all()  # log-probabilities are read from them
    for row, params in enumerate(SETTINGS):
        expected = reference(before[row].numpy(), params, prompts[row], outputs[row])
        np.testing.assert_allclose(changed[row], expected, atol=1e-5, err_msg=str(params))
        alone = rules_of(plan, table).apply(before[row : row + 1], [runs[row]])
        assert (alone[0].numpy() == changed[row]).all(), params
    assert rules_of(plan, table).apply(logits[:1], runs[:1]) is not None


def test_a_history_goes_on_from_step_to_step() -> None:
    plan, table, prompts, _ = world(SETTINGS)
    rules, rows = rules_of(plan, table), [1, 2, 4, 13]
    outputs: list[list[int]] = [[] for _ in rows]
    runs = [running(plan, table, row, output) for row, output in zip(rows, outputs)]
    random = np.random.default_rng(3)
    for _ in range(6):
        logits = torch.from_numpy(random.normal(size=(len(rows), VOCABULARY)).astype(np.float32))
        changed = rules.apply(logits, runs).numpy()
        for index, row in enumerate(rows):
            expected = reference(logits[index].numpy(), SETTINGS[row], prompts[row], outputs[index])
            np.testing.assert_allclose(changed[index], expected, atol=1e-5)
            outputs[index].append(int(random.integers(0, 6)))


def test_nothing_is_copied_where_no_row_has_rules() -> None:
    plan, table, _, outputs = world(SETTINGS[:1] * 3)
    logits = torch.randn(3, VOCABULARY)
    runs = [running(plan, table, row, outputs[row]) for row in range(3)]
    assert rules_of(plan, table).apply(logits, runs) is logits


def test_bad_words_are_written_with_and_without_a_space() -> None:
    assert bad_word_tokens(("ab",), TOKENIZER) == [
        tuple(TOKENIZER.encode("ab")),
        tuple(TOKENIZER.encode(" ab")),
    ]
    assert bad_word_tokens((), None) == []


@pytest.mark.parametrize("row", [2, 5, 7, 9, 13])
@pytest.mark.parametrize("limits", [{}, {"top_k": 9}, {"top_p": 0.8, "min_p": 0.01}])
def test_draws_follow_the_changed_distribution(row: int, limits: dict[str, Any]) -> None:
    draws = 6000
    plan, table, prompts, outputs = world(SETTINGS)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(row)) * 2
    params = SamplingParams(temperature=1.3, **limits)
    run = running(plan, table, row, outputs[row])
    changed = rules_of(plan, table).apply(logits, [run])
    keys = np.random.default_rng(row).integers(0, 2**64, (draws, 2), dtype=np.uint64)
    drawn = choose_tokens(changed.expand(draws, -1), [params] * draws, keys, np.zeros(draws, np.int64))
    expected = softmax_within(
        reference(logits[0].numpy(), SETTINGS[row], prompts[row], outputs[row]) / 1.3, params
    )
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    assert chi_square_is_likely(counts, expected * draws)


def softmax_within(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after top-k, top-p and min-p, by sorting."""
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    if params.top_k:
        weights[params.top_k :] = 0
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    weights[(before >= params.top_p) & (np.arange(len(weights)) > 0)] = 0
    weights[weights < params.min_p * weights[0]] = 0
    probabilities = np.zeros_like(weights)
    probabilities[order] = weights / weights.sum()
    return probabilities


def chi_square_is_likely(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Rare tokens are counted together. The limit is exceeded by chance about once in a hundred thousand."""
    often = expected >= 8
    groups = [*zip(counts[often], expected[often]), (counts[~often].sum(), expected[~often].sum())]
    groups = [(count, mean) for count, mean in groups if mean > 1]
    statistic = sum((count - mean) ** 2 / mean for count, mean in groups)
    freedom = max(1, len(groups) - 1)
    return bool(statistic < freedom + 4.3 * np.sqrt(2 * freedom) + 14)


def test_tokens_that_the_model_does_not_have_need_no_ban() -> None:
    """Of stop tokens, ends of text and words; what else is banned stays banned."""
    settings = [
        SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(128_009, 11)),
        SamplingParams(bad_words=("q", "ab")),
    ]
    plan, table, _, _ = world(settings)
    rules = LogitRules(plan, table, frozenset([EOS, VOCABULARY]), _WithNewWords())
    runs = [running(plan, table, 0, []), running(plan, table, 1, TOKENIZER.encode(" "))]
    changed = rules.apply(torch.zeros(2, VOCABULARY), runs)
    forbidden = [torch.isneginf(row).nonzero().flatten().tolist() for row in changed]
    assert forbidden == [sorted([11, EOS]), TOKENIZER.encode("q")]


class _WithNewWords:
    """Knows " ab" as a token of its own, and one for "ab" that follows an "a"."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        known = {" ab": [VOCABULARY], "ab": [*TOKENIZER.encode("a"), VOCABULARY + 3]}
        return known.get(text) or TOKENIZER.encode(text, add_special_tokens=add_special_tokens)


def test_many_sets_of_parameters_take_little_memory() -> None:
    """What is known of a set is as large as the set, not as the vocabulary, and sets are forgotten."""
    settings = [SamplingParams(allowed_token_ids=(3, 5, 9), seed=number) for number in range(10_000)]
    plan, table, _, _ = world(settings[:1])
    rules, run = rules_of(plan, table), running(plan, table, 0, [])
    vocabulary = 150_000
    for params in settings:
        fixed = rules._fixed_of(params, vocabulary)
        assert fixed.allowed is not None and fixed.allowed.numel() == 3
    assert rules._fixed_of.cache_info().currsize < len(settings)
    changed = rules.apply(torch.zeros(1, vocabulary), [run])
    assert torch.isfinite(changed[0]).nonzero().flatten().tolist() == [3, 5, 9]
