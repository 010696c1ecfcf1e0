"""Saved shares of real sets as their README states them. BBH and all of ReAct take longer: see benchmarks.real_sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.real_sets import SETS, TOLERANCE, shares, tokenized

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDERS = {"agents": "sglang_bench", "squad": "squad2", "react-500": "react"}

pytestmark = pytest.mark.skipif(
    not (DATA / "tokenizers" / "phi-3-mini" / "tokenizer.json").exists(),
    reason="there is no ../shared/data here",
)


@pytest.mark.parametrize("name", ["gsm8k", "squad", "react-500", "agents"])
def test_the_saved_share_is_the_stated_one(name):
    pytest.importorskip("tokenizers")
    stated, _, make = SETS[name]
    assert stated == stated_share(FOLDERS.get(name, name))
    saved = shares(tokenized(make(DATA), DATA))
    assert saved["optimum"] == pytest.approx(stated, abs=TOLERANCE)
    assert saved["first_level"] <= saved["best_single_level"] <= saved["optimum"]
    assert saved["published_rule"] <= saved["best_single_level"]
    assert saved["kept_nodes"] > saved["optimum"] - 0.01, "folding short prefixes costs next to nothing"


def test_agievals_tasks_span_the_stated_range():
    pytest.importorskip("tokenizers")
    tasks = ("agieval-lsat-ar", "agieval-lsat-rc", "agieval-sat-en")
    found = [round(shares(tokenized(SETS[task][2](DATA), DATA))["optimum"], 2) for task in tasks]
    assert (min(found), max(found)) == (0.51, 0.72)


def stated_share(folder: str) -> float:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| {folder}/ "))
    return float(re.findall(r"0\.\d+", row)[-1])
