from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchllm.cli import main
from batchllm.errors import OutputError
from batchllm.job import JobSpec

ROOT = Path(__file__).parents[1]
JOB = {
    "model": {"path": "owner/model"},
    "input": {"path": "rows.parquet"},
    "prompt": {"text": "{{ question }}"},
    "output": {"path": "answers"},
}


@dataclass
class Summary:
    exit_code: int = 0
    text: str = "3 rows answered"


@dataclass
class Call:
    job: JobSpec
    overwrite: bool
    quiet: bool


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    return str(path)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Call]]:
    """Puts a pipeline in place that gives, or raises, what it is told, and notes how it was called."""

    def install(outcome: Any) -> list[Call]:
        calls: list[Call] = []

        def run_job(job: JobSpec, *, overwrite: bool = False, quiet: bool = False) -> Any:
            calls.append(Call(job, overwrite, quiet))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.ModuleType("batchllm.pipeline")
        module.run_job = run_job  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "batchllm.pipeline", module)
        return calls

    return install


@pytest.fixture(autouse=True)
def _signals() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.mark.parametrize("code", [0, 3, 130])
def test_run_gives_the_exit_code_and_text_of_the_pipeline(
    code: int, job_file: str, pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pipeline(Summary(code))
    assert exit_code("run", job_file) == code
    assert "3 rows answered\n" in capsys.readouterr().out
    (call,) = calls
    assert (call.overwrite, call.quiet) == (False, False)
    assert call.job.source == job_file


def test_options_reach_the_pipeline(job_file: str, pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = pipeline(Summary())
    options = ["--set", "generate.n=2", "--overwrite", "--set", "input.limit=9", "--limit", "5", "--quiet"]
    assert exit_code("run", job_file, *options) == 0
    (call,) = calls
    assert (call.overwrite, call.quiet) == (True, True)
    assert (call.job.generate.n, call.job.input.limit) == (2, 5)
    assert capsys.readouterr().out == ""


def test_user_errors_are_one_sentence(
    job_file: str, pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pipeline(OutputError("answers holds another job; use --overwrite"))
    assert exit_code("run", job_file) == 2
    assert capsys.readouterr().err == "error: answers holds another job; use --overwrite\n"
    assert len(calls) == 1
    assert exit_code("run", job_file, "--set", "generate.temperatur=1") == 2
    assert capsys.readouterr().err == (
        "error: --set generate.temperatur: generate.temperatur is not a known key; "
        "did you mean generate.temperature?\n"
    )
    assert exit_code("run", job_file + "x") == 2
    assert capsys.readouterr().err == f"error: {job_file}x: there is no such job file\n"
    assert len(calls) == 1


def test_a_fault_of_ours_shows_where(
    job_file: str, pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(ZeroDivisionError("no tokens"))
    assert exit_code("run", job_file) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("error: a fault in batchllm, not in your job: no tokens\n")


@pytest.mark.parametrize("outcome", [KeyboardInterrupt(), Summary(130)])
def test_ctrl_c(outcome: Any, job_file: str, pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(outcome)
    assert exit_code("run", job_file) == 130
    assert capsys.readouterr().err.count("interrupted; run the same command again to go on\n") == 1


@pytest.mark.parametrize(
    ("arguments", "called", "said"),
    [
        (["eval", "JOB"], "batchllm.evals.eval_job.load_eval_job", "run the same command again to go on"),
        (["plan", "JOB"], "batchllm.job.load_job", "nothing was written"),
        (["precompute", "JOB"], "batchllm.job.load_job", "run the same command again to add what is missing"),
        (["chunks", "ls", "store"], "batchllm.chunkcache.store.ChunkStore", "the store can be used as it is"),
        (["convert-batch", "a", "b"], "batchllm.openai_batch.convert.convert", "nothing was written"),
        (
            ["run-batch", *"-i a -o b --model m".split()],
            "batchllm.openai_batch.run.run_batch",
            "run the same command again to go on",
        ),
    ],
)
def test_what_ctrl_c_leaves_is_said_by_command(
    arguments: list[str],
    called: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] == "eval":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(called, interrupted)
    assert exit_code(*arguments) == 130
    assert capsys.readouterr().err.strip() == f"interrupted; {said}"


def test_a_batch_that_was_interrupted_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("batchllm.openai_batch.run.run_batch", lambda *_, **__: 130)
    assert exit_code("run-batch", *"-i a -o b --model m".split()) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: batchllm"),
        (["run"], "Missing argument 'JOB'"),
        (["rn"], "No such command 'rn'"),
        (["run", "job.yaml", "--overwrit"], "No such option"),
        (["run", "job.yaml", "--limit", "-1"], "Invalid value for '--limit'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith("batchllm ")


def run_python(code: str, **options: Any) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["run", "no-such-job.yaml"]]
)
def test_nothing_heavy_is_imported_for_help_and_job_errors(arguments: list[str]) -> None:
    code = f"""
import sys
from batchllm.cli import main
try:
    main({arguments!r})
finally:
    print(sorted({{"torch", "transformers", "pyarrow", "numpy", "polars"}} & set(sys.modules)), file=sys.stderr)
"""
    process = run_python(code)
    _, error = process.communicate(timeout=60)
    heavy = error.splitlines()[-1]
    # The job file knows SamplingParams, which live beside the numpy arrays of the vocabulary.
    assert heavy in ("[]", "['numpy']")
    assert process.returncode == (2 if "no-such-job.yaml" in arguments else 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_interrupt_and_exit_with_130(tmp_path: Path, number: signal.Signals, job_file: str) -> None:
    code = f"""
import sys, time, types
module = types.ModuleType("batchllm.pipeline")
def run_job(job, *, overwrite, quiet):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        print("answers kept", flush=True)
module.run_job = run_job
sys.modules["batchllm.pipeline"] = module
from batchllm.cli import main
main(["run", {job_file!r}])
"""
    process = run_python(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert out == "answers kept\n"
    assert "interrupted" in error
    assert process.returncode == 130
