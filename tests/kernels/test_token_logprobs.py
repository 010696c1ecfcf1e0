"""Log-probabilities of given tokens, from logits and from hidden states, against float64."""

from __future__ import annotations

import pytest
import torch
from batchllm_kernels import token_logprobs as module
from batchllm_kernels.token_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_reference,
    token_logprobs,
    token_logprobs_reference,
)
from torch import Tensor


def randn(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(device)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction with little work for the interpreter."""
    for name, size in {"_BLOCK": 64, "_TILE_TOKENS": 16, "_TILE_VOCABULARY": 32, "_TILE_WIDTH": 16}.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "_PROGRAMS", 6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_logits(device: torch.device, dtype: torch.dtype) -> None:
    logits = randn(5, 300, device=device, scale=6)[:, :291]
    logits[1, :100] = float("-inf")  # whole blocks without a token
    logits[2] += 1e4
    tokens = torch.tensor([0, 290, 64, 63, 5], dtype=dtype, device=device)
    expected = token_logprobs_reference(logits.double(), tokens)
    torch.testing.assert_close(token_logprobs(logits, tokens).double(), expected, atol=2e-6, rtol=2e-6)
    logits[3, 63] = float("-inf")
    assert token_logprobs(logits, tokens)[3] == float("-inf")
    assert token_logprobs(logits[:0], tokens[:0]).shape == (0,)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 30.0), (2.0, 5.0)])
@pytest.mark.parametrize("rows", [1, 37])
def test_from_hidden_states(device: torch.device, rows: int, scale: float, softcap: float | None) -> None:
    joined, weight = randn(rows, 60, device=device), randn(291, 40, device=device)
    hidden = joined[:, 10:50]  # a width that fills no tile, strided rows
    tokens = (torch.arange(rows, device=device) * 41 + 290) % 291
    options = {"scale": scale, "softcap": softcap}
    expected = linear_token_logprobs_reference(hidden.double(), weight.double(), tokens, **options)
    result = linear_token_logprobs(hidden, weight, tokens, **options)
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("programs", [1, 2, 100])
def test_any_division_of_the_vocabulary(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    hidden, weight = randn(3, 32, device=device), randn(10 * 32 + 1, 32, device=device)
    tokens = torch.tensor([320, 0, 31], device=device)
    expected = linear_token_logprobs_reference(hidden.double(), weight.double(), tokens)
    torch.testing.assert_close(
        linear_token_logprobs(hidden, weight, tokens).double(), expected, atol=2e-5, rtol=1e-5
    )


@pytest.mark.usefixtures("small_tiles")
def test_half_precision_sums_in_float32(device: torch.device) -> None:
    hidden, weight = randn(4, 64, device=device).half(), randn(50, 64, device=device).half()
    tokens = torch.arange(4, device=device)
    expected = linear_token_logprobs_reference(hidden.double(), weight.double(), tokens)
    torch.testing.assert_close(
        linear_token_logprobs(hidden, weight, tokens).double(), expected, atol=1e-5, rtol=1e-5
    )
    assert linear_token_logprobs(hidden[:0], weight, tokens[:0]).shape == (0,)
