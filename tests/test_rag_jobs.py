"""The ready RAG jobs on the shipped example model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import exit_code_of, read_metrics, read_output

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@pytest.mark.parametrize("extra", [(), ("--set", "prompt.reorder=passages")], ids=["as given", "reordered"])
def test_precompute_and_answer(extra: tuple[str, ...], tmp_path: Path):
    here = ("--quiet", "--limit", 60, "--set", f"chunks.store={tmp_path / 'store'}")
    here += ("--set", f"output.path={tmp_path / 'out'}", *extra)
    assert exit_code_of("precompute", JOBS / "rag_precompute.yaml", *here) == 0
    assert exit_code_of("run", JOBS / "rag_answer.yaml", *here) == 0
    answers = read_output(tmp_path / "out")
    right = (answers["output"].str.strip_chars() == answers["gold"]).mean()
    assert right is not None and right >= 0.9
    metrics = read_metrics(tmp_path / "out")
    assert metrics["chunks"]["quality"]["exact_match"] >= 0.95
    assert metrics["prompt_tokens_computed"] < 0.35 * metrics["prompt_tokens"]
