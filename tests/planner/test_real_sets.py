"""Saved shares of real sets as their README states them, all rows of each; see also benchmarks.real_sets."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from batchllm.core import PromptTable
from benchmarks.real_sets import SETS, TOLERANCE, shares, tokenized

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDERS = {"agents": "sglang_bench", "squad": "squad2", "react-chat": "react"}

pytestmark = pytest.mark.skipif(
    not (DATA / "tokenizers" / "phi-3-mini" / "tokenizer.json").exists(),
    reason="there is no ../shared/data here",
)


@pytest.mark.parametrize("name", ["bbh", "gsm8k", "squad", "react-chat", "agents"])
def test_the_saved_share_is_the_stated_one(name):
    stated, _, make = SETS[name]
    assert stated == stated_share(FOLDERS.get(name, name))
    prompts = tokenized(make(DATA), DATA)
    saved = shares(prompts)
    assert saved["optimum"] == pytest.approx(stated, abs=TOLERANCE)
    assert saved["optimum"] == counted_share(prompts)
    assert saved["first_level"] <= saved["best_single_level"] <= saved["optimum"]
    assert saved["published_rule"] <= saved["best_single_level"]
    assert saved["kept_nodes"] > saved["optimum"] - 0.01, "folding short prefixes costs next to nothing"


def test_agievals_tasks_span_the_stated_range():
    tasks = ("agieval-lsat-ar", "agieval-lsat-rc", "agieval-sat-en")
    found = [round(shares(tokenized(SETS[task][2](DATA), DATA))["optimum"], 2) for task in tasks]
    assert (min(found), max(found)) == (0.51, 0.72)


def test_react_as_plain_text_shares_more_the_more_rows_there_are():
    """0.983 is stated without the text of a prompt. The turn of a chat template (above) has it for all rows; as plain
    text a thousand rows have it, and all of them more, which a count that knows no tree confirms."""
    prompts = tokenized(SETS["react"][2](DATA), DATA)
    saved = shares(prompts)["optimum"]
    assert saved == counted_share(prompts) == 0.9848
    for name in ("react-1000", "react-500"):
        fewer = shares(tokenized(SETS[name][2](DATA), DATA))["optimum"]
        assert fewer == pytest.approx(stated_share("react"), abs=TOLERANCE)
        assert fewer < saved


def counted_share(prompts: PromptTable) -> float:
    """From Python's own sort: of each prompt, what it has in common with the one before is saved."""
    rows = [prompts.tokens[low:high] for low, high in pairwise(prompts.offsets.tolist())]
    rows.sort(key=lambda row: row.astype(">u4").tobytes())
    saved = 0
    for before, row in pairwise(rows):
        n = min(len(before), len(row))
        differs = before[:n] != row[:n]
        saved += int(differs.argmax()) if differs.any() else n
    return round(saved / len(prompts.tokens), 4)


def stated_share(folder: str) -> float:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| {folder}/ "))
    return float(re.findall(r"0\.\d+", row)[-1])
