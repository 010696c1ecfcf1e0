"""What the kernels and torch draw together is what torch draws alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor import sampler
from batchllm.executor.sampler import choose_tokens
from tests.native import needs_kernels, sample_with_torch

pytestmark = needs_kernels
LIMITS: list[dict[str, float]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.95, "min_p": 0.03},
    {"min_p": 0.05},
    {"top_k": 50},
    {"top_k": 20, "top_p": 0.8},
]
PARAMS = [
    SamplingParams(temperature=temperature, **limits)  # type: ignore[arg-type]
    for limits in LIMITS
    for temperature in (0.2, 1.0, 1.6)
]


def normal(rows: int, size: int) -> Tensor:
    """As a model in bfloat16 makes them, with many equal ones; some rows are peaked, some have hardly a choice."""
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).bfloat16().float() * 2
    logits[::2] *= 2
    logits[::5, 7:] = float("-inf")
    return logits


def drawn(logits: Tensor, params: list[SamplingParams]) -> np.ndarray:
    keys = np.random.default_rng(0).integers(0, 2**64, (len(params), 2), dtype=np.uint64)
    tokens: np.ndarray = choose_tokens(logits, params, keys, np.arange(len(params)))
    return tokens


def test_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    params = PARAMS * 60
    logits = normal(len(params), 2000)
    with_kernels = drawn(logits, params)
    sample_with_torch(monkeypatch)
    assert (drawn(logits, params) == with_kernels).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e38])
def test_any_temperature(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(temperature=temperature, top_p=top_p) for top_p in (0.3, 0.9, 1.0)] * 20
    logits = normal(len(params), 700)
    with_kernels = drawn(logits, params)
    sample_with_torch(monkeypatch)
    assert (drawn(logits, params) == with_kernels).all()


def test_few_rows_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr(sampler, "_draw_free", lambda *_: pytest.fail("a score led by more"))
    really = sampler._draw_limited
    monkeypatch.setattr(
        sampler, "_draw_limited", lambda logits, *rest: left.append(len(logits)) or really(logits, *rest)
    )
    logits = normal(500, 1000)
    drawn(logits, [SamplingParams(temperature=1.0)] * 500)
    drawn(logits, [SamplingParams(temperature=1.0, top_p=0.9)] * 500)
    assert 20 < sum(left) < 90


def test_some_rows_in_any_order() -> None:
    params = PARAMS + [SamplingParams()] * 4
    logits, keys = normal(len(params), 900), np.ones((len(params), 2), dtype=np.uint64)
    indices = np.arange(len(params))
    tokens = choose_tokens(logits, params, keys, indices)
    for rows in (list(range(len(params)))[::-1], [5, 1, 26, 24], [27, 25]):
        assert (choose_tokens(logits, params, keys, indices, rows) == tokens[rows]).all()
    greedy = choose_tokens(logits, [SamplingParams()] * len(params), keys, indices, indices[::-1].tolist())
    assert (greedy == logits.argmax(dim=-1).numpy()[::-1]).all()
