"""Attention over random trees against dense attention in float64, and the plan of reads as a property."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from batchllm.executor import attention_bands, attention_own, attention_pieces
from batchllm.executor.attention_bands import BAND_SCORES, PieceSize, cut_into_bands
from batchllm.executor.attention_cpu import CpuStepAttention
from batchllm.executor.attention_plan import plan_reads
from batchllm.executor.attention_reads import Band, NodeRead, OwnRead, StepReads
from batchllm.executor.forward_context import StepAttention
from batchllm.executor.kv_buffers import KvBuffers, LayerKv
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.step import StepBatch
from tests.executor.step_worlds import TreeNode, World, dense_attention, make_world, step_over

MakeAttention = Callable[[KvPool, StepBatch], StepAttention]

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
PATHS = {
    "short": {},
    "long": {"_SHORT": 3, "_FEW": 1, "_LONG_TILE_ROWS": 4},
    "mixed": {"_SHORT": 8, "_FEW": 3, "_TILE_ROWS": 10},
    "many bands": {"_FEW": 2, "_TILE_ROWS": 5, "_CHEAP_SCORES": 30, "BAND_SCORES": 400},
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in PATHS[request.param].items():
        module = next(m for m in (attention_own, attention_pieces, attention_bands) if hasattr(m, name))
        monkeypatch.setattr(module, name, value)
    return str(request.param)


def largest_error(
    seed: int,
    feature: str,
    dtype: torch.dtype,
    make: MakeAttention = CpuStepAttention,
    dim: int = 8,
    longest: int = 14,
) -> float:
    """Of attention over a random tree of nodes up to `longest` tokens, against float64."""
    window, softcap, has_sinks, value_dim, group = FEATURES[feature]
    value_dim += dim - 8
    kv_heads = 2
    world = make_world(np.random.default_rng(seed), LayerKv(kv_heads, dim, value_dim), dtype, longest)
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
    attention = make(world.pool, world.batch)
    scale = 0.6 * (8 / dim) ** 0.5
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    ours = attention.attend(0, query, key, value, **options)
    assert ours.dtype == dtype
    assert ours.shape == (tokens, kv_heads * group, value_dim)
    # Keys and values are where the step says: slot by slot, what came in.
    stored = world.pool.keys[0][torch.from_numpy(world.batch.slots), :, :dim]
    assert torch.equal(stored, key.transpose(0, 1))
    expected = dense_attention(world, query, window, scale, softcap, sinks, value_dim)
    return float((ours.double() - expected).abs().max())


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_dense_attention(feature: str, path: str) -> None:
    for seed in range(4):
        assert largest_error(seed, feature, torch.float32) < 2e-5, seed


@pytest.mark.parametrize("feature", ["grouped heads", "window", "soft cap", "sinks"])
def test_bfloat16_is_as_exact_as_its_rounding(feature: str, path: str) -> None:
    assert largest_error(11, feature, torch.bfloat16) < 0.05


def reads_of(reads: StepReads, tokens: int) -> list[Counter[int]]:
    """Slots that each flat token reads, with how often, masked ones left out. Checks that every cell of every band is
    written by exactly one read, or filled."""
    seen: list[Counter[int]] = [Counter() for _ in range(tokens)]
    flat = range(tokens) if reads.order is None else reads.order.tolist()
    for band in reads.bands:
        cells = np.zeros((band.last - band.first, band.width), dtype=int)
        for read, column, width, slots, mask in reads_in(band):
            shown = torch.ones(read.last - read.first, width, dtype=torch.bool)
            if mask is not None:
                shown[:, width - mask.shape[-1] :] = mask[:, 0] == 0
            for index, row in enumerate(range(read.first, read.last)):
                cells[row - band.first, column : column + width] += 1
                seen[flat[row]].update(slots[index][shown[index]].tolist())
        for fill in band.fills:
            cells[fill.first - band.first : fill.last - band.first, fill.columns] += 1
        assert (cells == 1).all()
    return seen


def reads_in(band: Band) -> Iterator[tuple[OwnRead | NodeRead, int, int, torch.Tensor, torch.Tensor | None]]:
    """Each read with its first column, its width, the slots [rows, width] and its mask."""
    for node in band.nodes:
        slots = (node.offset + torch.arange(node.length)).expand(node.last - node.first, -1)
        yield node, node.column, node.length, slots, node.mask
    for tile in band.tiles:
        slots = tile.offset + torch.arange(tile.width) if tile.slots is None else tile.slots
        yield tile, 0, tile.width, slots.expand(tile.last - tile.first, -1), tile.mask
    for run in band.runs:
        first = run.offset + run.stride * torch.arange(run.last - run.first).unsqueeze(1)
        yield run, 0, run.width, first + torch.arange(run.width) if run.slots is None else run.slots, run.mask


@pytest.mark.parametrize("window", [None, 1, 2, 5, 13, 40])
def test_every_visible_position_is_read_exactly_once(window: int | None, path: str) -> None:
    for seed in range(12):
        world: World = make_world(np.random.default_rng(seed), LayerKv(1, 4, 4), torch.float32)
        plan = plan_reads(world.batch.chunks, world.batch.shared_reads, window, torch.float32, 1)
        for token, slots in enumerate(reads_of(plan, len(world.batch.tokens))):
            assert slots == Counter(world.visible(token, window)), (seed, token)


def test_every_row_has_exactly_one_own_read(path: str) -> None:
    """What is written first must be written once; node reads are added to it."""
    world = make_world(np.random.default_rng(5), LayerKv(1, 4, 4), torch.float32)
    bands = plan_reads(world.batch.chunks, world.batch.shared_reads, None, torch.float32, 1).bands
    own = [read for band in bands for read in (*band.runs, *band.tiles)]
    rows = [row for read in own for row in range(read.first, read.last)]
    assert sorted(rows) == list(range(len(world.batch.tokens)))


def test_tokens_below_a_shared_node_read_it_together() -> None:
    """At most one product for decode tokens and one for prompts, where one band holds all."""
    world = make_world(np.random.default_rng(3), LayerKv(1, 4, 4), torch.float32, num_nodes=30)
    shared = {id(above) for node, _ in world.readers for above in node.ancestors}
    bands = plan_reads(world.batch.chunks, world.batch.shared_reads, None, torch.float32, 1).bands
    assert len(bands) == 1
    assert len(shared) <= len(bands[0].nodes) <= 2 * len(shared)


def test_bands_are_cut_where_lengths_differ() -> None:
    alike, other = PieceSize(1, 10, 1000), PieceSize(1, 10, 40_000)
    assert cut_into_bands([alike] * 3 + [other] * 2 + [alike], query_heads=16) == [(0, 3), (3, 5), (5, 6)]


def test_bands_stay_small_enough_for_a_cache() -> None:
    pieces = [PieceSize(16, 64, 1000)] * 100
    bands = cut_into_bands(pieces, query_heads=16)
    assert [first for first, _ in bands[1:]] == [last for _, last in bands[:-1]]
    assert all((last - first) * 16 * 1064 * 16 <= BAND_SCORES for first, last in bands)
    assert len(bands) < 100


def run_beside_nan(world: World, broken: set[int], make: MakeAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2, 8] of attention and of the oracle, over random keys and values: NaN for the broken nodes' tokens, and in
    slots that nobody wrote."""
    pool, dtype = world.pool, world.pool.dtype
    generator = torch.Generator().manual_seed(0)
    written = torch.zeros(pool.capacity, dtype=torch.bool)
    for node in world.nodes:
        written[node.extent.offset : node.extent.offset + node.computed] = True
    for buffer in (pool.keys[0], pool.values[0]):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
        buffer[~written] = torch.nan
    query, key, value = (
        torch.randn(2, len(world.readers), 8, generator=generator).to(dtype) for _ in range(3)
    )
    for token, (node, _) in enumerate(world.readers):
        if node.number in broken:
            key[:, token] = value[:, token] = torch.nan
    ours = make(pool, world.batch).attend(
        0, query, key, value, scale=0.4, window=None, softcap=None, sinks=None
    )
    return ours, dense_attention(world, query, None, 0.4, None, None, 8)


