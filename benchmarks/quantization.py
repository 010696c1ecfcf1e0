"""What int8 costs in quality: the example model's answers to held-out questions, and its logits, with and without.

    python -m benchmarks.quantization --sets 60

Exact match is of BatchLLM's greedy answers. Logits are compared where the right answer is given to the model token by
token: mean Kullback-Leibler divergence from the plain float32 model, and how often the likeliest token is the same.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from batchllm import LLM, SamplingParams
from batchllm.executor.model import prepare_model
from batchllm.executor.quantize import QUANTIZATIONS, quantize_model
from batchllm.versions import versions

_RESULTS = Path(__file__).parent / "results"
_PASSAGES = Path(__file__).resolve().parents[1] / "examples" / "passages"
_MODEL = str(_PASSAGES / "model")
sys.path.insert(0, str(_PASSAGES))

from evaluate import MAX_NEW_TOKENS, Item, exact_match, held_out_items  # noqa: E402


@click.command()
@click.option("--sets", default=60, help="Document sets, of some seven questions each.")
@click.option("--seed", default=20)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSON file; default: results/")
def main(sets: int, seed: int, out: Path | None) -> None:
    """Compares number formats and quantisations on the model in examples/passages."""
    items = held_out_items(sets, seed)
    reference = _answer_logits(items, "float32", None)
    rows = []
    for dtype in ("float32", "bfloat16"):
        for mode in (None, *QUANTIZATIONS):
            rows.append(_measure(items, reference, dtype, mode))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = {"date": date.today().isoformat(), "versions": versions(), "questions": len(items), "rows": rows}
    path = out or _RESULTS / f"{date.today().isoformat()}-quantization.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def _measure(items: list[Item], reference: Tensor, dtype: str, mode: str | None) -> dict[str, Any]:
    llm = LLM(_MODEL, dtype=dtype, quantize=mode)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    outputs = llm.chat([_messages(item) for item in items], greedy, use_tqdm=False)
    right, asked = exact_match(items, [output.outputs[0].text for output in outputs])["all"]
    logits = _answer_logits(items, dtype, mode)
    divergence = kl_div(logits, reference, log_target=True, reduction="none").sum(dim=-1)
    return {
        "dtype": dtype,
        "quantize": mode or "none",
        "exact_match": round(right / asked, 4),
        "mean_kl": float(f"{divergence.mean().item():.3g}"),
        "top1_agreement": round((logits.argmax(-1) == reference.argmax(-1)).float().mean().item(), 5),
        "answer_tokens": len(logits),
    }


@torch.inference_mode()
def _answer_logits(items: list[Item], dtype: str, mode: str | None) -> Tensor:
    """Log-probabilities [answer tokens, vocabulary] of every token of every right answer, end of sequence included."""
    runner = prepare_model(AutoModelForCausalLM.from_pretrained(_MODEL, dtype=getattr(torch, dtype)))
    if mode:
        quantize_model(runner, mode)
    model = runner.model
    model.set_attn_implementation("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    rows = []
    for item in items:
        prompt = tokenizer.apply_chat_template(_messages(item), add_generation_prompt=True, return_dict=False)
        answer = tokenizer(item.gold, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*prompt, *answer]]), logits_to_keep=len(answer) + 1).logits[0]
        rows.append(log_softmax(logits.float(), dim=-1))
    return torch.cat(rows)


def _messages(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{item.documents}\nQuestion: {item.question}"}]


if __name__ == "__main__":
    main()
