"""Saved shares of real data sets, planned from their tokens, beside those that their README states.

    python -m benchmarks.real_sets ../shared/data                    # all, in 10 s
    python -m benchmarks.real_sets ../shared/data --sets squad,react

Tokens are those of the phi-3-mini tokenizer. Tolerance 0.001.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from batchllm.core import PromptTable, RequestTable, SamplingParams
from batchllm.dataset.line_encoder import line_encoder
from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.planner.plan import PlanOptions, draft_plan
from batchllm.planner.savings import computed_tokens

_RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.001


def bbh(data: Path, only: str = "*") -> list[str]:
    """3 shots of the task, then the question."""
    prompts = []
    for task in sorted((data / "bbh" / "tasks").glob(f"{only}.json")):
        text = (data / "bbh" / "cot-prompts" / f"{task.stem}.txt").read_text(encoding="utf-8")
        shots = text.split("-----\n", 1)[1].rstrip("\n")
        for example in json.loads(task.read_text(encoding="utf-8"))["examples"]:
            prompts.append(f"{shots}\n\nQ: {example['input']}\nA: Let's think step by step.")
    return prompts


def gsm8k(data: Path) -> list[str]:
    """The 8 shots of the yaml, then the question."""
    task = yaml.safe_load((data / "gsm8k" / "gsm8k-cot.yaml").read_text(encoding="utf-8"))
    samples = task["fewshot_config"]["samples"]
    shots = "".join(f"Q: {s['question']}\nA: {s['target']}\n\n" for s in samples)
    return [f"{shots}Q: {row['question']}\nA:" for row in _jsonl(data / "gsm8k" / "test.jsonl")]


def squad(data: Path) -> list[str]:
    """Document first, question last."""
    found = json.loads((data / "squad2" / "dev-v2.0.json").read_text(encoding="utf-8"))
    return [
        f"{paragraph['context']}\n\nQuestion: {question['question']}\nAnswer:"
        for article in found["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def agieval(data: Path, task: str) -> list[str]:
    """Passage first."""
    return [
        f"Passage: {row['passage']}\n\nQuestion: {row['question']}\n"
        + "\n".join(row["options"])
        + "\nAnswer:"
        for row in _jsonl(data / "agieval" / f"{task}.jsonl")
    ]


def react(data: Path) -> list[str]:
    """6 shots, then a HotpotQA question."""
    shots = json.loads((data / "react" / "prompts_naive.json").read_text(encoding="utf-8"))[
        "webthink_simple6"
    ]
    rows = json.loads((data / "react" / "hotpot_dev_v1_simplified.json").read_text(encoding="utf-8"))
    return [f"{shots}Question: {row['question']}\nThought 1:" for row in rows]


def chat_turn(prompt: str) -> str:
    """As Phi-3's chat template writes one message of a user, and the beginning of the answer."""
    return f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n"


def agent_runs(data: Path) -> list[list[str]]:
    """Every step of each run: the shots, the question, and what came before."""
    shots = json.loads((data / "react" / "prompts_naive.json").read_text(encoding="utf-8"))[
        "webthink_simple6"
    ]
    runs = []
    for run in _jsonl(data / "sglang_bench" / "react_hotpotqa_100.jsonl"):
        for question, steps in run.items():
            prompts, text = [], f"{shots}{question}\n"
            for number, step in enumerate(steps, 1):
                prompts.append(f"{text}Thought {number}:")
                text += f"Thought {number}: {step['thought']}\nAction {number}: {step['action']}\n"
                text += f"Observation {number}: {step['observation']}\n"
            runs.append([*prompts, f"{text}Thought {len(steps) + 1}:"])
    return runs


def agents(data: Path) -> list[str]:
    """All steps of all runs."""
    return [prompt for run in agent_runs(data) for prompt in run]


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# Name → (stated saved share, at least and at most; prompts). AGIEval's is stated as 0.51-0.72, two digits only.
SETS: dict[str, tuple[float, float, Callable[[Path], list[str]]]] = {
    "bbh": (0.917, 0.917, bbh),
    "gsm8k": (0.916, 0.916, gsm8k),
    "squad": (0.835, 0.835, squad),
    "agieval-lsat-ar": (0.505, 0.725, lambda data: agieval(data, "lsat-ar")),
    "agieval-lsat-rc": (0.505, 0.725, lambda data: agieval(data, "lsat-rc")),
    "agieval-sat-en": (0.505, 0.725, lambda data: agieval(data, "sat-en")),
    # Stated for 7405 rows, not how a prompt ends: plain text comes to 0.9848, a turn of the chat template to 0.9837.
    "react": (0.983, 0.983, react),
    "react-chat": (0.983, 0.983, lambda data: [chat_turn(prompt) for prompt in react(data)]),
    "react-1000": (0.983, 0.983, lambda data: react(data)[:1000]),
    "react-500": (0.983, 0.983, lambda data: react(data)[:500]),
    "agents": (0.935, 0.935, agents),
}


def tokenized(prompts: list[str], data: Path) -> PromptTable:
    """As a job tokenises them, without special tokens in front."""
    tokenizer = load_tokenizer(str(data / "tokenizers" / "phi-3-mini"))
    by_line = line_encoder(tokenizer)
    if by_line is None:
        raise click.ClickException("this version of the tokenizer cannot be used line by line")
    rows: list[np.ndarray] = []
    for low in range(0, len(prompts), 1000):
        rows += [np.array(ids, np.int32) for ids in by_line.encode(prompts[low : low + 1000], False)]
    offsets = np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64)
    same = np.zeros(len(rows), dtype=np.int32)
    return PromptTable(np.concatenate(rows), offsets, (SamplingParams(),), same, {})


def shares(prompts: PromptTable) -> dict[str, float]:
    """Of the tokens of all prompts, what each way of sharing saves."""
    rows = prompts.num_rows
    requests = RequestTable(np.arange(rows), np.zeros(rows, np.int32), np.zeros((rows, 2), np.uint64))
    found = computed_tokens(draft_plan(prompts, requests, np.ones(rows, dtype=bool), PlanOptions()))
    names = ("first_level", "published_rule", "best_single_level", "kept_nodes", "optimum")
    return {name: round(found.saved_share(getattr(found, name)), 4) for name in names}


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--sets", "names", default=",".join(SETS), help="comma-separated")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-real-sets.json"
)
def main(data: Path, names: str, out: Path | None) -> None:
    """Prints a table and whether every share is the stated one."""
    rows = []
    for name in names.split(","):
        low, high, make = SETS[name]
        begin = time.perf_counter()
        prompts = tokenized(make(data), data)
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        saved = shares(prompts)
        rows.append(
            {
                "set": name,
                "rows": prompts.num_rows,
                "tokens": len(prompts.tokens),
                "stated": low if low == high else [low, high],
                "as_stated": low - TOLERANCE <= saved["optimum"] <= high + TOLERANCE,
                **saved,
                "seconds_tokenizing": round(seconds, 1),
                "seconds_planning": round(time.perf_counter() - begin, 2),
            }
        )
        click.echo(json.dumps(rows[-1]))
    report = {"date": date.today().isoformat(), "sets": rows}
    target = out or _RESULTS / f"{report['date']}-real-sets.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
