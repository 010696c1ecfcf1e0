"""The prompt sets that engines are compared on: token ids, shuffled, with a fixed output length."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 32_000
_FIRST_TOKEN = 5  # below: special tokens


@dataclass(frozen=True)
class Workload:
    """`prompts[i]` is answered with exactly `max_tokens` greedy tokens."""

    name: str
    prompts: list[list[int]]
    max_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class _Prefixes:
    """`groups` prefixes of `prefix` tokens, each with `rows` rows that end in `suffix` tokens of their own."""

    groups: int
    prefix: int
    rows: int
    suffix: int
    output: int


_SYNTHETIC = {
    "groups": _Prefixes(groups=8, prefix=512, rows=16, suffix=32, output=32),
    "long_prefix": _Prefixes(groups=1, prefix=3072, rows=128, suffix=16, output=64),
    "many_prefixes": _Prefixes(groups=24, prefix=1024, rows=8, suffix=16, output=8),
    "no_sharing": _Prefixes(groups=96, prefix=0, rows=1, suffix=256, output=64),
    "tiny": _Prefixes(groups=2, prefix=64, rows=4, suffix=8, output=4),
}
NAMES = tuple(_SYNTHETIC)


def make(name: str, seed: int = 0) -> Workload:
    """A workload by name; the same seed gives the same prompts."""
    shape = _SYNTHETIC[name]
    random = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return random.integers(_FIRST_TOKEN, VOCABULARY, length).tolist()

    prompts = []
    for _ in range(shape.groups):
        prefix = text(shape.prefix)
        prompts += [prefix + text(shape.suffix) for _ in range(shape.rows)]
    return Workload(name, [prompts[index] for index in random.permutation(len(prompts))], shape.output)


def save(workload: Workload, path: Path) -> None:
    path.write_text(json.dumps(asdict(workload)))


def load(path: Path) -> Workload:
    return Workload(**json.loads(path.read_text()))
