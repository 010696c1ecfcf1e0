"""Tokens drawn by the kernel in C are those of torch, whatever the logits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from batchllm_kernels.cpu.draw import draw, stand
from torch import Tensor

from batchllm.executor.native import native_kernels
from batchllm.executor.random_numbers import draw_words, gumbel_noise
from batchllm.executor.sampler import _draw_free
from tests.native import needs_kernels

pytestmark = needs_kernels
NEVER = float("-inf")


def normal(rows: int, size: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * scale


def kernels() -> ctypes.CDLL:
    found = native_kernels(torch.bfloat16)
    assert found is not None
    return found


def some_words(rows: int) -> Tensor:
    keys = np.random.default_rng(rows).integers(0, 2**64, (rows, 2), dtype=np.uint64)
    return torch.from_numpy(draw_words(keys, np.arange(rows)))


def both(logits: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens of all rows by the kernel, -1 where it leaves them to torch, and by torch."""
    rows = torch.arange(len(logits))
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).expand(len(logits)).contiguous()
    words = some_words(len(logits))
    ours = draw(kernels(), logits, rows, temperatures, words)
    theirs = _draw_free(logits, rows, temperatures.unsqueeze(1), words)
    return ours, theirs


def assert_same(logits: Tensor, temperature: float | Tensor = 1.0, left: int = 1) -> None:
    ours, theirs = both(logits, temperature)
    decided = ours >= 0
    assert torch.equal(ours[decided], theirs[decided])
    assert (~decided).sum() <= left


def test_many_draws() -> None:
    temperature = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 2 + 0.01
    assert_same(normal(2000, 5000), temperature, left=4)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize("scale", [0.0, 0.3, 30.0])
def test_any_vocabulary(size: int, scale: float) -> None:
    assert_same(normal(100, size, scale))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.01, 100.0, 1e10, 1e37])
def test_any_temperature(temperature: float) -> None:
    assert_same(normal(100, 700), temperature)


@pytest.mark.parametrize("allowed", [1, 2, 40, 1000])
def test_tokens_ruled_out(allowed: int) -> None:
    logits = normal(100, 2001)
    order = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)).argsort(dim=-1)
    logits.scatter_(1, order[:, allowed:], NEVER)
    assert_same(logits)
    ours, _ = both(logits)
    assert not torch.isneginf(logits.gather(1, ours.clamp_min(0).unsqueeze(1))).any()


def test_rare_tokens_are_drawn_as_often() -> None:
    """A logit far below the largest, seldom chosen, is not ruled out too early."""
    logits = torch.full((3000, 640), -7.0)
    logits[:, 333] = 0.0
    ours, theirs = both(logits)
    assert 500 < (theirs != 333).sum() < 1800
    assert ((ours == theirs) | (ours < 0)).all()


@pytest.mark.parametrize(("lead", "token"), [(0.0, -1), (5e-5, -1), (-5e-5, -1), (3e-4, 123), (-3e-4, 210)])
def test_scores_too_close_are_left_to_torch(lead: float, token: int) -> None:
    noise = gumbel_noise(some_words(50), torch.arange(300, dtype=torch.int32))
    logits = 3.0 - noise  # all scores are 3, but for rounding
    logits[:, 123] += lead
    assert (both(logits)[0] == (token if token == 123 else -1)).all()
    others = torch.ones(300, dtype=torch.bool)
    others[[123, 210]] = False
    assert (both(logits.masked_fill(others, NEVER))[0] == token).all()


def test_numbers_that_are_none() -> None:
    logits = normal(6, 300)
    logits[0] = NEVER
    logits[1, 7] = float("nan")
    logits[2, 299] = float("inf")
    logits[3, [0, 299]] = float("nan")
    ours, _ = both(logits)
    assert ours[:4].tolist() == [-1] * 4 and (ours[4:] >= 0).all()
    assert (both(logits, 1e38)[0][4:] == -1).all()  # of which the reciprocal has lost digits


def test_rows_lie_anywhere() -> None:
    """A few rows in any order, out of a wider tensor, at temperatures and words of their own."""
    wide = normal(40, 500)
    rows = torch.tensor([39, 0, 7, 7])
    words, temperature = some_words(4), torch.tensor([0.5, 1.0, 2.0, 3.0])
    for logits in (wide[:, 50:383], wide[:1, 50:383].expand(40, -1)):
        expected = _draw_free(logits.clone(), rows, temperature.unsqueeze(1), words)
        assert torch.equal(draw(kernels(), logits, rows, temperature, words), expected)


@pytest.mark.parametrize("size", [1, 16, 65, 4000])
def test_where_a_token_stands(size: int) -> None:
    logits = normal(60, size).round()  # with ties
    logits[:, size // 2 + 1 :: 2] = NEVER
    tokens = torch.arange(60) % (size // 2 + 1)
    tokens[::7] = -1
    temperature = torch.rand(60, generator=torch.Generator().manual_seed(3)) + 0.5
    weights = stand(kernels(), logits, torch.arange(60), temperature, tokens)
    assert (weights[::7] == 0).all()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature.unsqueeze(1)
    for row in (tokens >= 0).nonzero().flatten().tolist():
        others = scaled[row] >= scaled[row, tokens[row]]
        others[tokens[row]] = False
        parts = [scaled[row, others], scaled[row, tokens[row]], scaled[row]]
        expected = torch.stack([part.exp().sum() for part in parts])
        torch.testing.assert_close(weights[row].double(), expected, rtol=1e-5, atol=0.0)


def test_tokens_only_just_below_stand_before() -> None:
    """Rounding of other ways to compute it could put them there."""
    logits = torch.tensor([[1.0, 2.0, 2.0 - 5e-5, 2.0 - 3e-4]])
    weights = stand(kernels(), logits, torch.tensor([0]), torch.tensor([1.0]), torch.tensor([1]))
    assert 0.999 < weights[0, 0] < 1.0
