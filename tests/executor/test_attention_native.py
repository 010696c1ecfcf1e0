"""The C kernel against dense attention in float64 over random trees, its plan as a property, and life without it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from batchllm_kernels.cpu import build

from batchllm.executor import attention_tiles
from batchllm.executor import native as native_module
from batchllm.executor.attention_cpu import CpuStepAttention
from batchllm.executor.attention_native import NativeStepAttention, kernels_for
from batchllm.executor.attention_tiles import plan_tiles
from batchllm.executor.backend import CpuBackend
from batchllm.executor.kv_buffers import LayerKv
from batchllm.executor.kv_pool import Extent, KvPool
from batchllm.executor.step import Chunk, SharedRead, StepBatch
from tests.executor.step_worlds import World, make_world
from tests.executor.test_attention import FEATURES, assert_nothing_spreads, largest_error
from tests.native import needs_kernels


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of these tests are compiled into a folder of their own."""
    made = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_module, "user_cache_folder", lambda: made)
        yield made


def native(pool: KvPool, batch: StepBatch) -> NativeStepAttention:
    kernels = kernels_for(pool.layers, pool.dtype)
    assert kernels is not None
    return NativeStepAttention(kernels, pool, batch)


@needs_kernels
@pytest.mark.parametrize("queries", [1, 5, 128])
@pytest.mark.parametrize("feature", FEATURES)
def test_is_as_exact_as_bfloat16(feature: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "_QUERIES", queries)
    for seed in range(4):
        assert largest_error(seed, feature, torch.bfloat16, native) < 0.02, seed


@needs_kernels
@pytest.mark.parametrize(
    "feature", ["grouped heads", "window", "soft cap", "sinks in a window", "narrow values"]
)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_stretches_of_many_blocks_and_all_head_dims(dim: int, feature: str) -> None:
    """Stretches up to 600 tokens: several blocks of keys, the last one not full."""
    assert largest_error(dim, feature, torch.bfloat16, native, dim, longest=600) < 0.02


@needs_kernels
def test_what_is_no_number_stays_with_its_sequence() -> None:
    assert_nothing_spreads(native, torch.bfloat16)


@pytest.mark.parametrize("queries", [1, 3, 16, 1000])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("threads", [1, 8])
def test_every_visible_position_is_in_one_segment(
    queries: int, group: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_tiles, "_QUERIES", queries)
    for seed in range(12):
        world: World = make_world(np.random.default_rng(seed), LayerKv(1, 4, 4), torch.float32)
        reads = plan_tiles(world.batch.chunks, world.batch.shared_reads, group, threads)
        assert sorted(reads.token) == list(range(len(world.batch.tokens)))
        assert max(np.diff(reads.tile_first)) <= max(1, queries // group)
        seen: dict[int, Counter[int]] = {token: Counter() for token in range(len(reads.token))}
        for tile, (first, last) in enumerate(zip(reads.tile_first, reads.tile_first[1:])):
            for segment in reads.segments[reads.segment_ptr[tile] : reads.segment_ptr[tile + 1]].tolist():
                assert first <= segment[0] < segment[1] <= last
                for row in range(segment[0], segment[1]):
                    shown = min(segment[4], int(reads.position[row]) + 1 - segment[3])
                    seen[int(reads.token[row])].update(range(segment[2], segment[2] + shown))
        for token, slots in seen.items():
            assert slots == Counter(world.visible(token, None)), (seed, token)


def test_tiles_with_most_work_come_first() -> None:
    """Threads take tiles in turn: a large one at the end would keep all others waiting."""
    world = make_world(np.random.default_rng(1), LayerKv(1, 4, 4), torch.float32, longest=60, num_nodes=40)
    reads = plan_tiles(world.batch.chunks, world.batch.shared_reads, 16, 2)
    work = np.add.reduceat(
        (reads.segments[:, 1] - reads.segments[:, 0]) * reads.segments[:, 4], reads.segment_ptr[:-1]
    )
    assert len(work) > 10 and (np.diff(work) <= 0).all()


def test_rows_that_share_little_make_small_tiles_and_sharing_ones_large_tiles() -> None:
    def widest(shared: int, own: int) -> int:
        extents = [Extent(shared + row * own, own) for row in range(64)]
        chunks = [Chunk(row, 1, shared + own - 1, shared, extents[row]) for row in range(64)]
        read = SharedRead(Extent(0, shared), 0, shared, chunks)
        return int(np.diff(plan_tiles(chunks, [read], 4, 2).tile_first).max())

    assert widest(shared=4000, own=8) == 64  # 256 queries
    assert widest(shared=16, own=100) == 8  # four tiles for each of two threads


def test_scattered_tokens_of_a_node_read_it_once() -> None:
    """Tokens computed between stored ones are chunks of their own, and see one stretch up to their positions."""
    node, other = Extent(100, 50), Extent(200, 50)
    places = [(node, 3), (node, 7), (other, 9), (node, 30), (other, 12)]
    chunks = [Chunk(first, 1, place, 0, extent) for first, (extent, place) in enumerate(places)]
    reads = plan_tiles(chunks, [], 16, 1)
    found = {(low, high): (slot, length) for low, high, slot, _, length in reads.segments.tolist()}
    assert sorted(found.values()) == [(100, 31), (200, 13)]
    assert sorted(high - low for low, high in found) == [2, 3]
    for (low, high), (slot, _) in found.items():
        tokens = reads.token[low:high].tolist()
        assert tokens == [token for token, (extent, _) in enumerate(places) if extent.offset == slot]


def test_a_step_without_logits_has_no_tiles() -> None:
    reads = plan_tiles([], [], 4, 2)
    assert len(reads.tile_first) == 1 and reads.segments.shape == (0, 5)


@needs_kernels
def test_is_what_the_backend_takes_in_bfloat16_and_only_there(folder: Path) -> None:
    for dtype, expected in ((torch.bfloat16, NativeStepAttention), (torch.float32, CpuStepAttention)):
        world = make_world(np.random.default_rng(0), LayerKv(1, 4, 4), dtype)
        assert type(CpuBackend().attention(world.pool, world.batch)) is expected
        assert type(CpuBackend(native=False).attention(world.pool, world.batch)) is CpuStepAttention
    assert len(list((folder / "kernels").glob("*.so"))) == 1, "compiled once"


@pytest.mark.parametrize("lack", ["instructions", "compiler", "a compiler that works"])
def test_without_kernels_torch_does_the_work(
    lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_module, "user_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "cpu_has_bfloat16_products", lambda: lack != "instructions")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'attention.c: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken) if lack.startswith("a ") else None)
    assert lack.split()[-1] in str(build.library(tmp_path / "kernels")) or "no such instruction" in str(
        build.library(tmp_path / "kernels")
    )
    world = make_world(np.random.default_rng(0), LayerKv(1, 4, 4), torch.bfloat16)
    assert type(CpuBackend().attention(world.pool, world.batch)) is CpuStepAttention
    assert not list(tmp_path.glob("**/*.so"))
