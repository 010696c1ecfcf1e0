"""Every row exactly once, with the text of an undisturbed run, however often and however the process ends."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from batchllm.errors import OutputError
from batchllm.executor.engine import Engine
from batchllm.job import load_job
from batchllm.pipeline import run_job
from tests.forked_runs import ForkedRuns
from tests.jobs import exit_code_of, make_job, questions, read_metrics, read_output, texts

KILLS = 25
ROWS, SAMPLES = 40, 2
GENERATE = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.95, "n": SAMPLES}


@pytest.fixture(scope="module")
def runs() -> Iterator[ForkedRuns]:
    with ForkedRuns() as forked:
        yield forked


def kill_at(number: int, out: Path, duration: float, random: np.random.Generator) -> dict[str, object]:
    """Three of five at any moment, one while the final parts are written, one while they are put in place."""
    if number % 5 == 3:
        return {"when": str(out / "_run" / "final" / "*.parquet"), "after": random.uniform(0, 0.03)}
    if number % 5 == 4:
        return {"when": str(out / "_run" / "COMMIT"), "after": random.uniform(0, 0.002)}
    return {"after": random.uniform(0.02, duration)}


def phase(out: Path) -> str:
    """How far a killed run had come, as far as its folder tells."""
    if (out / "_run" / "COMMIT").exists() or list((out / "_run" / "final").glob("*.parquet")):
        return "finishing"
    if list(out.glob("part-live-*.parquet")):
        return "running"
    return "finished" if list(out.glob("*.parquet")) else "starting"


def check_partial(out: Path, expected: dict[tuple[str, int], str]) -> None:
    """Whatever is readable is right, and nothing is there twice."""
    if list(out.glob("*.parquet")):
        for answer, text in texts(out).items():
            assert text == expected[answer]


def check_whole(out: Path, expected: pl.DataFrame) -> None:
    table = read_output(out)
    assert table["id"].to_list() == [f"row-{row}" for row in range(ROWS) for _ in range(SAMPLES)]
    kept = [name for name in table.columns if name != "shared_tokens"]  # depends on what ran together
    assert table.select(kept).equals(expected.select(kept))
    left = {path.name for path in (out / "_run").iterdir()} & {"COMMIT", "final", "scratch"}
    assert not left
    assert not list((out / "_run").glob("*work-*")), "a work folder was left"


def test_sigkill_at_random_moments(runs: ForkedRuns, model_folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    output = {"part_rows": 7, "flush_seconds": 0.05}
    job = make_job(tmp_path, model_folder, questions(ROWS), generate=GENERATE, output=output)
    out = tmp_path / "out"
    code, duration = runs.run(job)
    assert code == 0
    expected, expected_texts = read_output(out), texts(out)
    assert len(set(expected_texts.values())) > ROWS, "texts must differ, or swapped ones would not be seen"
    shutil.rmtree(out)

    phases: list[str] = []
    for _ in range(4 * KILLS):
        code, _ = runs.run(job, kill_at(len(phases), out, duration, random))
        if code is None:
            phases.append(phase(out))
            check_partial(out, expected_texts)
        else:  # it was done before the moment came: start over
            assert code == 0
            check_whole(out, expected)
            shutil.rmtree(out)
        if len(phases) == KILLS:
            break
    assert len(phases) == KILLS
    assert {"starting", "running", "finishing"} <= set(phases)
    assert runs.run(job)[0] == 0
    check_whole(out, expected)
    assert runs.run(job)[0] == 0, "running a finished job again changes nothing"
    check_whole(out, expected)
    assert read_metrics(out)["rows_resumed"] == ROWS * SAMPLES


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_answers_and_the_next_run_goes_on(
    runs: ForkedRuns, model_folder: Path, tmp_path: Path, sig: signal.Signals
) -> None:
    """Parts are so large that only the interruption itself can have written the answers."""
    output = {"part_rows": 10_000, "flush_seconds": 3600}
    generate = {**GENERATE, "max_tokens": 24, "ignore_eos": True}
    sections = {"generate": generate, "output": output, "engine": {"max_step_tokens": 24}}
    job = make_job(tmp_path / "undisturbed", model_folder, questions(ROWS), **sections)
    assert runs.run(job)[0] == 0
    running = read_metrics(tmp_path / "undisturbed" / "out")["seconds"]["run"]
    job, out = make_job(tmp_path, model_folder, questions(ROWS), **sections), tmp_path / "out"
    for fraction in (
        0.5,
        0.3,
        0.8,
        0.1,
        1.5,
    ):  # on a busy machine a run may end sooner or begin to answer later
        moment = {"when": str(out / "_run" / "manifest.json"), "after": running * fraction}
        code, _ = runs.run(job, moment, sig=sig)
        if code == 130 and any(out.glob("*.parquet")):
            break
        shutil.rmtree(out)
    assert code == 130
    kept = texts(out)
    expected = texts(tmp_path / "undisturbed" / "out")
    assert 0 < len(kept) < ROWS * SAMPLES
    assert all(text == expected[answer] for answer, text in kept.items())
    assert read_metrics(out)["rows_ok"] == len(kept)
    assert runs.run(job)[0] == 0
    assert texts(out) == expected
    assert read_metrics(out)["rows_resumed"] == len(kept)


def test_rows_that_are_done_are_not_computed_again(model_folder: Path, tmp_path: Path) -> None:
    job, out = make_job(tmp_path, model_folder, questions(20)), tmp_path / "out"
    assert exit_code_of("run", job, "--quiet", "--limit", 12) == 0
    first = texts(out)
    assert exit_code_of("run", job, "--quiet") == 0
    assert read_metrics(out)["rows_resumed"] == 12
    assert read_metrics(out)["prompt_tokens"] == sum(len(row["prompt"]) for row in questions(20)[12:])
    assert {answer: text for answer, text in texts(out).items() if answer in first} == first


def test_a_second_run_at_the_same_time_is_refused_and_does_no_harm(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run's prompts are mapped into memory from its work folder while the second one starts."""
    job, out = make_job(tmp_path, model_folder, questions(20)), tmp_path / "out"
    assert exit_code_of("run", job, "--quiet") == 0
    expected = texts(out)
    shutil.rmtree(out)
    original, refusals = Engine.run, []

    def run_beside_another(engine: Engine) -> Iterator[list[object]]:
        with pytest.raises(OutputError, match=r"another run .* is writing this folder") as refusal:
            run_job(load_job(job), quiet=True)
        refusals.append(refusal)
        yield from original(engine)

    monkeypatch.setattr(Engine, "run", run_beside_another)
    assert exit_code_of("run", job, "--quiet") == 0
    assert len(refusals) == 1
    assert texts(out) == expected
    assert not list((out / "_run").glob("*work-*"))
