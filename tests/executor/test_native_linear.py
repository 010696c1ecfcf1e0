"""The product kernel in C against float64, and what it does in the same pass against torch in bfloat16."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from batchllm_kernels.cpu.linear import (
    PANEL,
    gated_linear,
    linear,
    pack_gated_panels,
    pack_panels,
    unpack_gated_panels,
    unpack_panels,
)
from torch import Tensor, nn

from batchllm.executor.joined_linear import join_linears
from batchllm.executor.native import native_kernels
from batchllm.executor.native_linear import NativeLinear, add_product, can_be_native
from tests.native import needs_kernels

BF16 = torch.bfloat16
# Rows, inputs, outputs: less than one of everything, whole panels, one more and one less.
SHAPES = [(1, 2, 1), (5, 62, 17), (6, 64, 64), (7, 64, 65), (13, 128, 127), (200, 96, 192)]


@pytest.fixture
def kernels() -> ctypes.CDLL:
    found = native_kernels(BF16)
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def rounding(exact: Tensor, inputs: int) -> Tensor:
    """What bfloat16 may be off by: half a unit in the last place, and sums in float32."""
    return exact.abs() * 2**-8 + inputs**0.5 * 2e-6


@needs_kernels
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_product_is_the_exact_one_rounded(
    kernels: ctypes.CDLL, rows: int, inputs: int, outputs: int, biased: bool
) -> None:
    states, weight, bias = normal(rows, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    exact = states.double() @ weight.double().T + (bias.double() if biased else 0)
    found = linear(kernels, states, pack_panels(kernels, weight), outputs, bias if biased else None)
    assert ((found.double() - exact).abs() <= rounding(exact, inputs)).all()


@needs_kernels
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_sum_with_what_is_there_is_rounded_as_torch_rounds(
    kernels: ctypes.CDLL, rows: int, inputs: int, outputs: int
) -> None:
    states, weight, total = (
        normal(rows, inputs),
        normal(outputs, inputs, seed=1),
        normal(rows, outputs, seed=2),
    )
    packed = pack_panels(kernels, weight)
    expected = total + linear(kernels, states, packed, outputs)
    found = linear(kernels, states, packed, outputs, add_to=total)
    assert found is total and torch.equal(total, expected)


@needs_kernels
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_gated_product_is_silu_times_up(kernels: ctypes.CDLL, size: int) -> None:
    states, weight = normal(9, 64) * 4, normal(2 * size, 64, seed=1)
    states[0], weight[0] = 8, -4  # a gate far below zero
    gate, up = linear(kernels, states, pack_panels(kernels, weight), 2 * size).chunk(2, dim=1)
    found = gated_linear(kernels, states, pack_gated_panels(kernels, *weight.chunk(2)), size)
    torch.testing.assert_close(found, F.silu(gate) * up, rtol=0.009, atol=1e-6)
    assert (found != F.silu(gate) * up).float().mean() < 0.02


@needs_kernels
def test_a_row_does_not_depend_on_the_others_with_it(kernels: ctypes.CDLL) -> None:
    states, packed = normal(250, 128), pack_panels(kernels, normal(100, 128, seed=1))
    together = linear(kernels, states, packed, 100)
    for rows in (slice(0, 1), slice(3, 8), slice(100, 250)):
        assert torch.equal(linear(kernels, states[rows], packed, 100), together[rows])


@needs_kernels
def test_rows_may_lie_apart(kernels: ctypes.CDLL) -> None:
    wide, packed = normal(8, 3 * 64 + 1), pack_panels(kernels, normal(64, 64, seed=1))
    for states in (wide[:, 64:128], wide[::2, 1:65], wide.t()[:64].t()):
        assert torch.equal(
            linear(kernels, states, packed, 64), linear(kernels, states.contiguous(), packed, 64)
        )


@needs_kernels
@pytest.mark.parametrize("outputs", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("inputs", [2, 50])
def test_packed_weights_come_back(kernels: ctypes.CDLL, outputs: int, inputs: int) -> None:
    weight = normal(outputs, inputs)
    packed = pack_panels(kernels, weight)
    assert packed.shape[2] == PANEL and torch.equal(unpack_panels(packed, outputs), weight)
    both = normal(2 * outputs, inputs)
    assert torch.equal(unpack_gated_panels(pack_gated_panels(kernels, *both.chunk(2)), outputs), both)


@needs_kernels
@pytest.mark.parametrize(
    "outputs", [(64, 64, 64), (1, 2, 3), (96, 16, 16), (70, 1, 130), (33, 31), (200, 0, 5)]
)
@pytest.mark.parametrize("inputs", [2, 50])
def test_parts_are_packed_as_if_joined(kernels: ctypes.CDLL, outputs: tuple[int, ...], inputs: int) -> None:
    parts = [normal(count, inputs, seed=index) for index, count in enumerate(outputs)]
    packed = pack_panels(kernels, *parts)
    assert torch.equal(packed, pack_panels(kernels, torch.cat(parts)))
    assert torch.equal(unpack_panels(packed, sum(outputs)), torch.cat(parts))


@needs_kernels
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_gated_panels_are_32_rows_of_each(kernels: ctypes.CDLL, size: int) -> None:
    gate, up = normal(size, 6), normal(size, 6, seed=1)
    filled = [F.pad(part, (0, 0, 0, -size % 32)).view(-1, 32, 6) for part in (gate, up)]
    rows = torch.cat(filled, dim=1).view(-1, 6)
    assert torch.equal(pack_gated_panels(kernels, gate, up), pack_panels(kernels, rows))


@needs_kernels
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_of_several_is_the_joined_one(kernels: ctypes.CDLL, biased: bool) -> None:
    parts = [nn.Linear(50, size, biased, dtype=BF16).requires_grad_(False) for size in (70, 9, 9)]
    layer, states = NativeLinear(kernels, *parts), normal(7, 50)
    unpacked, output = layer.unpacked(), layer(states)
    joined = join_linears(*parts)
    assert torch.equal(output, NativeLinear(kernels, joined)(states))
    assert torch.equal(unpacked.weight, joined.weight)
    assert torch.equal(unpacked.bias, joined.bias) if biased else unpacked.bias is None


@needs_kernels
def test_layer_takes_states_of_any_shape_and_adds_in_place(kernels: ctypes.CDLL) -> None:
    plain = nn.Linear(64, 48, dtype=BF16).requires_grad_(False)
    layer = NativeLinear(kernels, plain)
    states, total = normal(2, 5, 64), normal(10, 48, seed=1)
    torch.testing.assert_close(layer(states), plain(states), rtol=0.02, atol=0.01)
    added = [add_product(each, states.view(10, 64), total.clone()) for each in (layer, plain)]
    torch.testing.assert_close(added[0], added[1], rtol=0.02, atol=0.02)


def test_pairs_need_an_even_number_of_inputs() -> None:
    assert can_be_native(nn.Linear(6, 5, dtype=BF16))
    assert not can_be_native(nn.Linear(5, 6, dtype=BF16)) and not can_be_native(nn.Linear(6, 5))
