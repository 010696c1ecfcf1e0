"""Greedy output equals transformers' own generate, one request at a time, token for token, in float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from batchllm.core import SamplingParams
from batchllm.executor import attention_bands, attention_own, attention_pieces
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.planner.lengths import LengthEstimator
from tests.executor.harness import run
from tests.executor.tiny_models import VOCABULARY, configurations, generate_alone, make_model

MAX_TOKENS = 14
FUSED = {"llama", "mistral", "qwen2", "qwen3"}
ARCHITECTURES = sorted(configurations())


def prompts_of_every_kind() -> list[list[int]]:
    """A three-level tree, unique rows, a one-token prompt, identical prompts, and prompts that begin others."""
    random = np.random.default_rng(1)

    def text(length: int) -> list[int]:
        return random.integers(4, VOCABULARY, length).tolist()

    system = text(23)
    prompts = []
    for _ in range(3):
        few_shot = system + text(19)
        for _ in range(2):
            document = few_shot + text(11)
            prompts += [document + text(length) for length in (3, 1, 6)]
    prompts += [text(30), text(2), [7], text(45)]
    prompts += [prompts[4], prompts[4], prompts[0][:42], prompts[0][:-1], system]
    return [prompts[index] for index in random.permutation(len(prompts))]


@cache
def oracle(architecture: str) -> tuple[ModelRunner, list[list[int]], list[list[int]]]:
    model: Any = make_model(configurations()[architecture])
    prompts = prompts_of_every_kind()
    expected = [generate_alone(model, prompt, MAX_TOKENS) for prompt in prompts]
    return prepare_model(model), prompts, expected


class Optimist(LengthEstimator):
    """Expects every sequence to end at once, so that memory runs out and sequences have to step back."""

    def estimate(
        self, params: np.ndarray, decoded: np.ndarray, limits: np.ndarray, group: np.ndarray
    ) -> np.ndarray:
        return np.ones(len(decoded), dtype=np.int64)


VARIANTS = {
    "all at once": {},
    "tiny steps": {"max_step_tokens": 5},
    "no sharing of short prefixes": {"min_shared_tokens": 20},
    "little memory": {"kv_tokens": 130, "max_step_tokens": 40},
    "long chunks": {"max_step_tokens": 24},
    "fused": {"max_step_tokens": 40},
    "recovery": {"kv_tokens": 150, "max_step_tokens": 64, "estimator": Optimist()},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_output_equals_transformers(
    architecture: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variant == "long chunks":  # the paths that prompts of hundreds of tokens take
        monkeypatch.setattr(attention_pieces, "_SHORT", 6)
        monkeypatch.setattr(attention_pieces, "_LONG_TILE_ROWS", 8)
        monkeypatch.setattr(attention_own, "_FEW", 1)
        monkeypatch.setattr(attention_bands, "_CHEAP_SCORES", 100)
    runner, prompts, expected = oracle(architecture)
    if variant == "fused":
        fused = runner.fuse()
        assert fused == (architecture in FUSED)
    outcome = run(runner, prompts, SamplingParams(max_tokens=MAX_TOKENS), **VARIANTS[variant])
    runner.unfuse()
    assert [list(result.tokens) for result in outcome.results] == expected
    if variant == "recovery":
        assert outcome.stats.preemptions > 0
    else:
        assert outcome.stats.preemptions == 0
    assert outcome.engine.pool.used == 0, "KV memory leaked"
