"""Stored chunks in the engine's batch steps, against the reference that answers one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.chunk_precompute import Precompute
from batchllm.chunkcache.chunk_file import ChunkStatistics, EncodedLayer
from batchllm.chunkcache.codecs import CODEC_NAMES, codec_named
from batchllm.chunkcache.host_tier import HostTier
from batchllm.chunkcache.identity import chunk_context
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.loader import ChunkLoader, KvShapes, LoadEvent
from batchllm.chunkcache.lookup import ChunkLookup
from batchllm.chunkcache.node_chunks import NodeChunks
from batchllm.chunkcache.precompute import ChunkedPrompt, ComputedChunk, decode_layer, sensitivity
from batchllm.chunkcache.reuse import decode_greedy, prefill
from batchllm.chunkcache.rules import (
    FirstTokensRule,
    LargestDeviationRule,
    MostSensitiveRule,
    PlacedChunk,
    RepairRule,
)
from batchllm.chunkcache.store import ChunkStore
from batchllm.chunkcache.stored_chunks import StoredChunks
from batchllm.core import ChunkTable, PromptTable, SamplingParams
from batchllm.executor.engine import Engine, EngineOptions
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.stopping import StopRules
from batchllm.planner.plan import PlanOptions, build_plan
from batchllm.report.progress import Progress
from tests.executor.harness import prompt_table, request_table
from tests.executor.tiny_models import EOS, configurations, generate_alone, make_model

IDENTITY = b"tiny random model"[:16]
NEW = 6
NAMES = ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")
LEAD = [5, 6]


@dataclass(frozen=True)
class Rows:
    prompts: PromptTable
    chunks: ChunkTable
    lists: list[list[int]]

    def chunked(self, row: int) -> ChunkedPrompt:
        return ChunkedPrompt(np.array(self.lists[row], dtype=np.int32), tuple(self.chunks.of(row)))


def passage(number: int) -> list[int]:
    rng = np.random.default_rng(number)
    return [10 + number, *rng.integers(4, 97, 5 + number % 4).tolist()]


def make_rows(chosen: Sequence[Sequence[int]], question: int = 40) -> Rows:
    """Prompts of a lead, the passages of these numbers with a token between them, and a question of their own."""
    lists, ptr, places = [], [0], []
    for row, numbers in enumerate(chosen):
        tokens = list(LEAD)
        for number in numbers:
            own = passage(number)
            places.append((len(tokens), len(tokens) + len(own)))
            tokens += [*own, 4]
        lists.append([*tokens, question + row % 3, 50 + row, 7])
        ptr.append(len(places))
    both = np.array(places, dtype=np.int64).reshape(-1, 2)
    table = prompt_table(lists, SamplingParams(max_tokens=NEW))
    return Rows(table, ChunkTable(np.array(ptr), both[:, 0].copy(), both[:, 1].copy()), lists)


STORED = make_rows([[1, 2, 3], [4, 5, 6], [3, 1, 5]], question=60)
ASKED = make_rows([[2, 1], [2, 1, 3], [5, 4, 1], [6], [], [1, 2, 3], [7, 2], [2, 2, 4], [3, 6, 1, 2]])


@dataclass(frozen=True, eq=False)
class World:
    alone: Any
    model: ModelRunner
    rotation: KeyRotation
    store: Path


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    made = {}
    for name in NAMES:
        model = prepare_model(make_model(configurations()[name]))
        path = tmp_path_factory.mktemp("stores") / name
        fill(path, model, STORED)
        made[name] = World(make_model(configurations()[name]), model, find_rotation(model), path)
    return made


def fill(path: Path, model: ModelRunner, rows: Rows, variants: int = 2, contexts: int = 1) -> Any:
    with ChunkStore(path, IDENTITY, write=True, durable=False) as store:
        codec = codec_named("raw", model.dtype)
        work = Precompute(model, store, codec, rows.prompts, rows.chunks, variants, contexts)
        return work.run(Progress(quiet=True))


def lookup_of(world: World, rows: Rows, exact: bool = False) -> ChunkLookup:
    store = ChunkStore(world.store, IDENTITY)
    return ChunkLookup(store, rows.prompts, rows.chunks, exact_only=exact, codecs=frozenset(CODEC_NAMES))


def run_engine(
    world: World,
    rows: Rows,
    rule: RepairRule | None,
    *,
    lookup: ChunkLookup | None = None,
    share: float = 0.0,
    kv_tokens: int = 2000,
    max_step_tokens: int = 256,
    host_bytes: int = 1 << 20,
    ahead_bytes: int = 1 << 20,
    trace: list[LoadEvent] | None = None,
) -> tuple[list[list[int]], Any, StoredChunks]:
    """(output tokens of each row, engine statistics, what was placed)."""
    requests = request_table(len(rows.lists), 1)
    plan = build_plan(rows.prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions(4))
    nodes = NodeChunks(plan, lookup or lookup_of(world, rows), share)
    sequence, first = nodes.accesses()
    tier = HostTier(sequence, host_bytes)
    places = world.rotation.at(torch.arange(max(map(len, rows.lists))))
    shapes = KvShapes(world.model.layers, world.model.dtype)
    loader = ChunkLoader(nodes, tier, first, places, shapes, ahead_bytes, trace)
    stored = StoredChunks(nodes, loader, rows.prompts, rule, world.model)
    options = EngineOptions(kv_tokens=kv_tokens, max_step_tokens=max_step_tokens)
    engine = Engine(
        world.model,
        plan,
        rows.prompts,
        requests,
        StopRules(frozenset([EOS]), None),
        options,
        stored=stored,
    )
    answers: dict[int, list[int]] = {}
    try:
        for finished in engine.run():
            engine.pool.check_integrity()
            for result in finished:
                span = slice(plan.request_ptr[result.sequence], plan.request_ptr[result.sequence + 1])
                answers |= {int(request): list(result.tokens) for request in plan.request[span]}
    finally:
        loader.close()
    assert tier.peak <= host_bytes
    return [answers[row] for row in range(len(rows.lists))], engine.stats, stored


def reference(world: World, rows: Rows, rule: RepairRule | None) -> list[list[int]]:
    """One request at a time."""
    lookup = lookup_of(world, rows)
    shapes = KvShapes(world.model.layers, world.model.dtype)
    answers = []
    for row in range(len(rows.lists)):
        prompt = rows.chunked(row)
        placed = []
        for chunk in lookup.row(row):
            if chunk.variant is None:
                continue
            file = lookup.store.open(chunk.variant.name, chunk.variant.tokens)
            assert file is not None
            layers = [
                decode_layer(
                    shapes.codec(chunk.variant.codec),
                    EncodedLayer(*file.layer_shape(layer), file.layer(layer)),
                    len(chunk.variant.tokens),
                    shapes.dtype,
                )
                for layer in range(file.num_layers)
            ]
            keys, values = zip(*layers)
            context = file.header.context
            placed.append(PlacedChunk(chunk.begin, keys, values, context, chunk.variant.stored, chunk.before))
        ready = prefill(world.model, world.rotation, prompt, placed, rule, NEW)
        answers.append(decode_greedy(ready, len(prompt.tokens), NEW, frozenset([EOS])))
    return answers


def full(world: World, rows: Rows) -> list[list[int]]:
    """transformers' own answers."""
    return [_alone(world, tuple(tokens)) for tokens in rows.lists]


