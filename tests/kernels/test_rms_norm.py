"""RMSNorm with and without a residual: against float64, and bit for bit against transformers' modules in float16."""

from __future__ import annotations

import pytest
import torch
from batchllm_kernels.rms_norm import rms_norm, rms_norm_reference
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

EPSILON = 1e-5


def random_rows(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(rows, width, generator=generator) * 3).to(dtype).to(device)


@pytest.mark.parametrize("width", [64, 100, 1536])
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_agrees_with_float64(device: torch.device, width: int, one_plus: bool, with_residual: bool) -> None:
    states, weight = random_rows(5, width, device), random_rows(1, width, device)[0]
    residual = random_rows(5, width, device).flip(0) if with_residual else None
    expected, total = rms_norm_reference(
        states.double(),
        weight.double(),
        EPSILON,
        residual=residual.double() if residual is not None else None,
        one_plus=one_plus,
    )
    result = rms_norm(states, weight, EPSILON, residual=residual, one_plus=one_plus)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    if residual is not None and total is not None:
        torch.testing.assert_close(residual.double(), total, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma3RMSNorm])
def test_rounds_where_transformers_rounds(device: torch.device, module: type) -> None:
    width = 256
    norm = module(width, eps=EPSILON).to(torch.float16).to(device)
    norm.weight.data = random_rows(1, width, device, torch.float16)[0]
    states, residual = (
        random_rows(40, width, device, torch.float16),
        random_rows(40, width, device).half().flip(1),
    )
    total = residual + states
    result = rms_norm(
        states, norm.weight, EPSILON, residual=residual, one_plus=module is Gemma3RMSNorm, out=states
    )
    assert result is states
    assert torch.equal(residual, total)
    different = result != norm(total)  # the order of the sum of squares may move a result across a rounding
    assert different.float().mean() < 1e-3


def test_strided_rows_and_no_rows(device: torch.device) -> None:
    joined, weight = random_rows(6, 192, device), random_rows(1, 64, device)[0]
    states, residual, out = joined[:, :64], joined[:, 64:128], joined[:, 128:]
    expected, total = rms_norm_reference(states, weight, EPSILON, residual=residual)
    before = states.clone()
    rms_norm(states, weight, EPSILON, residual=residual, out=out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(residual, total)
    assert torch.equal(states, before)
    assert rms_norm(states[:0], weight, EPSILON).shape == (0, 64)
