"""The comparison of engines, on a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchllm.executor.trace import StepRecord, StepTrace, load_trace
from benchmarks import compare, floor, real_workloads, step_plot, table, workloads
from benchmarks.engines import EngineFailed, Interpreters, Workers, save_workload
from benchmarks.model import make_model
from benchmarks.result import EngineResult, common_start, equal_tokens
from benchmarks.worker import Settings
from benchmarks.workloads import Workload


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What one pair of the tiny workload printed and wrote; vLLM was asked for and is not there."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = ["--workloads", "tiny,documents", "--engines", "transformers,vllm", "--pairs", "1"]
    arguments += ["--no-memory", "--data", str(folder / "nowhere"), "--out", str(folder / "report.json")]
    environment = {"BATCHLLM_VLLM_PYTHON": None, "OMP_NUM_THREADS": "1"}
    run = CliRunner().invoke(
        compare.main, [*arguments, "--traces", str(folder)], env=environment, catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    return run.output, json.loads((folder / "report.json").read_text()), folder


def test_engines_give_the_same_tokens_and_are_timed(compared: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = compared
    (row,) = report["rows"]
    ours, peer = row["ours"], row["peers"][0]
    assert peer["engine"].startswith("transformers") and peer["equal_tokens"] == peer["common_start"] == 1
    assert peer["ratio"] == pytest.approx(peer["seconds"][0] / ours["seconds"][0], abs=0.2, rel=0.2)
    assert ours["prompt_tokens_computed"] == row["distinct_prompt_tokens"] == 2 * 64 + 8 * 8
    assert 0 < ours["outside_forward"] < 1
    assert set(report["startup_seconds"]) == {"batchllm", "transformers"}
    assert report["versions"]["engines"]["batchllm"]["torch"]


def test_what_cannot_run_is_said_and_the_rest_goes_on(compared: tuple[str, dict[str, Any], Path]) -> None:
    output, report, _ = compared
    assert "--vllm-python" in report["rows"][0]["peers"][1]["failed"]
    assert "documents" in output and "left out: no data" in output
    assert max(len(line) for line in table.HEADER.splitlines()) <= 100
    assert len(table.lines(report["rows"][0])[0]) <= 100


def test_our_steps_are_kept_and_can_be_drawn(compared: tuple[str, dict[str, Any], Path]) -> None:
    _, report, folder = compared
    records = load_trace(folder / "tiny.parquet")
    assert len(records) == report["rows"][0]["ours"]["steps"]
    assert step_plot.summary(records).startswith(f"{len(records)} steps, 0 at least half full, 0 valleys")
    pytest.importorskip("matplotlib")
    step_plot.draw(records, "tiny", folder / "tiny.png")
    assert (folder / "tiny.png").stat().st_size > 1000


def test_engines_are_stopped_when_they_do_not_work(tmp_path: Path) -> None:
    workload = workloads.make("tiny")
    settings = Settings(str(make_model(tmp_path / "model", workload.model)), 1 << 24, 512)
    with Workers(Interpreters(), tmp_path) as workers:
        done = workers.run("transformers", settings, save_workload(workload, tmp_path))
        assert [len(answer) for answer in done.tokens] == [workload.max_tokens] * len(workload.prompts)
        (process,) = workers.process_ids
        assert _is_stopped(process)
        too_large = Workload("too-large", [[10**6]], 2)
        with pytest.raises(EngineFailed, match="transformers: IndexError"):
            workers.run("transformers", settings, save_workload(too_large, tmp_path))
        assert workers.run("transformers", settings, save_workload(workload, tmp_path)).tokens == done.tokens
    assert not Path(f"/proc/{process}").exists()


def _is_stopped(process: int) -> bool:
    """Soon: a signal takes a moment."""
    for _ in range(200):
        if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
            return True
        time.sleep(0.05)
    return False


def test_three_levels_share_what_they_are_made_of() -> None:
    workload = workloads.make("three_levels")
    assert {len(prompt) for prompt in workload.prompts} == {512 + 512 + 256 + 32}
    assert len(workload.prompts) == 6 * 8 * 4
    work = floor.products(workload)
    assert work.distinct_prompt_tokens == 512 + 6 * 512 + 6 * 8 * 256 + 192 * 32
    assert work.logit_tokens == 192 * 32
    assert work.layer_tokens == work.distinct_prompt_tokens + 192 * 31


def test_a_repeated_prompt_is_no_work() -> None:
    once, twice = Workload("", [[5, 6, 7], [5, 6, 8]], 4), Workload("", [[5, 6, 7], [5, 6, 8], [5, 6, 7]], 4)
    assert floor.products(once) == floor.products(twice)
    assert floor.products(once).distinct_prompt_tokens == 4


def test_the_starved_workload_holds_a_quarter_of_its_prefixes() -> None:
    starved = workloads.make("kv_starved")
    assert starved.kv_tokens is not None
    assert starved.kv_tokens * 4 == len({tuple(prompt[:1024]) for prompt in starved.prompts}) * 1024


def test_equal_tokens_and_common_start() -> None:
    ours, other = EngineResult("", 1, [[1, 2, 3, 4], [5, 6]]), EngineResult("", 1, [[1, 9, 3, 4], [5, 6]])
    assert equal_tokens(ours, other) == pytest.approx(5 / 6)
    assert common_start(ours, other) == pytest.approx(3 / 6)


@pytest.mark.skipif(not real_workloads.DATA.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("name", real_workloads.NAMES)
def test_real_text_is_the_same_each_time_and_within_the_vocabulary(name: str) -> None:
    workload = real_workloads.make(name)
    assert workload == real_workloads.make(name)
    assert 100 < len(workload.prompts) < 600
    assert max(map(max, workload.prompts)) < workloads.VOCABULARY
    assert floor.products(workload).distinct_prompt_tokens < workload.prompt_tokens / 5


def test_a_plot_counts_the_steps_that_are_half_empty_while_others_wait() -> None:
    fields = dict.fromkeys(StepRecord.__dataclass_fields__, 1)
    valley = StepRecord(**{**fields, "prompt_tokens": 10, "budget_tokens": 100, "waiting": 3})
    last = StepRecord(**{**fields, "prompt_tokens": 10, "budget_tokens": 100, "waiting": 0})
    full = StepRecord(**{**fields, "prompt_tokens": 60, "budget_tokens": 100, "waiting": 3})
    trace = StepTrace()
    trace.records = [full, valley, last]
    assert trace.valleys == 1
    assert step_plot.summary(trace.records).startswith("3 steps, 1 at least half full, 1 valleys")


def test_evals_scores_as_the_harness_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    pytest.importorskip("accelerate", reason="the harness's hf model class needs accelerate")
    from benchmarks import evals

    rows = [
        {"passage": "", "question": f"What is {n}?", "options": ["(A)one", "(B)two"], "label": "AB"[n % 2]}
        for n in range(8)
    ]
    (tmp_path / "agieval").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "agieval" / "sums.jsonl").write_text(text)
    model = Path(__file__).parents[1] / "examples" / "passages" / "model"
    arguments = ["--tasks", "sums:letters,sums:texts", "--batch-sizes", "1,2", "--dtype", "float32"]
    paths = ["--folder", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    done = CliRunner().invoke(evals.main, [*arguments, *paths], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["documents"] == 6
    assert report["requests"] == 12
    assert report["hf"]["largest_difference"] < 1e-4
    assert report["hf"]["same_choice"] == 1.0
    assert report["prompt_tokens_computed"] < report["prompt_tokens"]


def test_rag_benchmark_runs_small(tmp_path: Path) -> None:
    from benchmarks import rag

    small = (
        "--rows 6 --passages 6 --passage-tokens 24 --shown 2 --output-tokens 2 --pairs 1 --model tiny-float32"
    )
    out, trace = tmp_path / "rag.json", tmp_path / "trace.jsonl"
    arguments = [*small.split(), "--out", str(out), "--trace", str(trace)]
    found = CliRunner().invoke(rag.main, arguments)
    assert found.exit_code == 0, found.output
    runs = json.loads(out.read_text())["runs"]
    computed = {mode: runs[mode][0]["prompt_tokens_computed"] for mode in ("prefix", "repair", "naive")}
    assert computed["naive"] < computed["repair"] < computed["prefix"]
    assert {json.loads(line)["what"] for line in trace.read_text().splitlines()} >= {"read", "decode"}
