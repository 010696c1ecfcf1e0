"""The sampler against transformers' own logits processors, and what it guarantees row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchllm.core import SamplingParams
from batchllm.executor.random_numbers import draw_words
from batchllm.executor.sampler import _draw_sorted, _limited, choose_tokens, token_logprobs
from tests.native import needs_kernels, sample_with_torch

VOCABULARY = 211
SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 7, 500)
    for top_p in (0.05, 0.6, 0.95, 1.0)
    for min_p in (0.0, 0.03, 0.5)
]


@pytest.fixture(autouse=True, params=["torch", pytest.param("native", marks=needs_kernels)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way tokens are drawn."""
    if request.param == "torch":
        sample_with_torch(monkeypatch)


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def transformers_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(processors(None, logits).double(), dim=-1)


def our_distribution(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    temperature = torch.tensor([row.temperature for row in params]).unsqueeze(1)
    scaled, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    weights = _limited(torch.softmax(scaled, dim=-1, dtype=torch.float64), params)
    return torch.zeros_like(weights).scatter(1, order, weights / weights.sum(dim=-1, keepdim=True))


def test_same_support_and_probabilities_as_transformers() -> None:
    logits = random_logits(len(SETTINGS))
    ours = our_distribution(logits, SETTINGS)  # every setting in one batch: rows must not mix
    for row, params in enumerate(SETTINGS):
        expected = transformers_distribution(logits[row : row + 1], params)[0]
        assert ((ours[row] > 0) == (expected > 0)).all(), params
        torch.testing.assert_close(ours[row], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=12),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02),
    ],
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    draws = 40_000
    logits = random_logits(1, seed=5)
    keys = np.random.default_rng(2).integers(0, 2**64, (draws, 2), dtype=np.uint64)
    counts = torch.zeros(VOCABULARY)
    for part in np.split(keys, 10):
        tokens = choose_tokens(
            logits.expand(len(part), -1), [params] * len(part), part, np.zeros(len(part), dtype=np.int64)
        )
        counts += torch.bincount(torch.from_numpy(tokens), minlength=VOCABULARY)
    expected = transformers_distribution(logits, params)[0]
    assert counts[expected == 0].sum() == 0, "a token was drawn that transformers excludes"
    often = expected * draws > 20
    deviation = (counts[often] - expected[often] * draws) / (expected[often] * draws).sqrt()
    assert deviation.abs().max() < 4.5
    assert deviation.square().mean() < 1.8


def keys_of(rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**64, (rows, 2), dtype=np.uint64)


def test_a_row_does_not_depend_on_what_it_is_batched_with() -> None:
    rows = len(SETTINGS)
    logits, keys, indices = random_logits(rows, seed=7), keys_of(rows), np.arange(rows) % 11
    unlimited = SamplingParams(temperature=1.3)
    params = [(SamplingParams(), unlimited, SETTINGS[row])[row % 3] for row in range(rows)]
    together = choose_tokens(logits, params, keys, indices)
    order = np.random.default_rng(4).permutation(rows)
    shuffled = choose_tokens(logits[order], [params[row] for row in order], keys[order], indices[order])
    assert (shuffled == together[order]).all()
    alone = [
        choose_tokens(logits[row : row + 1], [params[row]], keys[row : row + 1], indices[row : row + 1])[0]
        for row in range(rows)
    ]
    assert alone == together.tolist()


def test_flat_rows_with_limits_draw_as_if_they_were_sorted() -> None:
    """More tokens than candidates stay within the limits, so scores are looked at one by one."""
    rows, vocabulary = 60, 2000
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * 0.7
    logits[::3] = (logits[::3] * 4).round() / 4  # many equal ones
    limits = [
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.0, top_k=700),
        SamplingParams(temperature=1.3, min_p=0.05),
        SamplingParams(temperature=1.0, top_k=900, top_p=0.5),
        SamplingParams(temperature=1.0, top_k=50),
        SamplingParams(temperature=0.2, top_p=0.7),
        SamplingParams(temperature=0.3, min_p=0.2, top_k=200),
    ]
    params, keys = [limits[row % 7] for row in range(rows)], keys_of(rows)
    words = torch.from_numpy(draw_words(keys, np.zeros(rows, dtype=np.int64)))
    expected = [_draw_sorted(logits[row : row + 1], params[row], words[row : row + 1]) for row in range(rows)]
    assert choose_tokens(logits, params, keys, np.zeros(rows, dtype=np.int64)).tolist() == expected
    cut = choose_tokens(
        logits, [SamplingParams(temperature=1.0)] * rows, keys, np.zeros(rows, dtype=np.int64)
    )
    assert (cut != expected).sum() > 5


def test_another_token_index_or_key_draws_anew() -> None:
    logits = random_logits(1).expand(200, -1) * 0.1
    params, keys = [SamplingParams(temperature=1.0)] * 200, keys_of(200)
    zeros = np.zeros(200, dtype=np.int64)
    assert len(set(choose_tokens(logits, params, keys, zeros).tolist())) > 50
    one_key = np.repeat(keys[:1], 200, axis=0)
    assert len(set(choose_tokens(logits, params, one_key, np.arange(200)).tolist())) > 50
    assert len(set(choose_tokens(logits, params, one_key, zeros).tolist())) == 1


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[1, [40, 17, 90]] = 2.5
    logits[2, -1] = 1.0
    chosen = choose_tokens(logits, [SamplingParams()] * 3, keys_of(3), np.zeros(3, dtype=np.int64))
    assert chosen.tolist() == [0, 17, VOCABULARY - 1]


def test_narrow_limits_are_greedy() -> None:
    logits, keys, indices = random_logits(50), keys_of(50), np.arange(50)
    greedy = choose_tokens(logits, [SamplingParams()] * 50, keys, indices)
    for params in (
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-300, top_p=0.5),
    ):
        assert (choose_tokens(logits, [params] * 50, keys, indices) == greedy).all(), params


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = random_logits(6)
    tokens = np.array([3, 0, 210, 7, 7, 100])
    expected = torch.log_softmax(logits.double(), dim=-1)[torch.arange(6), torch.from_numpy(tokens)]
    np.testing.assert_allclose(token_logprobs(logits, tokens), expected.numpy(), atol=1e-5)
