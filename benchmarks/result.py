"""What one engine did with one workload."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EngineResult:
    engine: str  # with its settings
    seconds: float  # whole job, model loaded and warm
    tokens: list[list[int]]  # by prompt
    figures: dict[str, float] = field(default_factory=dict)  # what else the engine says of itself


def save(result: EngineResult, path: Path) -> None:
    path.write_text(json.dumps(asdict(result)))


def load(path: Path) -> EngineResult:
    return EngineResult(**json.loads(path.read_text()))


def equal_tokens(ours: EngineResult, other: EngineResult) -> float:
    """Share of output tokens that are equal, position by position.

    In bfloat16 engines round differently, and after a near-tie has been decided differently the rest of an answer
    has nothing in common: see `common_start`.
    """
    equal = sum(left == right for mine, theirs in _pairs(ours, other) for left, right in zip(mine, theirs))
    return equal / max(1, _total(ours))


def common_start(ours: EngineResult, other: EngineResult) -> float:
    """Share of output tokens before the first difference of their answer."""
    return sum(_common(mine, theirs) for mine, theirs in _pairs(ours, other)) / max(1, _total(ours))


def _pairs(ours: EngineResult, other: EngineResult) -> list[tuple[list[int], list[int]]]:
    return list(zip(ours.tokens, other.tokens, strict=True))


def _total(result: EngineResult) -> int:
    return sum(map(len, result.tokens))


def _common(left: list[int], right: list[int]) -> int:
    count = 0
    for mine, theirs in zip(left, right):
        if mine != theirs:
            break
        count += 1
    return count