@cache
def _alone(world: World, tokens: tuple[int, ...]) -> list[int]:
    return generate_alone(world.alone, list(tokens), NEW)


@pytest.mark.parametrize("name", NAMES)
def test_exact_reuse_is_token_for_token_what_is_computed_without(name: str, worlds: dict[str, World]):
    world = worlds[name]
    asked = make_rows([[1, 2, 3], [1, 2], [1], [4, 5, 7], [3, 1, 2], [2, 1]])
    found, stats, stored = run_engine(world, asked, None, lookup=lookup_of(world, asked, exact=True))
    assert found == full(world, asked)
    assert stored.stats.exact_tokens == stored.stats.placed_tokens > 30
    assert stats.prompt_tokens_computed < sum(map(len, asked.lists)) - 50


@pytest.mark.parametrize("name", NAMES)
def test_naive_reuse_is_that_of_the_reference(name: str, worlds: dict[str, World]):
    world = worlds[name]
    found, stats, _ = run_engine(world, ASKED, None)
    assert found == reference(world, ASKED, None)
    assert found != full(world, ASKED)  # else this shows nothing
    stored = sum(len(passage(n)) for row in ([2, 1], [3], [5, 4, 1], [6]) for n in row)
    assert stats.prompt_tokens_computed <= sum(map(len, ASKED.lists)) - stored


@pytest.mark.parametrize("name", NAMES)
def test_repaired_rows_are_those_of_the_reference(name: str, worlds: dict[str, World]):
    world = worlds[name]
    rule = FirstTokensRule(0.3)
    found, _, stored = run_engine(world, ASKED, rule)
    assert found == reference(world, ASKED, rule)
    assert 0 < stored.stats.repaired_tokens < stored.stats.placed_tokens / 2


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize(
    "rule", [LargestDeviationRule(1.0), MostSensitiveRule(1.0)], ids=["deviation", "sensitive"]
)
def test_repair_of_everything_is_full_computation(name: str, rule: RepairRule, worlds: dict[str, World]):
    found, _, _ = run_engine(worlds[name], ASKED, rule)
    assert found == full(worlds[name], ASKED)


@pytest.mark.parametrize(
    ("kv_tokens", "max_step_tokens", "host_bytes", "ahead_bytes"),
    [(60, 7, 1 << 20, 1 << 20), (90, 256, 4000, 1), (2000, 3, 1, 20_000)],
)
def test_little_memory_and_small_steps_change_nothing(
    kv_tokens: int, max_step_tokens: int, host_bytes: int, ahead_bytes: int, worlds: dict[str, World]
):
    world = worlds["qwen3"]
    for rule in (None, FirstTokensRule(0.3)):
        wanted, _, _ = run_engine(world, ASKED, rule)
        found, _, stored = run_engine(
            world,
            ASKED,
            rule,
            kv_tokens=kv_tokens,
            max_step_tokens=max_step_tokens,
            host_bytes=host_bytes,
            ahead_bytes=ahead_bytes,
        )
        assert found == wanted
        assert stored.loader.stats.peak_bytes <= max(ahead_bytes, 40 * 2 * 3 * 2 * 16 * 4)


