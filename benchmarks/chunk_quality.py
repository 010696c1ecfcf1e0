"""Answers with stored chunks against full computation: the example model on passages that recur in other company.

    python -m benchmarks.chunk_quality --sets 30 --seeds 11,12

Held-out document sets of the example model's generator. Each question is a row: the passages of its set and strangers
from another set, in an order of its own (notes stay behind the passage that says who speaks them). Before, the passages
of two sets at a time are shuffled, dealt into other prompts, and computed there, several times: two of them are what
the store holds, all of them say what depends on the context. So no row finds its passages in the order or company they
were computed in, and notes were often computed after another speaker's introduction.

Compute is tokens run through the model, as a share of all prompt tokens; a token run through half of the layers counts
half.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from batchllm.chunkcache.decision import StoredContext, best_variant, fix_share
from batchllm.chunkcache.identity import chunk_key
from batchllm.chunkcache.key_rotation import KeyRotation, find_rotation
from batchllm.chunkcache.precompute import ChunkedPrompt, ComputedChunk, compute_chunks, merged
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
from batchllm.executor.model import ModelRunner, load_model

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "passages"
_RESULTS = Path(__file__).parent / "results"
_IDENTITY = b"example model..."
_MOST_PASSAGES = 6
_NEW_TOKENS = 16
_VARIANTS = 2  # of each passage in the store
SHARES = (0.05, 0.1, 0.2, 0.25, 0.3)
sys.path.insert(0, str(_EXAMPLES))


@dataclass(frozen=True)
class Row:
    passages: tuple[str, ...]
    question: str
    gold: str
    kind: str


@dataclass(frozen=True)
class Case:
    """A row as tokens, with its stored chunks placed."""

    row: Row
    prompt: ChunkedPrompt
    placed: list[PlacedChunk]
    keys: list[bytes]


def make_rows(num_sets: int, seed: int) -> tuple[list[Row], list[list[str]]]:
    """(rows, passages of each set)."""
    from generator import FULL_TASK, make_document_set

    rng = random.Random(seed)
    sets = [make_document_set(rng, FULL_TASK, held_out=True, max_per_kind=(2, 2, 3)) for _ in range(num_sets)]
    blocks = [_blocks(made.passages) for made in sets]
    rows = []
    for number, made in enumerate(sets):
        strangers = (
            [block for block in blocks[number ^ 1] if len(block) == 1] if number ^ 1 < num_sets else []
        )
        for question in made.questions:
            chosen = list(blocks[number])
            room = _MOST_PASSAGES - len(made.passages)
            chosen += rng.sample(strangers, min(len(strangers), rng.randint(0, max(0, room))))
            rng.shuffle(chosen)
            passages = tuple(passage for block in chosen for passage in block)
            rows.append(Row(passages, question.text, question.answer, question.kind))
    rng.shuffle(rows)
    return rows, [list(made.passages) for made in sets]


def _blocks(passages: Sequence[str]) -> list[list[str]]:
    """Notes together with the passage before them, which says who speaks."""
    blocks: list[list[str]] = []
    for passage in passages:
        if "The speaker" in passage.split(". ")[0] or "the speaker's" in passage.split(". ")[0]:
            blocks[-1].append(passage)
        else:
            blocks.append([passage])
    return blocks


class Tokens:
    def __init__(self) -> None:
        from tokenizer import END, START, load_tokenizer

        self._tokenizer = load_tokenizer()
        self.end = frozenset({self._tokenizer.token_to_id(END)})
        self._lead = self.of(f"{START}user\n")

    def of(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def prompt(self, passages: Sequence[str], question: str = "") -> ChunkedPrompt:
        from tokenizer import question_text

        tokens, places = list(self._lead), []
        for passage in passages:
            own = self.of(passage + "\n")
            places.append((len(tokens), len(tokens) + len(own)))
            tokens += own
        tokens += self.of(question_text(question)) if question else []
        return ChunkedPrompt(np.array(tokens, dtype=np.int32), tuple(places))


def make_store(
    model: ModelRunner,
    rotation: KeyRotation,
    tokens: Tokens,
    sets: list[list[str]],
    deals: int,
    seed: int,
    alone: bool,
) -> dict[bytes, list[ComputedChunk]]:
    """Every passage computed in `deals` prompts that are not rows."""
    rng = random.Random(seed)
    store: dict[bytes, list[ComputedChunk]] = {}
    for first in range(0, len(sets), 2):
        passages = [passage for made in sets[first : first + 2] for passage in made]
        for _ in range(deals):
            rng.shuffle(passages)
            for low in range(0, len(passages), 5):
                prompt = tokens.prompt(passages[low : low + 5])
                for chunk in compute_chunks(model, rotation, prompt, _IDENTITY):
                    store.setdefault(chunk_key(_IDENTITY, chunk.tokens), []).append(chunk)
        for passage in passages:
            (chunk,) = compute_chunks(model, rotation, tokens.prompt([passage]), _IDENTITY)
            key = chunk_key(_IDENTITY, chunk.tokens)
            seen = store[key]
            store[key] = [merged(kept, seen) for kept in ([chunk] if alone else seen[:_VARIANTS])]
    return store


def place(row: Row, tokens: Tokens, store: dict[bytes, list[ComputedChunk]]) -> Case:
    prompt = tokens.prompt(row.passages, row.question)
    keys = [chunk_key(_IDENTITY, prompt.chunk_tokens(index)) for index in range(len(prompt.chunks))]
    placed = []
    for index, (begin, _) in enumerate(prompt.chunks):
        variants = store[keys[index]]
        contexts = [_stored(chunk) for chunk in variants]
        best = best_variant(contexts, keys[:index])
        chunk = variants[best]
        placed.append(
            PlacedChunk(begin, chunk.keys, chunk.values, chunk.context, contexts[best], tuple(keys[:index]))
        )
    return Case(row, prompt, placed, keys)


def _stored(chunk: ComputedChunk) -> StoredContext:
    stats = chunk.statistics
    return StoredContext(
        chunk.context.chunks,
        stats.context_chunks,
        stats.outside,
        stats.sensitivity,
        stats.outside_mean,
        stats.inside_mean,
    )


def measure(
    model: ModelRunner,
    rotation: KeyRotation,
    tokens: Tokens,
    cases: Sequence[Case],
    mode: str,
    rule: RepairRule | None,
) -> dict[str, Any]:
    """Exact match by kind, and what was computed."""
    right: dict[str, list[int]] = {}
    computed = total = 0.0
    answers = []
    for case in cases:
        placed = {
            "full": [],
            "exact": exact_only(case.prompt, case.keys, case.placed),
        }.get(mode, case.placed)
        ready = prefill(model, rotation, case.prompt, placed, rule, _NEW_TOKENS)
        found = decode_greedy(ready, len(case.prompt.tokens), _NEW_TOKENS, tokens.end)
        answer = tokens.text(found).strip()
        answers.append(answer)
        for kind in (case.row.kind, "all"):
            right.setdefault(kind, []).append(answer == case.row.gold)
        computed += ready.computed_tokens
        total += len(case.prompt.tokens)
    return {
        **{kind: round(100 * sum(found) / len(found), 1) for kind, found in sorted(right.items())},
        "computed": round(computed / total, 3),
        "answers": answers,
    }


def prefix_cache_share(cases: Sequence[Case]) -> float:
    """Of all prompt tokens, those that are computed when every shared prefix is computed once."""
    prompts = sorted(tuple(case.prompt.tokens.tolist()) for case in cases)
    distinct = 0
    before: tuple[int, ...] = ()
    for prompt in prompts:
        common = next(
            (place for place, pair in enumerate(zip(prompt, before)) if pair[0] != pair[1]),
            min(len(prompt), len(before)),
        )
        distinct += len(prompt) - common
        before = prompt
    return distinct / sum(len(prompt) for prompt in prompts)


def rules(cases: Sequence[Case]) -> dict[str, tuple[str, RepairRule | None]]:
    everything = [chunk for case in cases for chunk in case.placed]
    found: dict[str, tuple[str, RepairRule | None]] = {"full": ("full", None), "naive": ("naive", None)}
    for share in SHARES:
        found[f"Cache-Craft {share:.0%}"] = ("repair", CacheCraftRule(strength_for(everything, share)))
        found[f"first tokens {share:.0%}"] = ("repair", FirstTokensRule(share))
        found[f"most sensitive {share:.0%}"] = ("repair", MostSensitiveRule(share))
        found[f"largest deviation {share:.0%}"] = ("repair", LargestDeviationRule(share))
    return found


@click.command()
@click.option("--sets", "num_sets", default=30, help="document sets of each seed")
@click.option("--deals", default=8, help="contexts that each passage is computed in")
@click.option("--alone", is_flag=True, help="store each passage as computed without others")
@click.option("--seeds", default="11,12")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-chunk-quality.json"
)
def main(num_sets: int, deals: int, alone: bool, seeds: str, out: Path | None) -> None:
    """Prints a table of rules and budgets."""
    model = load_model(str(_EXAMPLES / "model"), "float32")
    rotation, tokens = find_rotation(model), Tokens()
    with torch.inference_mode():
        cases, passages = [], 0
        for seed in map(int, seeds.split(",")):
            rows, sets = make_rows(num_sets, seed)
            store = make_store(model, rotation, tokens, sets, deals, seed, alone)
            cases += [place(row, tokens, store) for row in rows]
            passages += len(store)
        shares = [fix_share(chunk.stored, chunk.before) for case in cases for chunk in case.placed]
        prefix = prefix_cache_share(cases)
        click.echo(
            f"{len(cases)} rows, {passages} passages, {sum(len(c.prompt.tokens) for c in cases):,} prompt tokens; "
            f"fix share {np.mean(shares):.2f}; a prefix cache computes {prefix:.1%}"
        )
        click.echo("| | single | two | coref | all | of full | same answer | computed | than prefix cache |")
        click.echo("|---|---|---|---|---|---|---|---|---|")
        report = []
        for name, (mode, rule) in rules(cases).items():
            row = {"name": name, **measure(model, rotation, tokens, cases, mode, rule)}
            answers = row.pop("answers")
            if name == "full":
                full_answers, full = answers, row
            row["of_full"] = round(100 * row["all"] / full["all"], 1)
            row["same_answer"] = round(
                100 * float(np.mean([a == b for a, b in zip(answers, full_answers)])), 1
            )
            report.append(row)
            click.echo(
                f"| {name} | {row.get('single', '')} | {row.get('two', '')} | {row.get('coref', '')} | {row['all']} | "
                f"{row['of_full']} | {row['same_answer']} | {row['computed']:.3f} | {row['computed'] / prefix:.3f} |"
            )
    target = out or _RESULTS / f"{date.today().isoformat()}-chunk-quality.json"
    result = {
        "date": date.today().isoformat(),
        "rows": len(cases),
        "seeds": seeds,
        "contexts": deals,
        "prefix_cache": prefix,
        "results": report,
    }
    target.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
