"""benchmarks/gpu with a handful of tokens on a CPU: every part runs and says what it says on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchllm.executor.device import Gpu, Placement
from benchmarks.gpu import checks, clock, script
from benchmarks.gpu.models import make_model
from tests.executor.fake_cuda import FakeCuda


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    outcome = CliRunner().invoke(script.main, ["--dry-run", "--out", str(out)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(out.read_text())
    assert report["left_out"] == []
    assert report["checks"]["greedy tokens equal the CPU's"]
    assert report["checks"]["decode steps"]["launched"] >= 19
    errors = report["checks"]["errors of logits, tiny"]
    assert errors["own_forward"], "what was timed"
    assert errors["ours"] < 1e-5 and errors["torch"] < 1e-5
    assert len(report["attention"]) == 2 and all(case["times_torch"] > 0 for case in report["attention"])
    assert not any(case["by_graph"] or case["torch_by_graph"] for case in report["attention"])
    jobs = {row["workload"]: row for row in report["jobs"]}
    assert set(jobs) == {"groups", "nothing shared", "three levels", "decode-heavy"}
    assert all(row["ours"]["own_forward"] for row in jobs.values())
    assert jobs["groups"]["ours"]["prompt_tokens_computed"] == 2 * 40 + 8 * 6
    assert jobs["groups"]["times_transformers"] > 0 and jobs["nothing shared"]["of_plain_path"] > 0
    assert jobs["decode-heavy"]["ours"]["decode_launched"] > 0
    assert report["profile"]["products"] > 0
    for said in ("of floor", "x transformers", "of plain path", "profile: idle"):
        assert said in outcome.output
    assert max(map(len, outcome.output.splitlines())) <= 140


def test_calls_are_timed_as_replays_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for torch.cuda, whose graphs run nothing."""
    cuda, calls = FakeCuda(), []
    cuda.patch(monkeypatch)
    timing = clock.device_seconds_of(lambda: calls.append(1), torch.device("cuda"), 40)
    assert timing.by_graph and len(calls) == 2 + 20, "set up, watched, then recorded"

    def waiting() -> None:
        calls.append(1)
        cuda.wait()

    calls.clear()
    timing = clock.device_seconds_of(waiting, torch.device("cuda"), 40)
    assert not timing.by_graph and len(calls) == 2 + 1 + 40


def test_logits_are_of_the_modules_that_were_timed() -> None:
    placement = Placement(Gpu("dry run", True, 1 << 40, torch.device("cpu")))
    runner = checks._runner(make_model("tiny", placement.device, torch.float32), placement)
    runner.unfuse()
    assert [checks.logit_errors(runner, fused)["own_forward"] for fused in (False, True)] == [False, True]
    assert not runner.fused


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    outcome = CliRunner().invoke(
        script.main, ["--dry-run", "--minutes", "0.01", "--out", str(out)], catch_exceptions=False
    )
    assert outcome.exit_code == 0
    assert "tiny, groups: no time" in json.loads(out.read_text())["left_out"]
    assert "left out: tiny, groups: no time" in outcome.output