def test_what_many_share_is_computed_exactly_where_that_costs_each_little(worlds: dict[str, World]):
    world = worlds["llama"]
    asked = make_rows([[2, 1, 4], [2, 1, 5], [2, 1, 6], [2, 1, 3]])
    found, _, stored = run_engine(world, asked, FirstTokensRule(0.25), share=0.25)
    shared = len(passage(2)) + len(passage(1))
    assert stored.stats.placed_tokens <= sum(len(passage(n)) for n in (4, 5, 6, 3))
    lossy, _, less = run_engine(world, asked, FirstTokensRule(0.24), share=0.24)
    assert less.stats.placed_tokens >= stored.stats.placed_tokens + shared - 1
    assert len(found) == len(lossy) == 4


def test_a_damaged_chunk_is_computed_instead_and_named(tmp_path: Path, worlds: dict[str, World]):
    world = worlds["llama"]
    fill(tmp_path / "store", world.model, make_rows([[1, 2], [3, 4]]), variants=1)
    own = World(world.alone, world.model, world.rotation, tmp_path / "store")
    asked = make_rows([[1, 2], [3, 4], [1]])
    lookup = lookup_of(own, asked, exact=True)
    for chunk in lookup.store:
        path = Path(lookup.store.folder.chunk(chunk.name))
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1  # in the KV of the last layer
        path.write_bytes(raw)
    found, _, stored = run_engine(own, asked, None, lookup=lookup)
    assert found == full(world, asked)
    assert stored.stats.placed_tokens == 0
    assert len(lookup.store.problems) == 4 and "layer 2" in lookup.store.problems[0]


def test_loading_is_ahead_of_use_and_seen_in_the_trace(worlds: dict[str, World]):
    trace: list[LoadEvent] = []
    run_engine(worlds["llama"], ASKED, None, trace=trace, max_step_tokens=8)
    decoded = [event for event in trace if event.what == "decode"]
    begun = [event.node for event in decoded if event.layer == 0]
    assert begun == sorted(begun)
    for node in begun:
        assert [event.layer for event in decoded if event.node == node] == [0, 1, 2]
    computed = [event.layer for event in trace if event.what == "compute"]
    assert computed == [0, 1, 2] * (len(computed) // 3) and computed


def test_precompute_stores_each_chunk_in_so_many_contexts_and_adds_only_what_is_missing(
    tmp_path: Path, worlds: dict[str, World]
):
    model = worlds["llama"].model
    rows = make_rows([[1, 2], [2, 1], [1, 2, 3], [3, 1, 2]])
    first = fill(tmp_path / "store", model, rows)
    assert (first.chunks, first.stored) == (3, 6)
    again = fill(tmp_path / "store", model, rows)
    assert (again.stored, again.tokens_computed) == (0, 0)
    more = fill(tmp_path / "more", model, rows, contexts=3)
    assert more.stored == 6 and more.tokens_computed >= first.tokens_computed
    assert fill(tmp_path / "more", model, rows, contexts=3).tokens_computed == 0
    with ChunkStore(tmp_path / "store", IDENTITY) as store:
        assert len(store) == 6
        tokens = np.array(passage(1), dtype=np.int32)
        file = store.open(store.find(tokens)[0].name, tokens)
        assert file is not None and file.header.statistics.sensitivity.any()


def test_tokens_that_nobody_looks_at_are_not_sensitive():
    """Of two tokens that differ as much from context to context, the one that others look at is the one to repair."""
    tokens = np.arange(2, dtype=np.int32)
    context = chunk_context(tokens, [])
    statistics = ChunkStatistics(*(np.zeros(size, np.float32) for size in (2, 2, 0)), 0.0, 0.0)
    looked_at = np.array([0.0, 3.0], dtype=np.float32)
    variants = [
        ComputedChunk(tokens, context, statistics, looked_at, [torch.full((2, 1, 4), value)], [])
        for value in (1.0, 2.0)
    ]
    found = sensitivity(variants)
    assert found[0] == 0 < found[1]
    assert not sensitivity(variants[:1]).any()


def test_scattered_rows_are_the_same_however_steps_divide_them(worlds: dict[str, World]):
    world = worlds["qwen3"]
    asked = make_rows([[2, 1, 5]])
    found, stats, _ = run_engine(world, asked, MostSensitiveRule(0.5), max_step_tokens=4)
    once, other, _ = run_engine(world, asked, MostSensitiveRule(0.5))
    assert found == once
    assert stats.prompt_tokens_computed == other.prompt_tokens_computed < len(asked.lists[0])
