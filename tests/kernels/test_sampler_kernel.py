"""The sampling kernel: token for token what the CPU sampler chooses, whatever the row's limits and neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from batchllm_kernels import sampler
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.random_numbers import draw_words, gumbel_noise
from batchllm.executor.sampler import choose_tokens

VOCABULARY = 120
SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.7)
    for top_k in (0, 1, 7, 500)
    for top_p in (0.05, 0.7, 1.0)
    for min_p in (0.0, 0.03)
]


def random_logits(rows: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows)) * 3


def keys_of(rows: int) -> NDArray[np.uint64]:
    return np.random.default_rng(3).integers(0, 2**64, (rows, 2), dtype=np.uint64)


def noise_of(keys: NDArray[np.uint64]) -> Tensor:
    """The CPU path's noise of rows at index i % 11."""
    words = torch.from_numpy(draw_words(keys, np.arange(len(keys)) % 11))
    return gumbel_noise(words, torch.arange(VOCABULARY, dtype=torch.int32))


def columns(params: Sequence[SamplingParams], device: torch.device) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p of the rows as the kernel takes them."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, name) for row in params], dtype=dtype, device=device)

    return (
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float64),
        column("min_p", torch.float64),
    )


def sample(logits: Tensor, params: Sequence[SamplingParams], keys: NDArray[np.uint64]) -> list[int]:
    """The kernel's tokens; row i is at index i % 11 of its output."""
    indices = torch.arange(len(params)) % 11
    bits = torch.from_numpy(keys.view(np.int64)).to(logits.device)
    tokens: list[int] = sampler.sample_tokens(
        logits, *columns(params, logits.device), bits, indices.to(logits.device)
    ).tolist()
    return tokens


