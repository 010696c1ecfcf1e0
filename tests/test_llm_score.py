"""`LLM.score` and `LLM.score_documents`."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from batchllm import LLM, SamplingParams
from batchllm.scoring import TokenSpan, prefix_token
from tests.tiny_tokenizer import byte_tokenizer

CONTEXT = "The capital of France, as everybody knows, is"


@cache
def llm_of(folder: Path) -> LLM:
    return LLM(model=str(folder), min_shared_tokens=4)


@pytest.fixture
def llm(model_folder: Path) -> LLM:
    return llm_of(model_folder)


def dense(folder: Path, tokens: list[int], first: int) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    return logprobs[first - 1 : -1].gather(1, torch.tensor(tokens[first:])[:, None])[:, 0].numpy()


def test_continuations_of_one_context(llm: LLM, model_folder: Path) -> None:
    tokenizer = byte_tokenizer()
    [scores] = llm.score([CONTEXT + " "], [["Paris", "Pau", "Rome"]], use_tqdm=False)
    for text, score in zip(("Paris", "Pau", "Rome"), scores, strict=True):
        tokens = tokenizer(f"{CONTEXT} {text}")["input_ids"]
        first = len(tokenizer(CONTEXT)["input_ids"])
        expected = dense(model_folder, tokens, first)
        assert score.error is None
        assert list(score.token_ids) == tokens[first:]  # the space counts to the continuation
        np.testing.assert_allclose(score.token_logprobs, expected, atol=1e-4)
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-4)
        assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    assert llm.last_run.computed_tokens < llm.last_run.prompt_tokens / 2  # the context once, not three times


def test_greedy_text_is_greedy_and_other_text_is_not(llm: LLM) -> None:
    greedy = llm.generate([CONTEXT], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)[0]
    chosen = greedy.outputs[0].token_ids
    other = [*chosen[:-1], chosen[-1] - 1]
    context = greedy.prompt_token_ids
    [scores] = llm.score([context], [[chosen, other]], use_tqdm=False)
    assert [score.is_greedy for score in scores] == [True, False]


def test_pairs_that_cannot_be_scored_say_why_and_the_others_go_on(llm: LLM) -> None:
    rows = llm.score(
        [CONTEXT, CONTEXT, [5, 6]], [["", " Paris"], [" x" * 600], [[10_000], []]], use_tqdm=False
    )
    reasons = [[score.error for score in row] for row in rows]
    assert reasons[0] == ["the continuation is empty; give it text of its own", None]
    assert "the model can score at most" in str(reasons[1][0])
    assert "token id 10,000" in str(reasons[2][0])
    assert "empty" in str(reasons[2][1])
    assert math.isnan(rows[0][0].logprob)
    assert not rows[0][0].is_greedy


def test_documents_longer_than_the_model_are_scored_in_windows(llm: LLM, model_folder: Path) -> None:
    text = "Once upon a time there was a king. " * 40
    tokens = byte_tokenizer()(text)["input_ids"]
    assert len(tokens) > 2 * llm.max_length
    [score] = llm.score_documents([text], use_tqdm=False)
    assert list(score.token_ids) == tokens
    length = llm.max_length
    expected = [
        dense(model_folder, [prefix_token(byte_tokenizer()), *tokens[:length]], 1),
        dense(model_folder, tokens[length - 1 : 2 * length], 1),
    ]
    last = len(tokens) - length - 1
    expected.append(dense(model_folder, tokens[last:], 2 * length - last))
    np.testing.assert_allclose(score.token_logprobs, np.concatenate(expected), atol=1e-4)


def test_scores_and_answers_of_one_run(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=5)
    prompt = byte_tokenizer()(CONTEXT)["input_ids"]
    alone = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0]
    items = [(prompt, greedy), TokenSpan([*prompt, 9], len(prompt)), "given up", (prompt, greedy)]
    scores, answers = llm.score_and_generate(items, use_tqdm=False)
    assert [answer.text for answer in answers] == [alone.text] * 2
    assert [score.error for score in scores] == [None, "given up"]


def test_a_merged_continuation_is_named() -> None:
    from batchllm.scoring import MergedContinuation, split_pair

    assert split_pair([1, 2], [1, 2, 3]) == TokenSpan([1, 2, 3], 2)
    with pytest.raises(MergedContinuation, match="merges with the context's last token"):
        split_pair([1, 2], [1, 7, 3])
    with pytest.raises(MergedContinuation, match="adds no token"):
        split_pair([1, 2], [1, 7])
