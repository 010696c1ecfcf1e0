"""Runs a job again and again in forked children and kills them, without importing torch each time.

As a script: reads commands from stdin, one a line, and answers each with one line of JSON. A command is a JSON
object {job, overrides, kill}: runs the job in a child and kills it. `kill` is null (never), {"after": SECONDS}, or
{"when": GLOB, "after": SECONDS}: once a file matches. The answer: {"code": exit code or null when killed, "seconds"}.

The parent stays single-threaded: nothing runs in it, so that forking it is safe.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class ForkedRuns:
    """The test's side of it."""

    def __enter__(self) -> ForkedRuns:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            ),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
        )
        return self

    def run(
        self, job: Path, kill: Mapping[str, Any] | None = None, sig: int = signal.SIGKILL, **overrides: Any
    ) -> tuple[int | None, float]:
        """(exit code, or None when the child was killed; seconds)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        command = {"job": str(job), "kill": kill, "signal": int(sig), "overrides": overrides}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["seconds"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve() -> None:
    import_everything()
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            run_in_child(command)
        code = watch(child, command["kill"], command["signal"], started)
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)


def import_everything() -> None:
    """What a run would import, down to the model's own code."""
    import torch

    import batchllm.api
    import batchllm.cli
    import batchllm.executor.engine
    import batchllm.pipeline  # noqa: F401

    torch.set_num_threads(1)


def run_in_child(command: Mapping[str, Any]) -> None:
    """Never returns."""
    from batchllm.cli import main

    overrides = [f"--set={key}={json.dumps(value)}" for key, value in command["overrides"].items()]
    try:
        main(["run", command["job"], "--quiet", *overrides])
    except SystemExit as ended:
        sys.stderr.flush()
        os._exit(int(ended.code or 0))
    finally:
        os._exit(70)


def watch(child: int, kill: Mapping[str, Any] | None, sig: int, started: float) -> int | None:
    """Waits for the child, or for the moment to send it the signal. None: the signal ended it."""
    if kill is not None:
        ended = wait(child, lambda: "when" not in kill or bool(glob(kill["when"])))
        moment = (time.monotonic() if "when" in kill else started) + kill["after"]
        if ended is None:
            ended = wait(child, lambda: time.monotonic() >= moment)
        if ended is not None:
            return ended
        os.kill(child, sig)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def wait(child: int, condition: Any) -> int | None:
    """Until the condition holds (None) or the child has ended (its exit code)."""
    while not condition():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


if __name__ == "__main__":
    serve()
