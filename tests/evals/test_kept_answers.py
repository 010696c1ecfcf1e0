"""Answers of an evaluation that was interrupted: found again by what they are made from, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

from batchllm.core import SamplingParams
from batchllm.evals.kept_answers import KeptAnswers
from batchllm.scoring import Item, TokenSpan

GREEDY, SAMPLED = SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=1.0)


def kept(
    folder: Path, requests: list[list[Item]], answers: dict[int, Any], model: bytes = b"model"
) -> list[Any]:
    """What is known of the requests, after which the `answers` to some of them are kept."""
    store = KeptAnswers(folder, model)
    names, found = store.take(requests)
    for number, answer in answers.items():
        store.add(names[number], answer)
    store.close()
    assert store.taken == sum(answer is not None for answer in found)
    return found


def test_an_answer_is_found_by_what_it_is_made_from(tmp_path: Path) -> None:
    requests: list[list[Item]] = [
        [TokenSpan([1, 2, 3], 1)],
        [TokenSpan([1, 2, 3], 2)],
        [TokenSpan([1, 2, 3], 1), TokenSpan([3, 4], 1)],
        [([1, 2, 3], GREEDY)],
        [([1, 2, 3], SAMPLED)],
        [([1, 2], GREEDY)],
    ]
    answers = {number: f"answer {number}" for number in range(len(requests))}
    assert kept(tmp_path, requests, answers) == [None] * len(requests)
    assert kept(tmp_path, requests[::-1], {}) == list(answers.values())[::-1]
    assert kept(tmp_path, requests, {}, b"another model") == [None] * len(requests)


def test_equal_requests_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    """The second one's random numbers follow from there being a first."""
    twice: list[list[Item]] = [[([1, 2], SAMPLED)], [([3], SAMPLED)], [([1, 2], SAMPLED)]]
    assert kept(tmp_path, twice, {0: "first", 1: "other"}) == [None] * 3
    assert kept(tmp_path, twice, {0: "first", 2: "second"}) == [None, "other", None]
    assert kept(tmp_path, twice, {}) == ["first", "other", "second"]


def test_a_line_that_was_not_finished_costs_its_answer_alone(tmp_path: Path) -> None:
    requests: list[list[Item]] = [[([number], GREEDY)] for number in range(3)]
    kept(tmp_path, requests, {0: [0.1 + 0.2, True], 1: "lost\ud800"})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert kept(tmp_path, requests, {2: "behind it"}) == [[0.1 + 0.2, True], None, None]
    assert kept(tmp_path, requests, {}) == [[0.1 + 0.2, True], None, "behind it"]


def test_nothing_is_left_of_a_complete_evaluation(tmp_path: Path) -> None:
    store = KeptAnswers(tmp_path / "nights", b"model")
    store.remove()
    assert not (tmp_path / "nights").exists()
    store.add(store.take([[([1], GREEDY)]])[0][0], "text")
    store.remove()
    assert list((tmp_path / "nights").iterdir()) == []


def test_an_answer_is_there_for_others_as_soon_as_it_is_added(tmp_path: Path) -> None:
    """So it survives a process that is killed."""
    request: list[list[Item]] = [[([1], GREEDY)]]
    store = KeptAnswers(tmp_path, b"model")
    store.add(store.take(request)[0][0], "text")
    assert KeptAnswers(tmp_path, b"model").take(request)[1] == ["text"]
