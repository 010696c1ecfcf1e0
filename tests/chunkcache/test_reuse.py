"""Reuse on tiny models: what is placed exactly changes nothing, repair of everything is full computation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.chunkcache.chunk_file import EncodedLayer
from batchllm.chunkcache.codecs import codec_named
from batchllm.chunkcache.decision import StoredContext
from batchllm.chunkcache.identity import chunk_key
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.precompute import ChunkedPrompt, ComputedChunk, compute_chunks, decode_layer
from batchllm.chunkcache.request_kv import RequestKv
from batchllm.chunkcache.reuse import decode_greedy, exact_only, prefill
from batchllm.chunkcache.rules import (
    CacheCraftRule,
    FirstTokensRule,
    LargestDeviationRule,
    MostSensitiveRule,
    PlacedChunk,
    RepairRule,
    strength_for,
)
from batchllm.chunkcache.store import ChunkStore
from batchllm.executor.model import ModelRunner, prepare_model
from tests.executor.tiny_models import configurations, generate_alone, make_model

IDENTITY = b"tiny random model"[:16]
EOS = frozenset({3})
NEW = 8
LEAD, A, B, C, QUESTION = [5, 6], [10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33, 34, 35], [40, 41, 42]


def make_prompt(*chunks: list[int]) -> ChunkedPrompt:
    tokens, places = list(LEAD), []
    for chunk in chunks:
        places.append((len(tokens), len(tokens) + len(chunk)))
        tokens += chunk
    return ChunkedPrompt(np.array(tokens + QUESTION, dtype=np.int32), tuple(places))


def keys_of(prompt: ChunkedPrompt) -> list[bytes]:
    return [chunk_key(IDENTITY, prompt.chunk_tokens(index)) for index in range(len(prompt.chunks))]


def placed_in(prompt: ChunkedPrompt, computed: Sequence[ComputedChunk]) -> list[PlacedChunk]:
    """Every computed chunk at each of its places in the prompt."""
    keys, found = keys_of(prompt), []
    for index, (begin, _) in enumerate(prompt.chunks):
        for chunk in computed:
            if chunk.tokens.tolist() == prompt.chunk_tokens(index).tolist():
                stats = chunk.statistics
                stored = StoredContext(
                    chunk.context.chunks,
                    stats.context_chunks,
                    stats.outside,
                    stats.sensitivity,
                    stats.outside_mean,
                    stats.inside_mean,
                )
                found.append(
                    PlacedChunk(begin, chunk.keys, chunk.values, chunk.context, stored, tuple(keys[:index]))
                )
                break
    return found


def answer(
    model: ModelRunner,
    rotation: KeyRotation,
    prompt: ChunkedPrompt,
    placed: Sequence[PlacedChunk],
    rule: RepairRule | None = None,
) -> tuple[list[int], float]:
    ready = prefill(model, rotation, prompt, placed, rule, NEW)
    return decode_greedy(ready, len(prompt.tokens), NEW, EOS), ready.computed_tokens


@pytest.fixture(scope="module")
def worlds() -> dict[str, tuple[Any, ModelRunner, KeyRotation]]:
    made: dict[str, tuple[Any, ModelRunner, KeyRotation]] = {}
    for name in ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"):
        model = prepare_model(make_model(configurations()[name]))
        made[name] = (make_model(configurations()[name]), model, find_rotation(model))
    return made


NAMES = ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", NAMES)
def test_without_reuse_and_with_exact_reuse_answers_are_those_of_transformers(name: str, worlds: Any):
    alone, model, rotation = worlds[name]
    prompt = make_prompt(A, B, C)
    wanted = generate_alone(alone, prompt.tokens.tolist(), NEW)
    assert answer(model, rotation, prompt, []) == (wanted, len(prompt.tokens))
    computed = compute_chunks(model, rotation, prompt, IDENTITY)
    exact = exact_only(prompt, keys_of(prompt), placed_in(prompt, computed))
    assert len(exact) == 3
    assert answer(model, rotation, prompt, exact) == (wanted, len(LEAD) + len(QUESTION))


@pytest.mark.parametrize("name", NAMES)
def test_repair_of_everything_is_full_computation(name: str, worlds: Any):
    _, model, rotation = worlds[name]
    computed = [
        *compute_chunks(model, rotation, make_prompt(C, A), IDENTITY),
        *compute_chunks(model, rotation, make_prompt(B), IDENTITY),
    ]
    prompt = make_prompt(A, B, C)
    placed = placed_in(prompt, computed)
    assert len(placed) == 3 and not exact_only(prompt, keys_of(prompt), placed)
    full = prefill(model, rotation, prompt, [], None, NEW).logits
    for rule in (
        FirstTokensRule(1.0),
        CacheCraftRule(1e9),
        LargestDeviationRule(1.0),
        MostSensitiveRule(1.0),
    ):
        ready = prefill(model, rotation, prompt, placed, rule, NEW)
        torch.testing.assert_close(ready.logits, full, rtol=1e-3, atol=1e-3)
        assert ready.computed_tokens >= len(prompt.tokens)
    naive = prefill(model, rotation, prompt, placed, None, NEW)
    assert naive.computed_tokens == len(LEAD) + len(QUESTION)
    assert float((naive.logits - full).abs().max()) > 1e-3  # else this shows nothing


def test_repair_comes_nearer_to_full_computation_the_more_is_computed(worlds: Any):
    _, model, rotation = worlds["qwen3"]
    prompt = make_prompt(A, B, C)
    computed = compute_chunks(model, rotation, make_prompt(C, B, A), IDENTITY)
    placed = placed_in(prompt, computed)
    full = prefill(model, rotation, prompt, [], None, NEW)

    def difference(rule: RepairRule | None) -> float:
        """Of K and V of the last layer at the question."""
        ready = prefill(model, rotation, prompt, placed, rule, NEW)
        last, end = len(model.layers) - 1, len(prompt.tokens)
        own, other = ready.kv.values[last], full.kv.values[last]
        return float((own - other)[end - len(QUESTION) : end].norm())

    by_share = [difference(FirstTokensRule(share)) for share in (0.0, 0.5, 1.0)]
    assert by_share[0] > by_share[1] > by_share[2]
    assert by_share[2] < 1e-3
    assert difference(None) == by_share[0]


def test_scattered_rows_see_exactly_what_lies_before_them(worlds: Any):
    """Computed again in any order of stretches, every row equals that of one full pass."""
    for name in NAMES:
        _, model, _ = worlds[name]
        tokens = torch.tensor(make_prompt(A, B, C).tokens.tolist())
        everything = torch.arange(len(tokens))
        full = RequestKv(model, len(tokens))
        full.compute(tokens, everything)
        again = RequestKv(model, len(tokens))
        for layer in range(len(model.layers)):
            again.keys[layer].copy_(full.keys[layer])
            again.values[layer].copy_(full.values[layer])
        scattered = torch.tensor([1, 4, 5, 9, len(tokens) - 1])
        for layer in range(len(model.layers)):  # what is computed again must not be read before
            again.keys[layer][scattered] = 1e3
        again.compute(tokens[scattered], scattered)
        for one, other in zip((*again.keys, *again.values), (*full.keys, *full.values)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_statistics_are_what_attention_did(worlds: Any):
    alone, model, rotation = worlds["llama"]
    prompt = make_prompt(A, B, C)
    computed = compute_chunks(model, rotation, prompt, IDENTITY)
    with torch.inference_mode():
        attentions = alone(
            torch.tensor([prompt.tokens.tolist()]), output_attentions=True, use_cache=False
        ).attentions
    mean = torch.stack(attentions).mean(dim=(0, 1, 2))  # [tokens, tokens] over layers and heads
    begin, end = prompt.chunks[2]
    stats = computed[2].statistics
    to_a, to_b = (mean[begin:end, slice(*prompt.chunks[i])].sum(dim=1) for i in (0, 1))
    np.testing.assert_allclose(stats.outside, (to_a + to_b).numpy(), rtol=1e-4)
    np.testing.assert_allclose(stats.context_chunks, [float(to_a.sum()), float(to_b.sum())], rtol=1e-4)
    outside_mean = float(to_a.sum()) / (len(A) * len(C)) + float(to_b.sum()) / (len(B) * len(C))
    assert stats.outside_mean == pytest.approx(outside_mean, rel=1e-4)
    assert stats.inside_mean == pytest.approx(float(mean[begin:end, begin:end].sum()) / len(C) ** 2, rel=1e-4)
    first = computed[0]
    assert first.context.chunks == () and not first.statistics.outside.any()
    assert computed[2].context.chunks == tuple(keys_of(prompt)[:2])


def test_chunks_go_through_a_store_unchanged(worlds: Any, tmp_path: Path):
    _, model, rotation = worlds["qwen3"]
    prompt = make_prompt(A, B, C)
    codec = codec_named("raw", model.dtype)
    computed = compute_chunks(model, rotation, prompt, IDENTITY)
    with ChunkStore(tmp_path / "store", IDENTITY, write=True, durable=False) as store:
        for chunk in computed:
            assert store.put(chunk.header(IDENTITY, codec, "float32"), chunk.encoded(codec))
    store = ChunkStore(tmp_path / "store", IDENTITY)
    for chunk in computed:
        (found,) = store.find(chunk.tokens)
        file = store.open(found.name, chunk.tokens)
        assert file is not None and file.header.context == chunk.context
        np.testing.assert_array_equal(file.header.statistics.outside, chunk.statistics.outside)
        for layer in range(len(model.layers)):
            stored = EncodedLayer(*file.layer_shape(layer), file.layer(layer))
            key, value = decode_layer(codec, stored, len(chunk.tokens), model.dtype)
            assert torch.equal(key, chunk.keys[layer]) and torch.equal(value, chunk.values[layer])


def test_the_strength_that_gives_a_share(worlds: Any):
    _, model, rotation = worlds["llama"]
    prompt = make_prompt(A, B, C)
    placed = placed_in(prompt, compute_chunks(model, rotation, make_prompt(C, B, A), IDENTITY))
    for share in (0.1, 0.5, 0.9):
        strength = strength_for(placed, share)
        chosen = CacheCraftRule(strength).choose(placed, None)
        total = sum(chunk.num_tokens for chunk in placed)
        assert share * total <= len(chosen) <= share * total + len(placed)


def test_a_prompt_without_chunks_and_repeated_chunks(worlds: Any):
    alone, model, rotation = worlds["llama"]
    nothing = make_prompt()
    assert compute_chunks(model, rotation, nothing, IDENTITY) == []
    assert answer(model, rotation, nothing, [], FirstTokensRule(0.5))[0] == generate_alone(
        alone, nothing.tokens.tolist(), NEW
    )
    twice = make_prompt(A, B, A)
    computed = compute_chunks(model, rotation, twice, IDENTITY)
    assert (
        len({chunk.header(IDENTITY, codec_named("raw", model.dtype), "float32").key for chunk in computed})
        == 2
    )
    exact = exact_only(twice, keys_of(twice), placed_in(twice, computed))
    assert len(exact) == 2  # the second A was computed after other tokens than the first
    assert answer(model, rotation, twice, exact)[0] == generate_alone(alone, twice.tokens.tolist(), NEW)
