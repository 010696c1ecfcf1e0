"""Attention over random trees against dense attention in float64, and the plan of reads as a property."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from batchllm.executor import attention_plan
from batchllm.executor.attention_cpu import CpuStepAttention
from batchllm.executor.attention_plan import StepReads, plan_reads
from batchllm.executor.kv_pool import LayerKv
from tests.executor.step_worlds import World, dense_attention, make_world

# (window, softcap, sinks, value dim, query heads a KV head)
FEATURES = {
    "plain": (None, None, False, 8, 1),
    "grouped heads": (None, None, False, 8, 3),
    "window": (7, None, False, 8, 2),
    "window of one": (1, None, False, 8, 2),
    "soft cap": (None, 5.0, False, 8, 2),
    "soft cap in a window": (9, 5.0, False, 8, 2),
    "sinks": (None, None, True, 8, 2),
    "sinks in a window": (5, None, True, 8, 2),
    "narrow values": (None, None, False, 5, 1),
}
# How the plan groups reads depends on sizes: these limits send tiny worlds down every path.
PATHS = {"short": {}, "long": {"_SHORT": 3, "_FEW": 1}, "mixed": {"_SHORT": 8, "_FEW": 3}}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(attention_plan, name, value)
    return str(request.param)


def largest_error(seed: int, feature: str, dtype: torch.dtype) -> float:
    window, softcap, has_sinks, value_dim, group = FEATURES[feature]
    kv_heads, dim = 2, 8
    world = make_world(np.random.default_rng(seed), LayerKv(kv_heads, dim, value_dim), dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    world.pool.keys[0].copy_(normal(*world.pool.keys[0].shape))
    world.pool.values[0].copy_(normal(*world.pool.values[0].shape))
    world.pool.values[0][..., value_dim:] = 0
    tokens = len(world.batch.tokens)
    query = normal(kv_heads * group, tokens, dim)
    key, value = normal(kv_heads, tokens, dim), normal(kv_heads, tokens, value_dim)
    sinks = normal(kv_heads * group) if has_sinks else None
    attention = CpuStepAttention(world.pool, world.batch)
    options = {"scale": 0.6, "window": window, "softcap": softcap, "sinks": sinks}
    ours = attention.attend(0, query, key, value, **options)
    assert ours.dtype == dtype
    assert ours.shape == (tokens, kv_heads * group, value_dim)
    # Keys and values are where the step says: slot by slot, what came in.
    stored = world.pool.keys[0][torch.from_numpy(world.batch.slots), :, :dim]
    assert torch.equal(stored, key.transpose(0, 1))
    expected = dense_attention(world, query, window, 0.6, softcap, sinks, value_dim)
    return float((ours.double() - expected).abs().max())


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_dense_attention(feature: str, path: str) -> None:
    for seed in range(4):
        assert largest_error(seed, feature, torch.float32) < 2e-5, seed


@pytest.mark.parametrize("feature", ["grouped heads", "window", "soft cap", "sinks"])
def test_bfloat16_is_as_exact_as_its_rounding(feature: str, path: str) -> None:
    assert largest_error(11, feature, torch.bfloat16) < 0.05


def reads_of(reads: StepReads, tokens: int) -> list[Counter[int]]:
    """Slots that each flat token reads, with how often, masked ones left out."""
    seen: list[Counter[int]] = [Counter() for _ in range(tokens)]

    def add(row: int, slots: list[int], mask: torch.Tensor | None) -> None:
        shown = [True] * len(slots) if mask is None else (mask == 0).tolist()
        seen[row].update(slot for slot, is_shown in zip(slots, shown, strict=True) if is_shown)

    for run in reads.runs:
        for index, row in enumerate(run.rows.tolist()):
            first = run.offset + index * run.stride
            slots = (
                list(range(first, first + run.longest)) if run.slots is None else run.slots[index].tolist()
            )
            add(row, slots, None if run.mask is None else run.mask[index, 0, 0])
    for group in reads.padded:
        longest = group.rows.shape[1]
        for place in group.real.tolist():
            chunk, query = divmod(place, longest)
            add(int(group.rows[chunk, query]), group.slots[chunk].tolist(), group.mask[chunk, 0, query])
    for block in reads.causal:
        for index, row in enumerate(block.rows.tolist()):
            seen_to = (
                index + 1 if block.mask is None else block.length
            )  # no mask: the kernel's own causal one
            slots = list(range(block.offset, block.offset + seen_to))
            add(row, slots, None if block.mask is None else block.mask[0, 0, index])
    for block in (block for level in reads.levels for block in level.blocks):
        for index, row in enumerate(block.rows.tolist()):
            slots = list(range(block.offset, block.offset + block.length))
            add(row, slots, None if block.mask is None else block.mask[0, 0, index])
    return seen


@pytest.mark.parametrize("window", [None, 1, 2, 5, 13, 40])
def test_every_visible_position_is_read_exactly_once(window: int | None, path: str) -> None:
    for seed in range(12):
        world: World = make_world(np.random.default_rng(seed), LayerKv(1, 4, 4), torch.float32)
        seen = reads_of(
            plan_reads(world.batch.chunks, world.batch.shared_reads, window, torch.float32),
            len(world.batch.tokens),
        )
        for token, slots in enumerate(seen):
            assert slots == Counter(world.visible(token, window)), (seed, token)


def test_every_row_has_exactly_one_own_read(path: str) -> None:
    """What is written first must be written once; block reads are merged into it."""
    world = make_world(np.random.default_rng(5), LayerKv(1, 4, 4), torch.float32)
    reads = plan_reads(world.batch.chunks, world.batch.shared_reads, None, torch.float32)
    rows = [row for run in reads.runs for row in run.rows.tolist()]
    rows += [row for group in reads.padded for row in group.real_rows.tolist()]
    rows += [row for block in reads.causal for row in block.rows.tolist()]
    assert sorted(rows) == list(range(len(world.batch.tokens)))


def test_tokens_below_a_shared_node_read_it_in_one_call() -> None:
    world = make_world(np.random.default_rng(3), LayerKv(1, 4, 4), torch.float32, num_nodes=30)
    shared = {id(above) for node, _ in world.readers for above in node.ancestors}
    reads = plan_reads(world.batch.chunks, world.batch.shared_reads, None, torch.float32)
    assert sum(len(level.blocks) for level in reads.levels) == len(shared)
