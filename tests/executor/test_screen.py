"""The largest output found in 8-bit integers: always the one that all outputs have."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from batchllm_kernels.cpu.linear import linear, pack_panels
from batchllm_kernels.cpu.screen import can_screen, first_largest, pack_bytes
from torch import Tensor

from batchllm.executor.native import native_kernels
from tests.native import needs_kernels

pytestmark = needs_kernels
BF16 = torch.bfloat16
# Rows, inputs, outputs: less than one of everything, whole panels, one more and one less, inputs not by fours.
SHAPES = [(1, 2, 1), (5, 62, 17), (6, 64, 64), (7, 66, 65), (13, 128, 1027), (80, 96, 3000)]


@pytest.fixture
def kernels() -> ctypes.CDLL:
    found = native_kernels(BF16)
    assert found is not None
    if not can_screen(found):
        pytest.skip("needs a CPU with AVX-512 VNNI")
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def found(kernels: ctypes.CDLL, states: Tensor, weight: Tensor) -> Tensor:
    """Tokens; those that are found are checked."""
    packed = pack_panels(kernels, weight)
    weights = pack_bytes(kernels, packed)
    assert weights is not None
    tokens = first_largest(kernels, states, packed, weights, len(weight))
    logits = linear(kernels, states, packed, len(weight)).float()
    expected = torch.from_numpy(logits.numpy().argmax(axis=-1))
    assert torch.equal(tokens[tokens >= 0], expected[tokens >= 0])
    return tokens


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-15, 2.0**30])
def test_any_numbers(kernels: ctypes.CDLL, rows: int, inputs: int, outputs: int, scale: float) -> None:
    for seed in range(5):
        states, weight = normal(rows, inputs, seed=2 * seed), normal(outputs, inputs, seed=2 * seed + 1)
        assert (found(kernels, states * scale, weight) >= 0).all()
        assert (found(kernels, states, weight * scale) >= 0).all()
        found(kernels, states, weight * normal(outputs, 1, seed=99).exp())
        found(kernels, states * normal(1, inputs, seed=99).exp(), weight)


def test_of_equal_logits_the_first(kernels: ctypes.CDLL) -> None:
    """Rows that are the same, in other panels too, and logits that differ only before they are rounded."""
    states, few = normal(40, 128), normal(70, 128, seed=1)
    twice = few[torch.randint(0, 70, (400,), generator=torch.Generator().manual_seed(2))]
    assert (found(kernels, states, twice) >= 0).all()
    near = few[:1].repeat(300, 1)
    near[:, 0] += (torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2**-8).to(BF16)
    assert (found(kernels, states, near) >= 0).all()


def test_logits_that_round_to_the_largest(kernels: ctypes.CDLL) -> None:
    """Nothing but the last rounding: all numbers are integers as they are."""
    random = torch.Generator().manual_seed(0)
    states, weight = (torch.randint(-127, 128, (rows, 64), generator=random) for rows in (200, 500))
    states[:, 0] = weight[:, 1] = 127
    assert (found(kernels, states.to(BF16), weight.to(BF16)) >= 0).all()


def test_negative_logits_are_not_taken_for_those_that_fill_a_panel_up(kernels: ctypes.CDLL) -> None:
    states, weight = normal(9, 64).abs(), -normal(70, 64, seed=1).abs()
    assert (found(kernels, states, weight) >= 0).all()


def test_too_many_that_could_be_largest_are_left_undecided(kernels: ctypes.CDLL) -> None:
    same = normal(1, 64).repeat(2000, 1)
    assert (found(kernels, normal(5, 64, seed=1), same) == -1).all()
    states = normal(5, 1024, seed=2) * 0.01
    states[:, 7] = 50  # one integer for all the rest
    weight = normal(4000, 1024, seed=3)
    weight[:, 7] = 0
    assert (found(kernels, states, weight) == -1).all()


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, 1e-30])
def test_states_out_of_range_are_left_undecided(kernels: ctypes.CDLL, value: float, row: int) -> None:
    states, weight = normal(3, 64), normal(200, 64, seed=1)
    states[row] = 0
    states[row, 5] = value
    assert ((found(kernels, states, weight) == -1) == (torch.arange(3) == row)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
def test_states_out_of_range_whatever_memory_held_before() -> None:
    """Numbers of 3e38, for instance."""
    tunables = "glibc.malloc.perturb=128:glibc.malloc.tcache_count=0"
    chosen = ["-p", "no:cacheprovider", "-k", "out_of_range_are_left_undecided"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *chosen],
        env={**os.environ, "GLIBC_TUNABLES": tunables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_out_of_range_are_refused(kernels: ctypes.CDLL, value: float) -> None:
    weight = normal(200, 64)
    weight[130, 9] = value
    assert pack_bytes(kernels, pack_panels(kernels, weight)) is None


def test_rows_of_zeros_among_the_weights(kernels: ctypes.CDLL) -> None:
    weight = normal(200, 64)
    weight[::3] = 0
    assert (found(kernels, normal(20, 64, seed=1), weight) >= 0).all()
    assert (found(kernels, normal(20, 64, seed=1), torch.zeros(200, 64, dtype=BF16)) == 0).all()


def test_rows_may_lie_apart(kernels: ctypes.CDLL) -> None:
    wide, weight = normal(8, 3 * 64 + 1), normal(300, 64, seed=1)
    for states in (wide[:, 64:128], wide[::2, 1:65], wide.t()[:64].t()):
        assert torch.equal(found(kernels, states, weight), found(kernels, states.contiguous(), weight))


@pytest.mark.parametrize("inputs", [2, 62, 512])
def test_bounds_hold_in_float64(kernels: ctypes.CDLL, inputs: int) -> None:
    """|w.x - s t q.p| <= |e| |x| + |s q| |f|, with the integers and bounds that are packed."""
    weight = normal(130, inputs) * normal(130, 1, seed=1)
    packed = pack_panels(kernels, weight)
    weights = pack_bytes(kernels, packed)
    assert weights is not None
    panels, steps, _ = weights.bytes.shape
    integers = weights.bytes.view(torch.int8).view(panels, steps, 64, 4).permute(0, 2, 1, 3)
    integers = integers.reshape(panels * 64, 4 * steps)[:130, :inputs].double()
    scale, error, norm, shift = weights.about.transpose(0, 1).reshape(4, -1)[:, :130].clone()
    assert torch.equal(shift.view(torch.int32).double(), -128 * integers.sum(dim=1))
    known = scale.double().unsqueeze(1) * integers
    assert (error.double() >= (weight.double() - known).norm(dim=1)).all()
    assert (norm.double() >= known.norm(dim=1)).all()
    states = normal(50, inputs, seed=2)
    step = states.double().abs().amax(dim=1, keepdim=True) / 127
    near = (states.double() / step).round() * step
    bound = states.double().norm(dim=1, keepdim=True) * error.double()
    bound += (states.double() - near).norm(dim=1, keepdim=True) * norm.double()
    off = (states.double() @ weight.double().T - near @ known.T).abs()
    assert (off <= bound).all()
