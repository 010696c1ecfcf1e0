"""Workloads of real text: a seeded part of a data set, as tokens of the phi-3-mini tokenizer, which has 32,000 of them.

Few-shot prompts of BIG-Bench-Hard, questions about SQuAD's paragraphs, and every step of ReAct agents' runs. What is
answered is not read, so outputs have a fixed length and the models random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import real_sets
from benchmarks.workloads import VOCABULARY, Workload

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
_MOST_TOKENS = 4096  # of a sequence


def fewshot(data: Path, random: np.random.Generator) -> list[str]:
    """40 questions of each of 5 tasks."""
    tasks = sorted((data / "bbh" / "tasks").glob("*.json"))
    chosen = {tasks[number].stem for number in random.choice(len(tasks), 5, replace=False)}
    prompts = []
    for task in sorted(chosen):
        of_task = real_sets.bbh(data, task)
        prompts += [of_task[number] for number in random.choice(len(of_task), 40, replace=False)]
    return prompts


def documents(data: Path, random: np.random.Generator) -> list[str]:
    """All questions about 60 paragraphs."""
    by_paragraph: dict[str, list[str]] = {}
    for prompt in real_sets.squad(data):
        by_paragraph.setdefault(prompt.split("\n\nQuestion:")[0], []).append(prompt)
    paragraphs = sorted(by_paragraph)
    chosen = random.choice(len(paragraphs), 60, replace=False)
    return [prompt for number in chosen for prompt in by_paragraph[paragraphs[number]]]


def agents(data: Path, random: np.random.Generator) -> list[str]:
    """All steps of 30 runs."""
    runs = real_sets.agent_runs(data)
    return [prompt for number in random.choice(len(runs), 30, replace=False) for prompt in runs[number]]


# Name → prompts, output tokens.
_REAL: dict[str, tuple[Callable[[Path, np.random.Generator], list[str]], int]] = {
    "fewshot": (fewshot, 32),
    "documents": (documents, 16),
    "agents": (agents, 32),
}
NAMES = tuple(_REAL)


def make(name: str, data: Path = DATA, seed: int = 0) -> Workload:
    """A workload by name; the same seed gives the same prompts. Raises FileNotFoundError where there is no data."""
    texts_of, output = _REAL[name]
    if not data.is_dir():
        raise FileNotFoundError(f"no data in {data}")
    random = np.random.default_rng(seed)
    texts = texts_of(data, random)
    table = real_sets.tokenized([texts[number] for number in random.permutation(len(texts))], data)
    assert table.tokens.max() < VOCABULARY, "a token that the model does not have"
    prompts = [table.tokens[low:high].tolist() for low, high in zip(table.offsets, table.offsets[1:])]
    fitting = [prompt for prompt in prompts if len(prompt) + output <= _MOST_TOKENS]
    return Workload(name, fitting, output)


def text_rows(data: Path = DATA, rows: int = 500, seed: int = 0) -> list[str]:
    """Questions about SQuAD's paragraphs as text, shuffled: whole paragraphs until there are `rows` rows."""
    random = np.random.default_rng(seed)
    texts = documents(data, random)[:rows]
    return [texts[number] for number in random.permutation(len(texts))]


def tokenizer_files(data: Path = DATA) -> list[Path]:
    """What makes a folder with a model one with a tokenizer."""
    return [data / "tokenizers" / "phi-3-mini" / name for name in ("tokenizer.json", "tokenizer_config.json")]
