"""metrics.json, the stopwatch, and the summary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from batchllm.report import stopwatch as stopwatch_module
from batchllm.report.metrics import RunMetrics, write_metrics
from batchllm.report.stopwatch import Stopwatch, rss_peak_bytes
from batchllm.report.summary import summary_text

METRICS = RunMetrics(
    rows_ok=6508,
    rows_error=3,
    rows_resumed=1200,
    prompt_tokens=12_345_678,
    prompt_tokens_computed=1_234_567,
    distinct_prompt_tokens=1_234_000,
    output_tokens=123_456,
    steps=100,
    wall_seconds=123.4,
    seconds={"model": 2.0, "load": 0.1, "tokenize": 12.0, "plan": 0.01, "run": 100.0, "write": 3.0},
    kv_budget_bytes=4 << 30,
    kv_peak_bytes=3 << 30,
    rss_peak_bytes=812 << 20,
    preemptions=3,
    predicted={"steps": 99, "prompt_tokens_computed": 1_234_000},
)


def test_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_metrics(path, replace(METRICS, steps=np.int64(7), kv_peak_bytes=np.int32(5)))
    found = json.loads(path.read_text())
    assert set(
        "rows_ok rows_error rows_resumed prompt_tokens prompt_tokens_computed distinct_prompt_tokens output_tokens "
        "steps wall_seconds seconds kv_budget_bytes kv_peak_bytes rss_peak_bytes preemptions predicted versions "
        "saved_fraction mean_output_tokens prompt_tokens_saved_by_reordering length_errors chunks "
        "without_kernels".split()
    ) == set(found)
    assert (found["steps"], found["kv_peak_bytes"]) == (7, 5)
    assert found["seconds"]["run"] == 100.0
    assert found["predicted"] == {"steps": 99, "prompt_tokens_computed": 1_234_000}
    assert {"batchllm", "python", "torch", "transformers", "pyarrow", "numpy", "platform"} <= set(
        found["versions"]
    )
    assert found["versions"]["numpy"] == np.__version__
    assert found["saved_fraction"] == pytest.approx(0.9, abs=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_figures_that_are_no_numbers_keep_the_file_valid(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_metrics(path, replace(METRICS, predicted={"seconds": float("nan"), "steps": float("inf")}))
    assert json.loads(path.read_text())["predicted"] == {"seconds": None, "steps": None}


def test_nothing_to_share() -> None:
    assert replace(METRICS, prompt_tokens=0, prompt_tokens_computed=0).saved_fraction == 0.0


def test_stopwatch_counts_every_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(stopwatch_module, "time", clock)
    watch = Stopwatch()
    clock.now = 1  # before any stage
    with watch.time("run"):
        clock.now = 3
        with watch.time("write"):
            clock.now = 7
        clock.now = 8
        assert watch.seconds() == {"run": 3, "write": 4}

    def failing() -> None:
        with watch.time("run"):
            clock.now = 10
            raise ValueError

    with pytest.raises(ValueError):
        failing()
    clock.now = 11
    assert watch.seconds() == {"run": 5, "write": 4}
    assert watch.wall_seconds == 11


def test_peak_memory_does_not_fall() -> None:
    before = rss_peak_bytes()
    block = np.ones(64 << 20, dtype=np.uint8)
    after = rss_peak_bytes()
    assert after >= block.nbytes
    assert after >= before > 1 << 20
    del block
    assert rss_peak_bytes() >= after - (1 << 20)  # the kernel counts in lumps


def test_summary() -> None:
    text = summary_text(METRICS, Path("/data/answers"))
    assert text.splitlines() == [
        "6,508 rows answered, 3 failed (1,200 of them in earlier runs)",
        "prompt tokens  12,345,678, computed 1,234,567 (90.0% saved by sharing)",
        "output tokens  123,456 (1,235/s; 124,691/s with the prompts)",
        "time           123.4 s: model 2.0, load 0.1, tokenize 12.0, run 100.0, write 3.0",
        "KV cache       3.0 GiB of 4.0 GiB at most; 3 preemptions",
        "memory         812 MiB at most",
        "answers        polars.read_parquet('/data/answers/*.parquet')",
        "failed rows    finish_reason is 'error'; the column error says why",
    ]


def test_summary_stays_on_a_screen() -> None:
    huge = {f"stage{i}": 12345.6 for i in range(12)}
    text = summary_text(replace(METRICS, seconds=huge, prompt_tokens=10**12), Path("/out"))
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) <= 80


def test_summary_of_less() -> None:
    metrics = replace(
        METRICS, rows_ok=0, rows_error=0, rows_resumed=0, prompt_tokens=0, prompt_tokens_computed=0, output_tokens=0,
        seconds={}, preemptions=0, kv_peak_bytes=0,
    )  # fmt: skip
    text = summary_text(metrics, Path("out"))
    assert text.startswith(
        "0 rows answered, 0 failed\nprompt tokens  0\noutput tokens  0\ntime           123.4 s\n"
    )
    assert "failed rows" not in text
    more = replace(METRICS, prompt_tokens=100, prompt_tokens_computed=120)
    assert "100, computed 120 (more than once: KV memory was short)" in summary_text(more, Path("out"))


def test_the_line_that_reads_the_answers_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "it's here"
    out.mkdir()
    pl.DataFrame({"a": [1]}).write_parquet(out / "part-00000.parquet")
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        line = next(x for x in summary_text(METRICS, out).splitlines() if x.startswith("answers"))
        expression = line.removeprefix("answers").strip()
        assert eval(expression, {"polars": pl}).rows() == [(1,)]
    assert "polars.read_parquet('out/*.parquet')" in summary_text(METRICS, Path("out"))


def test_summary_puts_the_prediction_beside_what_it_took() -> None:
    def line(**predicted: float) -> list[str]:
        text = summary_text(replace(METRICS, predicted=predicted), Path("/data"))
        return [line for line in text.splitlines() if "predicted" in line]

    assert line(seconds=93.04, calibrated=True) == ["run            predicted 93.0 s, took 100.0 s (-7%)"]
    assert line(seconds=150.0, calibrated=False) == [
        "run            predicted 150.0 s for a CPU like this one, took 100.0 s (+50%)"
    ]
    assert line(steps=3) == []


def test_summary_says_how_well_output_lengths_were_foreseen() -> None:
    planned = {"mean_expected": 64.0, "mean_absolute_error": 42.25, "bias": 1.9}
    refreshed = {"mean_expected": 24.0, "mean_absolute_error": 3.04, "bias": 0.1}
    metrics = replace(
        METRICS, mean_output_tokens=22.04, length_errors={"planned": planned, "refreshed": refreshed}
    )
    (line,) = [line for line in summary_text(metrics, Path("/data")).splitlines() if "lengths" in line]
    assert line == "lengths        22.0 tokens on average, planned 64.0; off by 42.2, later 3.0"
    assert "lengths" not in summary_text(replace(METRICS, length_errors={"planned": {}}), Path("/data"))
