"""`plan.sample_rows`: some rows run first, every answer is as ever, and the rest is planned with lengths that came."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchllm.executor.engine import Engine
from batchllm.planner.plan_file import read_plan
from tests.forked_runs import ForkedRuns
from tests.jobs import exit_code_of, make_job, questions, read_metrics, read_output, texts

ROWS, SAMPLED = 60, 15
# Every fourth token ends an answer, so answers are far shorter than they may be.
GENERATE = {"max_tokens": 64, "temperature": 1.0, "stop_token_ids": list(range(0, 256, 4))}
SAMPLE = ("--set", f"plan.sample_rows={SAMPLED}")


def run(job: Path, *arguments: object) -> dict[tuple[str, int], str]:
    assert exit_code_of("run", job, "--quiet", *arguments) == 0
    return texts(job.parent / "out")


def requests_planned(out: Path, name: str) -> set[int]:
    return set(read_plan(out / "_run" / name).request.tolist())


def test_the_same_answers_and_better_expectations(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS), generate=GENERATE)
    out = tmp_path / "out"
    expected = run(job)
    before = read_metrics(out)
    assert not (out / "_run" / "plan-sample.parquet").exists()
    shutil.rmtree(out)
    assert run(job, *SAMPLE) == expected
    metrics = read_metrics(out)
    sample, rest = requests_planned(out, "plan-sample.parquet"), requests_planned(out, "plan.parquet")
    assert len(sample) == SAMPLED
    assert sample | rest == set(range(ROWS))
    assert not sample & rest
    for figure in ("prompt_tokens", "output_tokens", "mean_output_tokens", "distinct_prompt_tokens"):
        assert metrics[figure] == before[figure]
    assert metrics["steps"] > before["steps"], "both plans count"
    assert before["predicted"]["output_tokens"] == 64 * ROWS
    of_rest = metrics["predicted"]["output_tokens"] - 64 * SAMPLED
    assert of_rest == pytest.approx(metrics["output_tokens"] * (1 - SAMPLED / ROWS), rel=0.5)
    assert metrics["predicted"]["seconds"] > 0
    planned = {
        name: found["length_errors"]["planned"] for name, found in (("cold", before), ("warm", metrics))
    }
    assert planned["cold"]["mean_expected"] == 64
    assert planned["warm"]["mean_absolute_error"] < 0.5 * planned["cold"]["mean_absolute_error"]
    refreshed = before["length_errors"]["refreshed"]
    assert refreshed["mean_absolute_error"] < planned["cold"]["mean_absolute_error"]


def test_an_interrupted_run_goes_on_with_the_sample_it_began(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, model_folder, questions(ROWS), generate=GENERATE)
    out = tmp_path / "out"
    expected = run(job, *SAMPLE)
    sample = requests_planned(out, "plan-sample.parquet")
    shutil.rmtree(out)

    original = Engine.run
    for answers_before_the_end in (5, 30):
        given = 0

        def interrupted(engine: Engine, most: int = answers_before_the_end) -> Iterator[list[Any]]:
            nonlocal given
            for finished in original(engine):
                given += len(finished)
                yield finished
                if given >= most:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Engine, "run", interrupted)
        assert exit_code_of("run", job, "--quiet", *SAMPLE) == 130
        answered = texts(out)
        assert all(expected[answer] == text for answer, text in answered.items())
        ids = {f"row-{request}" for request in sample}
        if answers_before_the_end == 5:
            assert {id_ for id_, _ in answered} < ids, "nothing but the sample has been run"
        else:
            assert ids < {id_ for id_, _ in answered}, "the sample is finished, the rest is not"
    monkeypatch.setattr(Engine, "run", original)
    assert run(job, *SAMPLE) == expected
    # The sample was done, so all the rest is one plan, made with the lengths of the answers found in the folder.
    planned = read_metrics(out)["length_errors"]["planned"]
    assert planned["mean_expected"] < 16


def test_killed_at_any_moment_every_row_is_answered_once(model_folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    output = {"part_rows": 7, "flush_seconds": 0.02}
    sections = {"generate": {**GENERATE, "n": 2}, "output": output, "plan": {"sample_rows": SAMPLED}}
    job = make_job(tmp_path, model_folder, questions(ROWS), **sections)
    out = tmp_path / "out"
    with ForkedRuns() as runs:
        code, duration = runs.run(job)
        assert code == 0
        expected = texts(out)
        shutil.rmtree(out)
        for _ in range(4):
            code, _ = runs.run(job, {"after": random.uniform(0.1, duration)})
            assert code in (None, 0)
            if list(out.glob("*.parquet")):
                assert all(expected[answer] == text for answer, text in texts(out).items())
        assert runs.run(job)[0] == 0
    assert texts(out) == expected
    assert read_output(out)["id"].to_list() == [f"row-{row}" for row in range(ROWS) for _ in range(2)]


def test_overwrite_leaves_no_plan_of_a_sample(model_folder: Path, tmp_path: Path) -> None:
    run(make_job(tmp_path, model_folder, questions(20), generate=GENERATE), *SAMPLE)
    out = tmp_path / "out"
    assert (out / "_run" / "plan-sample.parquet").exists()
    other = make_job(tmp_path / "other", model_folder, questions(5), generate=GENERATE)
    assert exit_code_of("run", other, "--quiet", "--set", f"output.path={out}", "--overwrite") == 0
    assert len(read_output(out)) == 5
    assert not (out / "_run" / "plan-sample.parquet").exists()


def test_a_sample_of_all_rows_is_no_sample(model_folder: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, model_folder, questions(6), generate=GENERATE, plan={"sample_rows": 6})
    assert len(run(job)) == 6
    assert not (tmp_path / "out" / "_run" / "plan-sample.parquet").exists()


def test_the_plan_says_that_a_sample_comes_first(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, model_folder, questions(20))
    assert exit_code_of("plan", job, "--quiet", *SAMPLE) == 0
    assert "15 rows are run first" in capsys.readouterr().out
    assert exit_code_of("plan", job, "--quiet", "--set", "plan.sample_rows=0") == 2
    assert "plan.sample_rows" in capsys.readouterr().err
