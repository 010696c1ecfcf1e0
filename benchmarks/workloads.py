"""The prompt sets that engines are compared on: token ids, shuffled, with a fixed output length."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 32_000
KV_BYTES = 4 << 30
_FIRST_TOKEN = 5  # below: special tokens


@dataclass(frozen=True)
class Workload:
    """`prompts[i]` is answered with exactly `max_tokens` greedy tokens."""

    name: str
    prompts: list[list[int]]
    max_tokens: int
    kv_tokens: int | None = None  # what KV memory holds, in every engine; None: KV_BYTES
    model: str = "llama-168m"  # a name of benchmarks.model

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, output included."""
        return max(map(len, self.prompts)) + self.max_tokens


@dataclass(frozen=True)
class _Level:
    """Every text of the level above goes on in `children` ways of `tokens` random tokens each."""

    tokens: int
    children: int = 1


@dataclass(frozen=True)
class _Tree:
    """A prompt is one way from the root to a leaf."""

    levels: tuple[_Level, ...]
    output: int
    kv_tokens: int | None = None
    model: str = "llama-168m"
    vocabulary: int = VOCABULARY


def _groups(groups: int, prefix: int, rows: int, suffix: int) -> tuple[_Level, ...]:
    return _Level(prefix, groups), _Level(suffix, rows)


_MANY = _groups(24, 1024, 8, 16)
_SYNTHETIC = {
    "groups": _Tree(_groups(8, 512, 16, 32), output=32),
    "long_prefix": _Tree(_groups(1, 3072, 128, 16), output=64),
    "many_prefixes": _Tree(_MANY, output=8),
    "no_sharing": _Tree((_Level(256, 96),), output=64),
    # Memory for a quarter of the prefixes.
    "kv_starved": _Tree(_MANY, output=8, kv_tokens=24 * 1024 // 4),
    # System prompt, few-shot examples, document, question.
    "three_levels": _Tree((_Level(512), _Level(512, 6), _Level(256, 8), _Level(32, 4)), output=32),
    # In float32 and with weights that decide clearly, every engine should say the same.
    "exact": _Tree(_groups(4, 96, 6, 12), output=24, kv_tokens=32768, model="tiny-float32", vocabulary=500),
    "tiny": _Tree(_groups(2, 64, 4, 8), output=4, kv_tokens=32768, model="tiny-float32", vocabulary=500),
}
NAMES = tuple(_SYNTHETIC)


def make(name: str, seed: int = 0) -> Workload:
    """A workload by name; the same seed gives the same prompts."""
    tree = _SYNTHETIC[name]
    random = np.random.default_rng(seed)
    prompts: list[list[int]] = [[]]
    for level in tree.levels:
        prompts = [
            above + random.integers(_FIRST_TOKEN, tree.vocabulary, level.tokens).tolist()
            for above in prompts
            for _ in range(level.children)
        ]
    shuffled = [prompts[index] for index in random.permutation(len(prompts))]
    return Workload(name, shuffled, tree.output, tree.kv_tokens, tree.model)


def save(workload: Workload, path: Path) -> None:
    path.write_text(json.dumps(asdict(workload)))


def load(path: Path) -> Workload:
    return Workload(**json.loads(path.read_text()))
