"""Rotary positions, norm of heads and KV write: against float64 and transformers; other slots stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batchllm_kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TOKENS, QUERY_HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 7, 6, 2, 48, 32
PAGES, PAGE, POSITIONS = 5, 8, 50


class Step:
    """Random inputs of one call: views of one joined projection, pools of another layout than the default."""

    def __init__(self, device: torch.device, half: int = WIDTH // 2, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(half)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        sizes = [QUERY_HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH]
        query, key, value = randn(TOKENS, sum(sizes)).split(sizes, dim=-1)
        self.query = query.view(TOKENS, QUERY_HEADS, WIDTH)
        self.key = key.view(TOKENS, KV_HEADS, WIDTH)
        self.value = value.view(TOKENS, KV_HEADS, VALUE_WIDTH)
        angles = torch.rand(POSITIONS, half, generator=generator) * 6
        self.cos, self.sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
        self.positions = torch.randint(0, POSITIONS, (TOKENS,), generator=generator).to(device)
        self.norms = (randn(WIDTH), randn(WIDTH))
        # Token-major pages, so heads and slots have the opposite strides of the usual layout.
        self.key_pool = randn(PAGES, PAGE, KV_HEADS, WIDTH).transpose(1, 2)
        self.value_pool = randn(PAGES, PAGE, KV_HEADS, VALUE_WIDTH).transpose(1, 2)
        self.slots = torch.randperm(PAGES * PAGE, generator=generator)[:TOKENS].to(device)
        self.slots[2] = -1

    def tensors(self, **changed: Any) -> dict[str, Any]:
        names = ("query", "key", "value", "cos", "sin", "key_pool", "value_pool", "slots", "positions")
        return {name: getattr(self, name) for name in names} | changed


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, pools copied."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("half", [WIDTH // 2, 20, 8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [None, "plain", "one_plus"])
def test_agrees_with_float64(device: torch.device, half: int, interleaved: bool, norm: str | None) -> None:
    step = Step(device, half)
    arguments = step.tensors(interleaved=interleaved)
    if norm is not None:
        arguments |= {"query_norm": step.norms[0], "key_norm": step.norms[1], "one_plus": norm == "one_plus"}
    exact = widened(arguments)
    expected = rope_kv_write_reference(**exact)
    before = step.key_pool.clone()
    result = rope_kv_write(**arguments)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.key_pool.double(), exact["key_pool"], atol=1e-5, rtol=1e-5)
    assert torch.equal(step.value_pool.double(), exact["value_pool"])
    changed = (step.key_pool != before).any(-1).any(1).flatten().nonzero().flatten()
    assert changed.tolist() == sorted(step.slots[step.slots >= 0].tolist())


def test_agrees_with_transformers_rotation(device: torch.device) -> None:
    step = Step(device)
    cos, sin = (torch.cat([table, table], -1)[step.positions].unsqueeze(0) for table in (step.cos, step.sin))
    query, key = apply_rotary_pos_emb(
        step.query.transpose(0, 1).unsqueeze(0), step.key.transpose(0, 1).unsqueeze(0), cos, sin
    )
    # The rows of the step themselves, as transformers' rotary module gives them: strided, halves repeated.
    half = WIDTH // 2
    arguments = step.tensors(cos=cos[0, :, :half], sin=sin[0, :, :half], positions=None)
    result = rope_kv_write(**arguments)
    torch.testing.assert_close(result, query[0].transpose(0, 1), atol=1e-6, rtol=1e-5)
    kept = step.slots >= 0
    slots = step.slots[kept]
    written = step.key_pool[slots // PAGE, :, slots % PAGE]
    torch.testing.assert_close(written, key[0].transpose(0, 1)[kept], atol=1e-6, rtol=1e-5)


def test_half_precision_rounds_once_at_the_end(device: torch.device) -> None:
    step = Step(device, dtype=torch.float16)
    arguments = step.tensors(query_norm=step.norms[0], key_norm=step.norms[1])
    reference = {name: value.clone() if name.endswith("pool") else value for name, value in arguments.items()}
    expected = rope_kv_write_reference(**reference)
    different = (rope_kv_write(**arguments) != expected).float().mean()
    assert different < 2e-3
    assert (step.key_pool != reference["key_pool"]).float().mean() < 2e-3


@pytest.mark.parametrize("per_head", [False, True])
def test_pool_of_8_bit_floats(device: torch.device, per_head: bool) -> None:
    step = Step(device)
    pools = {
        name: getattr(step, name).to(torch.float8_e4m3fn).clone(memory_format=torch.contiguous_format)
        for name in ("key_pool", "value_pool")
    }
    reference = {name: pool.clone() for name, pool in pools.items()}
    scales = {
        "key_scale": torch.tensor(
            [0.02, 0.004] if per_head else [0.004], device=device
        ),  # 0.004: some saturate
        "value_scale": torch.tensor([0.01, 0.3] if per_head else [0.05], device=device),
    }
    rope_kv_write(**step.tensors(**pools, **scales))
    rope_kv_write_reference(**step.tensors(**reference, **scales))
    assert reference["key_pool"].float().abs().max() == 448.0
    for name, pool in pools.items():
        ours, theirs = pool.float(), reference[name].float()
        # The interpreter's conversion loses the carry into the exponent and what is below the normal numbers.
        comparable = (theirs.abs().frexp().mantissa != 0.5) & (theirs.abs() >= 2**-6)
        assert comparable.float().mean() > 0.7
        assert torch.equal(ours[comparable], theirs[comparable])


def test_an_empty_step(device: torch.device) -> None:
    step = Step(device)
    before = step.key_pool.clone()
    empty = {name: getattr(step, name)[:0] for name in ("query", "key", "value", "slots", "positions")}
    assert rope_kv_write(**step.tensors(**empty)).shape == (0, QUERY_HEADS, WIDTH)
    assert torch.equal(step.key_pool, before)
