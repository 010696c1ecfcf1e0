"""How close answers with lossy reuse are to those of a full computation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class AnswerQuality:
    """Means over answers, 0 to 1."""

    answers: int
    exact_match: float  # the same text, white space at its ends aside
    f1: float  # of words, as in SQuAD (Rajpurkar et al., 2016), case and punctuation kept
    token_agreement: float  # leading tokens in common, of the longer answer

    def figures(self) -> dict[str, float]:
        return asdict(self)


def compare_answers(full: Sequence[Answer], found: Sequence[Answer]) -> AnswerQuality:
    """`full` and `found`: of the same requests, in the same order."""
    pairs = list(zip(full, found, strict=True))
    count = max(1, len(pairs))
    return AnswerQuality(
        len(pairs),
        sum(one.text.strip() == other.text.strip() for one, other in pairs) / count,
        sum(word_f1(one.text, other.text) for one, other in pairs) / count,
        sum(_agreement(one.tokens, other.tokens) for one, other in pairs) / count,
    )


def word_f1(one: str, other: str) -> float:
    """1 for the same words in any order; two empty texts are the same."""
    words, others = one.split(), other.split()
    if not words or not others:
        return float(words == others)
    common = sum((Counter(words) & Counter(others)).values())
    return 2 * common / (len(words) + len(others))


def _agreement(one: Sequence[int], other: Sequence[int]) -> float:
    longer = max(len(one), len(other))
    same = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return same / longer if longer else 1.0