def on_cpu(logits: Tensor, params: Sequence[SamplingParams], keys: NDArray[np.uint64]) -> list[int]:
    """The CPU sampler's tokens, each row on its own."""
    return [
        int(
            choose_tokens(logits[row : row + 1].cpu(), [chosen], keys[row : row + 1], np.array([row % 11]))[0]
        )
        for row, chosen in enumerate(params)
    ]


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, and rows that are narrowed in several tries or not at all."""
    monkeypatch.setattr(sampler, "_BLOCK", 64)
    monkeypatch.setattr(sampler, "_CANDIDATES", 32)


def test_noise_decides_between_equal_logits(device: torch.device) -> None:
    """So the kernel's noise is the CPU path's."""
    keys, flat = keys_of(64), torch.zeros(64, VOCABULARY, device=device)
    keys[0], keys[1] = 0, 2**64 - 1
    expected = noise_of(keys).argmax(dim=-1).tolist()
    assert sample(flat, [SamplingParams(temperature=1.0)] * 64, keys) == expected
    assert len(set(expected)) > 30


def test_same_tokens_as_the_cpu_sampler(device: torch.device) -> None:
    logits, keys = random_logits(len(SETTINGS)).to(device), keys_of(len(SETTINGS))
    assert sample(logits, SETTINGS, keys) == on_cpu(logits, SETTINGS, keys)


@pytest.mark.usefixtures("few_candidates")
def test_narrowed_rows_choose_the_same(device: torch.device) -> None:
    some = SETTINGS[::3]
    logits, keys = random_logits(len(some)).to(device), keys_of(len(some))
    assert sample(logits, some, keys) == on_cpu(logits, some, keys)


@pytest.mark.usefixtures("few_candidates")
def test_limits_keep_the_same_tokens(device: torch.device) -> None:
    some = [
        SamplingParams(temperature=1.7, top_k=2),
        SamplingParams(temperature=1.7, top_k=29),
        SamplingParams(temperature=1.0, top_k=31),
        SamplingParams(temperature=3.0, top_k=50),
        SamplingParams(temperature=1.7, top_k=9, top_p=0.8),
        SamplingParams(temperature=1.7, top_p=0.6),
        SamplingParams(temperature=3.0, top_p=0.97),
        SamplingParams(temperature=1.7, min_p=0.1),
    ]
    logits = random_logits(len(some)).to(device)
    assert sample(logits, some, keys_of(len(some))) == on_cpu(logits, some, keys_of(len(some)))


@pytest.mark.usefixtures("few_candidates")
def test_equal_logits_are_kept_and_drawn_in_order_of_tokens(device: torch.device) -> None:
    # A few distinct values only: every limit falls among equal logits.
    logits = random_logits(10).div(3).round().to(device)
    some = [SETTINGS[(7 * row) % len(SETTINGS)] for row in range(10)]
    assert sample(logits, some, keys_of(10)) == on_cpu(logits, some, keys_of(10))
    flat = torch.zeros(3, VOCABULARY, device=device)
    kept = sample(flat, [SamplingParams(temperature=1.0, top_k=4)] * 3, keys_of(3))
    assert set(kept) <= {0, 1, 2, 3} and len(set(kept)) > 1
    kept = sample(flat, [SamplingParams(temperature=1.0, top_p=2.5 / VOCABULARY)] * 3, keys_of(3))
    assert set(kept) <= {0, 1, 2} and len(set(kept)) > 1


def test_reference_chooses_as_the_cpu_sampler(device: torch.device) -> None:
    logits, keys = random_logits(len(SETTINGS)).to(device), keys_of(len(SETTINGS))
    noise = noise_of(keys).to(device)
    chosen = sampler.sample_tokens_reference(logits, *columns(SETTINGS, device), noise)
    assert chosen.tolist() == on_cpu(logits, SETTINGS, keys)


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    params = [SamplingParams(), *SETTINGS[4::6], SamplingParams(temperature=0.8)]
    rows = len(params)
    logits, keys = random_logits(rows).to(device), keys_of(rows)
    together = sample(logits, params, keys)
    for row in (0, 1, 7, rows - 1):
        bits = torch.from_numpy(keys[row : row + 1].view(np.int64)).to(device)
        index = torch.tensor([row % 11], device=device)
        alone = sampler.sample_tokens(
            logits[row : row + 1], *columns(params[row : row + 1], device), bits, index
        )
        assert alone.item() == together[row]


@pytest.mark.usefixtures("few_candidates")
def test_greedy_takes_the_first_of_equal_logits(device: torch.device) -> None:
    logits = torch.zeros(4, VOCABULARY, device=device)
    logits[1, [110, 67, 90]] = 2.5
    logits[2, -1] = 1.0
    logits[3] = -5.0
    logits[3, 70:] = -4.0
    assert sample(logits, [SamplingParams()] * 4, keys_of(4)) == [0, 67, VOCABULARY - 1, 70]


def test_extreme_rows(device: torch.device) -> None:
    """Cold and hot temperatures, masked tokens, half precision and strided rows."""
    logits = random_logits(3).to(device)
    keys, greedy = keys_of(3), logits.argmax(-1).tolist()
    for params in (
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1e-6, top_k=100, top_p=0.99),
        SamplingParams(temperature=1e-300, top_p=0.5),
    ):
        assert sample(logits, [params] * 3, keys) == greedy, params
    hot = [SamplingParams(temperature=1e6, top_k=50)] + [SamplingParams(temperature=1e6)] * 2
    assert sample(logits, hot, keys) == on_cpu(logits, hot, keys)
    masked = torch.full_like(logits, float("-inf"))
    masked[:, 100:103] = logits[:, 100:103]
    some = [SamplingParams(temperature=2.0, top_p=0.9, top_k=5)] + [SamplingParams(temperature=2.0)] * 2
    assert sample(masked, some, keys) == on_cpu(masked, some, keys)
    half = torch.cat([logits, logits], dim=1).half()[:, 5 : 5 + VOCABULARY]
    assert sample(half, some, keys) == on_cpu(half.float(), some, keys)
    assert sample(logits[:0], [], keys[:0]) == []