def neighbours(lengths: list[int], capacity: int, computed: list[int], dtype: torch.dtype) -> World:
    """Sequences of their own in extents of equal size, side by side."""
    pool = KvPool(KvBuffers.empty((LayerKv(2, 8, 8),), capacity * len(lengths), dtype))
    nodes = []
    for number, (length, done) in enumerate(zip(lengths, computed)):
        extent = pool.allocate(capacity)
        assert extent is not None
        nodes.append(TreeNode(number, 0, length, extent, computed=done))
    return step_over(pool, nodes)


def assert_nothing_spreads(make: MakeAttention, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    decoding = neighbours([*range(1, 9)], 8, [*range(8)], dtype)
    ours, expected = run_beside_nan(decoding, set(), make)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance)
    prompts = neighbours([5, 4, 6], 6, [0, 0, 0], dtype)
    ours, expected = run_beside_nan(prompts, {1}, make)
    healthy = torch.tensor([node.number != 1 for node, _ in prompts.readers])
    torch.testing.assert_close(ours[healthy].double(), expected[healthy], rtol=0, atol=tolerance)
    assert ours[~healthy].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_no_number_stays_with_its_sequence(dtype: torch.dtype) -> None:
    """Neither neighbours nor those who come into its memory later get any of it."""
    assert_nothing_spreads(CpuStepAttention, dtype)
