"""What one engine did with one workload."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineResult:
    engine: str
    seconds: float  # whole job, model loaded and warm
    tokens: list[list[int]]  # by prompt


def save(result: EngineResult, path: Path) -> None:
    path.write_text(json.dumps(asdict(result)))


def load(path: Path) -> EngineResult:
    return EngineResult(**json.loads(path.read_text()))


def equal_tokens(ours: EngineResult, other: EngineResult) -> float:
    """Share of output tokens that are equal, counted up to the first difference of each prompt."""
    equal = total = 0
    for mine, theirs in zip(ours.tokens, other.tokens, strict=True):
        total += len(mine)
        for left, right in zip(mine, theirs):
            if left != right:
                break
            equal += 1
    return equal / max(1, total)
