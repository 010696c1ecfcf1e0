"""BIG-Bench-Hard as 3-shot prompts through a whole job: every shared token is computed once, in little memory too."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig

from tests.executor.tiny_models import make_model
from tests.jobs import exit_code_of, make_job, read_metrics, read_output

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TOKENIZER = DATA / "tokenizers" / "phi-3-mini"
BBH = DATA / "bbh"
# Of the 27 tasks, those whose shots are about equally long (500 to 1000 tokens): 15% of all of them is then room for
# a little more than one.
TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa hyperbaton movie_recommendation
    multistep_arithmetic_two navigate object_counting reasoning_about_colored_objects snarks web_of_lies""".split()
ROWS_PER_TASK = 25
KV_TOKEN_BYTES = 2 * 8 * 4  # of the model below: K and V, one head of 8, float32

pytestmark = pytest.mark.skipif(
    not (TOKENIZER.is_dir() and BBH.is_dir()), reason="../shared/data has no bbh and phi-3-mini"
)


def shots_of(task: str) -> str:
    text = (BBH / "cot-prompts" / f"{task}.txt").read_text(encoding="utf-8")
    return text.split("-----\n", 1)[1].rstrip("\n")


def shuffled_rows() -> list[dict[str, Any]]:
    rows = []
    for task in TASKS:
        examples = json.loads((BBH / "tasks" / f"{task}.json").read_text(encoding="utf-8"))["examples"]
        for number, example in enumerate(examples[:ROWS_PER_TASK]):
            question = f"{shots_of(task)}\n\nQ: {example['input']}\nA: Let's think step by step."
            rows.append({"id": f"{task}-{number}", "prompt": question, "task": task})
    random.Random(0).shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as a model with this vocabulary can be."""
    folder = tmp_path_factory.mktemp("bbh") / "model"
    config = LlamaConfig(
        vocab_size=32064,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=32000,
    )
    make_model(config).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "special")):
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("share", [None, 0.15], ids=["ample memory", "15% of all prefixes"])
def test_every_shared_token_is_computed_once(model: Path, tmp_path: Path, share: float | None) -> None:
    rows = shuffled_rows()
    engine: dict[str, Any] = {"kv_memory": "64MiB", "min_shared_tokens": "auto"}
    if share is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        prefix_tokens = sum(len(tokenizer(shots_of(task))["input_ids"]) for task in TASKS)
        engine["kv_memory"] = int(share * prefix_tokens) * KV_TOKEN_BYTES
    job = make_job(tmp_path, model, rows, generate={"max_tokens": 2}, engine=engine)
    assert exit_code_of("run", job, "--quiet") == 0
    table, metrics = read_output(tmp_path / "out"), read_metrics(tmp_path / "out")
    assert table["id"].to_list() == [row["id"] for row in rows]
    assert metrics["rows_ok"] == len(rows)
    assert metrics["prompt_tokens"] == table["prompt_tokens"].sum()
    assert metrics["prompt_tokens_computed"] <= 1.01 * metrics["distinct_prompt_tokens"]
    assert metrics["prompt_tokens_computed"] < 0.2 * metrics["prompt_tokens"]
    assert metrics["kv_peak_bytes"] <= metrics["kv_budget_bytes"]
