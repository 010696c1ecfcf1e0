"""The comparison of engines, on a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchllm.executor.trace import StepRecord, StepTrace, load_trace
from benchmarks import compare, floor, measured, real_workloads, startup, step_plot, table, workloads
from benchmarks.engines import EngineFailed, Interpreters, Workers, save_workload
from benchmarks.model import make_model
from benchmarks.report import Report
from benchmarks.result import EngineResult, common_start, equal_tokens
from benchmarks.worker import Settings
from benchmarks.workloads import Workload


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What one pair of the tiny workload printed and wrote; vLLM was asked for and is not there."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = ["--workloads", "tiny,documents", "--engines", "transformers,vllm", "--pairs", "1"]
    arguments += ["--data", str(folder / "nowhere"), "--out", str(folder / "report.json")]
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


def test_memory_is_the_process_s_own_and_has_a_bound(compared: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = compared
    (row,) = report["rows"]
    ours, run = row["ours"], row["pairs"][0]["runs"]["batchllm"]
    assert row["weights_bytes"] < 2**22 < run["rss_loading_bytes"] <= ours["rss_peak_bytes"]
    assert ours["rss_allowed_bytes"] == row["weights_bytes"] + row["kv_budget_bytes"] + 600 * 2**20
    assert ours["other_bytes"] == run["rss_peak_bytes"] - row["weights_bytes"] - ours["kv_peak_bytes"]
    assert ours["rss_within"] == (ours["rss_peak_bytes"] <= ours["rss_allowed_bytes"])


def made_pair(
    ours: float, vllm: float | None = None, cb: float | None = None, rss: int = 900
) -> dict[str, Any]:
    counted = "steps valleys kv_tokens_peak prompt_tokens_computed recomputed_tokens".split()
    parts = [f"{part}_seconds" for part in ("schedule", "prepare", "forward", "sample", "absorb")]
    figures = {
        "rss_peak_bytes": float(rss),
        "rss_loading_bytes": 700.0,
        **dict.fromkeys([*counted, *parts], 1.0),
    }
    runs = {"batchllm": EngineResult("batchllm", ours, [[1, 2]], figures)}
    for engine, seconds in (("vllm", vllm), ("transformers-cb", cb)):
        if seconds is not None:
            runs[engine] = EngineResult(engine, seconds, [[1, 3]], dict(figures))
    return measured.pair_of(runs, {} if vllm else {"vllm": "it did not start"}, 2.0)


def test_pairs_of_separate_runs_are_put_together(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    workload = {"workload": "x", "weights_bytes": 100, "kv_budget_bytes": 50, "kv_token_bytes": 2}
    for pair in (made_pair(4, cb=40), made_pair(4, vllm=8), made_pair(5, vllm=5, rss=950)):
        report = Report(path)
        report.note_starts({"batchllm": [1.0]}, {"batchllm": {"torch": "2"}})
        report.note_starts({"batchllm": [1.0, 2.0]}, {"batchllm": {"torch": "2"}})
        report.add(workload, pair)
    Report(path).add(workload, made_pair(2, vllm=3))
    saved = json.loads(path.read_text())
    (row,) = saved["rows"]
    assert row["ours"]["seconds"] == [4, 4, 5, 2] and row["ours"]["median_seconds"] == 4
    assert row["ours"]["rss_peak_bytes"] == 950 and row["ours"]["other_bytes"] == 950 - 100 - 2
    peers = {peer["name"]: peer for peer in row["peers"]}
    assert peers["transformers-cb"]["ratio"] == 10 and peers["transformers-cb"]["seconds"] == [40]
    assert peers["vllm"]["ratio"] == 1.5 and peers["vllm"]["ratio_spread"] == [1, 2]
    assert peers["vllm"]["equal_tokens"] == 0.5 and len(peers) == 2
    assert saved["startup_seconds"] == {"batchllm": [1, 2] * 3}
    with pytest.raises(ValueError, match="another workload x"):
        Report(path).add({**workload, "weights_bytes": 101}, made_pair(1))
    assert Report(path, ["x"]).add(workload, made_pair(1))["peers"] == [
        {"engine": "vllm", "failed": "it did not start"}
    ]


def test_cold_runs_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([4.0, 5.0, 20.0, 6.0])
    monkeypatch.setattr(startup.Commands, "__init__", lambda *_: None)
    monkeypatch.setattr(startup.Commands, "of", lambda *_: {engine: [] for engine in startup._ENGINES})
    monkeypatch.setattr(startup.Commands, "wall_seconds", lambda *_: next(taken))
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "report.json"), "--jobs", "one"]
    for engines, pairs in (("batchllm", 2), ("vllm", 1), ("batchllm", 1)):
        arguments = [*options, "--engines", engines, "--pairs", str(pairs)]
        run = CliRunner().invoke(startup.main, arguments, catch_exceptions=False)
        assert run.exit_code == 0, run.output
    (job,) = json.loads((tmp_path / "report.json").read_text())["jobs"].values()
    assert job["seconds"] == {"batchllm": [4, 5, 6], "vllm": [20]}
    assert job["ratio"] == {"vllm": {"median": 4, "spread": [3.33, 5]}}
    assert "vllm           20.00 s  1 runs   4.00 [3.33-5.00]" in run.output


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
    from benchmarks import load_overlap, rag

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
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {event["what"] for event in events} >= {"read", "decode", "compute"}
    steps = load_overlap.steps_of(events)
    assert len(steps) == runs["repair"][0]["steps"]
    assert all([event["layer"] for event in step] == [0, 1, 2] for step in steps)
    assert load_overlap.table(events) and load_overlap.timeline(events, 0, 2)


def test_hidden_loading_is_what_the_model_does_not_wait_for() -> None:
    from benchmarks.load_overlap import overlap

    times = [
        ("decode", 0.0, 2.0),
        ("decode", 2.0, 4.0),
        ("wait", 0.0, 1.0),
        ("compute", 1.5, 3.0),
        ("read", 9.0, 10.0),
    ]
    events = [{"what": what, "node": 0, "layer": 0, "begin": begin, "end": end} for what, begin, end in times]
    found = overlap(events)
    assert found["loading"] == 5 and found["while_layers_compute"] == 1.5
    assert found["while_waited_for"] == 1 and found["hidden_share"] == 0.8
