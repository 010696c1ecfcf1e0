"""SiLU and GELU products of gated MLPs: against float64, and in float16 against torch's separate operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batchllm_kernels.gated_activation import (
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_reference,
    silu_and_mul,
    silu_and_mul_reference,
)
from torch import Tensor

# exp overflows to infinity where the activation is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

Activation = Callable[..., Tensor]
PAIRS = [(silu_and_mul, silu_and_mul_reference), (gelu_tanh_and_mul, gelu_tanh_and_mul_reference)]


def random_rows(rows: int, width: int, device: torch.device) -> Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 4).to(device)


@pytest.mark.parametrize(("activation", "reference"), PAIRS)
@pytest.mark.parametrize("width", [48, 1024, 1300])
def test_agrees_with_float64(
    device: torch.device, activation: Activation, reference: Activation, width: int
) -> None:
    gate_up = random_rows(3, 2 * width, device)
    gate_up[0, :4] = torch.tensor([0.0, -90.0, 90.0, 1e-6])  # far ends neither overflow nor lose the sign
    expected = reference(gate_up.double())
    torch.testing.assert_close(activation(gate_up).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("activation", "reference"), PAIRS)
def test_rounds_the_activation_before_the_product(
    device: torch.device, activation: Activation, reference: Activation
) -> None:
    # Not far below zero, where torch's 1 + tanh loses digits.
    gate_up = random_rows(20, 512, device).clamp_min(-1.5).half()
    assert (activation(gate_up) != reference(gate_up)).float().mean() < 2e-3
    gate, up = gate_up.float().chunk(2, dim=-1)
    unrounded = reference(torch.cat([gate, up], dim=-1)).half()
    assert (activation(gate_up) != unrounded).float().mean() > 0.1


def test_strided_rows_and_no_rows(device: torch.device) -> None:
    joined = random_rows(4, 160, device)
    torch.testing.assert_close(silu_and_mul(joined[:, 32:96]), silu_and_mul_reference(joined[:, 32:96]))
    expected = silu_and_mul_reference(joined[:, :64])
    assert silu_and_mul(joined[:, :64], out=joined[:, 128:]).data_ptr() == joined[:, 128:].data_ptr()
    torch.testing.assert_close(joined[:, 128:], expected)
    assert silu_and_mul(joined[:0]).shape == (0, 80)
