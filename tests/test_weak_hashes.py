"""Every hash made so weak that nearly everything collides: answers must stay right, and be the same ones after a kill.

docs/architecture.md ("Where a hash stands for content") lists the uses. Here each is weakened where it is imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from batchllm.core import SamplingParams
from batchllm.dataset import keys
from batchllm.dataset.keys import make_requests
from batchllm.executor.engine import Engine
from batchllm.planner import field_order
from batchllm.planner.field_order import FreeItems, choose_order, saved_length
from tests.dataset.test_keys import ids_of, prompts_of
from tests.jobs import exit_code_of, make_job, questions, read_output, texts

SAMPLED = SamplingParams(max_tokens=6, temperature=1.0)


def weak_digest(content: bytes) -> bytes:
    """16 bytes of which all but two bits are nought."""
    return bytes(15) + bytes([sum(content) % 3])


def weak_number(content: bytes, seed: int = 0) -> int:
    return sum(content) % 2


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "xxh3_128_digest", weak_digest)
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", weak_number)
    monkeypatch.setattr(field_order, "_mixed", lambda value: value * np.uint64(0))


def test_keys_tell_rows_apart_whatever_the_hash(weak: None) -> None:
    random = np.random.default_rng(1)
    rows = [random.integers(0, 9, random.integers(1, 5)).tolist() for _ in range(300)]
    params_of = random.integers(0, 2, 300).tolist()
    ids = [f"id {row}" for row in random.integers(0, 4, 300)]
    params = (SamplingParams(), SAMPLED)
    made = make_requests(prompts_of(rows, params, params_of), ids_of(ids), b"c")
    of_row = [tuple(key) for key in made.key.tolist()]
    assert len(set(of_row)) == 300
    # Shuffled rows keep their keys: those of equal rows as a set, those of others each its own.
    order = random.permutation(300)
    turned = make_requests(
        prompts_of([rows[i] for i in order], params, [params_of[i] for i in order]),
        ids_of([ids[i] for i in order]),
        b"c",
    )
    content = [(tuple(rows[i]), params_of[i], ids[i]) for i in range(300)]
    expected: dict[Any, set[Any]] = {}
    found: dict[Any, set[Any]] = {}
    for i, key in enumerate(of_row):
        expected.setdefault(content[i], set()).add(key)
    for i, key in zip(order.tolist(), turned.key.tolist()):
        found.setdefault(content[i], set()).add(tuple(key))
    assert found == expected


def test_faults_and_prompts_are_told_apart(weak: None) -> None:
    made = make_requests(prompts_of([[1], [1], [2], [3]], faults={1: "gone", 3: "bad"}), None, b"c")
    assert len({tuple(key) for key in made.key.tolist()}) == 4


def test_a_good_hash_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows are no collision."""

    def refuse(content: bytes) -> bytes:
        raise AssertionError("there was no collision")

    monkeypatch.setattr(keys, "_blake2", refuse)
    make_requests(prompts_of([[1], [2], [1]], [SAMPLED]), ids_of(["a", "a", "a"]), b"c")
    make_requests(prompts_of([]), None, b"c")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_job_gives_every_row_its_own_answer(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: None, temperature: float
) -> None:
    generate = {"max_tokens": 8, "temperature": temperature, "n": 1 if temperature == 0 else 2}
    rows = questions(30)
    job = make_job(tmp_path, model_folder, rows, generate=generate, engine={"max_step_tokens": 32})
    out = tmp_path / "out"
    assert exit_code_of("run", job, "--quiet") == 0
    expected = texts(out)
    if temperature == 0:  # what a good hash gives: greedy texts do not depend on keys
        with monkeypatch.context() as strong:
            strong.setattr(keys, "xxh3_128_digest", xxhash.xxh3_128_digest)
            other = make_job(tmp_path / "strong", model_folder, rows, generate=generate)
            assert exit_code_of("run", other, "--quiet") == 0
        assert texts(tmp_path / "strong" / "out") == expected
    shutil.rmtree(out)
    original = Engine.run

    def interrupted(engine: Engine) -> Iterator[list[Any]]:
        given = 0
        for finished in original(engine):
            given += len(finished)
            yield finished
            if given >= 10:
                raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(Engine, "run", interrupted)
        assert exit_code_of("run", job, "--quiet") == 130
    assert 0 < len(texts(out)) < len(expected)
    assert exit_code_of("run", job, "--quiet") == 0
    assert texts(out) == expected
    assert read_output(out)["id"].unique(maintain_order=True).to_list() == [row["id"] for row in rows]


def test_reordered_passages_are_all_there(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: None
) -> None:
    """A confused order may share less. It is still an order of the row's own passages."""
    from batchllm.dataset import prompts

    rendered: list[str] = []
    original = prompts.PromptRenderer.render

    def render(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        rendered.extend(prompt.text for prompt in found)
        return found

    monkeypatch.setattr(prompts.PromptRenderer, "render", render)
    passages = [f"<{number} is the passage>" for number in range(6)]
    random = np.random.default_rng(0)
    rows = [
        {"id": str(row), "passages": random.permutation(passages)[:4].tolist(), "question": f"{row}?"}
        for row in range(20)
    ]
    text = "{% for passage in passages %}{{ passage }}{% endfor %}{{ question }}"
    job = make_job(tmp_path, model_folder, rows, prompt={"text": text, "reorder": "passages"})
    assert exit_code_of("run", job, "--quiet") == 0
    assert len(rendered) == 20
    for row, prompt in zip(rows, rendered):
        assert sorted(prompt.removesuffix(row["question"]).replace("><", ">|<").split("|")) == sorted(
            row["passages"]
        )


def test_sets_of_items_are_compared_not_only_their_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    for _ in range(30):
        count = random.integers(1, 5, 40)
        items = FreeItems(
            ptr=np.append(0, np.cumsum(count)),
            item=random.integers(0, 8, count.sum()),
            length=random.integers(1, 50, 8),
            lead=random.integers(0, 2, 40),
        )
        with monkeypatch.context() as confused:
            confused.setattr(field_order, "_mixed", lambda value: value * np.uint64(0))
            order = choose_order(items)
        for row in range(40):
            assert sorted(order.of(row)) == list(range(count[row]))
        assert order.gain.saved == saved_length(items, order.order) >= order.gain.saved_as_given
