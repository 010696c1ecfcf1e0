"""benchmarks/gpu with a handful of tokens on a CPU: every part runs and says what it says on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu import script


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    outcome = CliRunner().invoke(script.main, ["--dry-run", "--out", str(out)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(out.read_text())
    assert report["left_out"] == []
    assert report["checks"]["greedy tokens equal the CPU's"]
    errors = report["checks"]["errors of logits, tiny"]
    assert errors["ours"] < 1e-5 and errors["torch"] < 1e-5
    assert len(report["attention"]) == 2 and all(case["times_torch"] > 0 for case in report["attention"])
    jobs = {row["workload"]: row for row in report["jobs"]}
    assert set(jobs) == {"groups", "nothing shared", "three levels", "decode-heavy"}
    assert jobs["groups"]["ours"]["prompt_tokens_computed"] == 2 * 40 + 8 * 6
    assert jobs["groups"]["times_transformers"] > 0 and jobs["nothing shared"]["of_plain_path"] > 0
    assert jobs["decode-heavy"]["ours"]["decode_launched"] > 0
    assert report["profile"]["products"] > 0
    for said in ("of floor", "x transformers", "of plain path", "profile: idle"):
        assert said in outcome.output
    assert max(map(len, outcome.output.splitlines())) <= 140


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    outcome = CliRunner().invoke(
        script.main, ["--dry-run", "--minutes", "0.01", "--out", str(out)], catch_exceptions=False
    )
    assert outcome.exit_code == 0
    assert "tiny, groups: no time" in json.loads(out.read_text())["left_out"]
    assert "left out: tiny, groups: no time" in outcome.output
