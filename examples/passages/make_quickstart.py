"""Write the questions of the quickstart: held-out document sets, about nine questions each, shuffled.

python make_quickstart.py ../quickstart/questions.parquet
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import polars as pl
from generator import FULL_TASK, DocumentSet, make_document_set

QUESTIONS_PER_KIND = (4, 3, 3)  # at most
MIN_QUESTIONS = 8


def quickstart_table(num_rows: int, seed: int) -> pl.DataFrame:
    """A table of ``num_rows`` rows; a function of its arguments alone.

    ``passages`` joined by newlines is ``documents``; ``id`` is "set-question" and says nothing about the row
    order.
    """
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    number = 0
    while len(rows) < num_rows:
        made = make_document_set(rng, FULL_TASK, held_out=True, max_per_kind=QUESTIONS_PER_KIND)
        if len(made.questions) >= MIN_QUESTIONS:
            rows += _rows(made, number)
            number += 1
    del rows[num_rows:]
    rng.shuffle(rows)
    return pl.DataFrame(rows)


def _rows(made: DocumentSet, number: int) -> list[dict[str, object]]:
    return [
        {
            "id": f"{number:03d}-{index:02d}",
            "passages": list(made.passages),
            "documents": made.documents,
            "question": question.text,
            "gold": question.answer,
            "kind": question.kind,
        }
        for index, question in enumerate(made.questions)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's table of questions.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    args.path.parent.mkdir(parents=True, exist_ok=True)
    quickstart_table(args.rows, args.seed).write_parquet(args.path)


if __name__ == "__main__":
    main()
