"""Exact match of the model folder on held-out questions, by transformers' own greedy generate.

    python evaluate.py model                                 # fresh held-out document sets
    python evaluate.py model --questions ../quickstart/questions.parquet

Every question is its own prompt, rendered by the chat template.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch
from generator import FULL_TASK, KINDS, make_document_set
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 16


class Item(NamedTuple):
    kind: str
    documents: str
    question: str
    gold: str


def held_out_items(num_sets: int, seed: int, num_passages: int | None = None) -> list[Item]:
    """Questions about fresh held-out document sets, 3 of each kind a set where there are as many."""
    rng = random.Random(seed)
    shape = FULL_TASK if num_passages is None else replace(FULL_TASK, passages=(num_passages, num_passages))
    sets = [make_document_set(rng, shape, held_out=True, max_per_kind=(3, 3, 3)) for _ in range(num_sets)]
    return [Item(q.kind, made.documents, q.text, q.answer) for made in sets for q in made.questions]


def items_of_table(path: Path) -> list[Item]:
    table = pl.read_parquet(path).select("kind", "documents", "question", "gold")
    return [Item(*row) for row in table.iter_rows()]


@torch.inference_mode()
def generate_answers(model, tokenizer, items: Sequence[Item], batch_size: int = 32) -> list[str]:
    """The replies in the order of ``items``; prompts of similar length run together, padded on the left."""
    prompts = []
    for item in items:
        messages = [{"role": "user", "content": f"{item.documents}\nQuestion: {item.question}"}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    tokenizer.padding_side = "left"
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    answers = [""] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        for index, reply in zip(chosen, output[:, inputs["input_ids"].shape[1] :]):
            answers[index] = tokenizer.decode(reply, skip_special_tokens=True)
    return answers


def exact_match(items: Sequence[Item], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(right, asked) for each kind of question and for all."""
    counts = {kind: [0, 0] for kind in (*KINDS, "all")}
    for item, answer in zip(items, answers, strict=True):
        for key in (item.kind, "all"):
            counts[key][0] += answer == item.gold
            counts[key][1] += 1
    return {key: (right, asked) for key, (right, asked) in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exact match with transformers' greedy generate.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=Path, help="a table made by make_quickstart.py")
    parser.add_argument("--sets", type=int, default=60, help="number of fresh document sets otherwise")
    parser.add_argument("--passages", type=int, help="passages of every fresh set instead of 3 to 6")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).eval()
    items = (
        items_of_table(args.questions)
        if args.questions
        else held_out_items(args.sets, args.seed, args.passages)
    )
    answers = generate_answers(model, tokenizer, items)
    for kind, (right, asked) in exact_match(items, answers).items():
        print(f"{kind:8s} {right}/{asked} = {100 * right / max(1, asked):.1f} %")
    for item, answer in zip(items, answers):
        if args.show_wrong and answer != item.gold:
            print(
                f"--- {item.kind}\n{item.documents}\n{item.question}\ngold {item.gold!r}, answer {answer!r}"
            )


if __name__ == "__main__":
    main()
