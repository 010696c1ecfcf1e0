"""The engines of the comparison as processes: started once, stopped (SIGSTOP) while another one works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import result, workloads
from benchmarks.result import EngineResult
from benchmarks.worker import Settings
from benchmarks.workloads import Workload

_PROJECT = Path(__file__).parent.parent
MODULES = {
    "batchllm": "benchmarks.engine_batchllm",
    "vllm": "benchmarks.engine_vllm",
    "transformers": "benchmarks.engine_transformers",
    "transformers-cb": "benchmarks.engine_transformers_cb",
}


class EngineFailed(Exception):
    """An engine could not start, or not run a workload."""


@dataclass(frozen=True)
class Interpreters:
    """Which Python runs an engine, and with which variables added to its environment."""

    vllm: str | None = None
    vllm_environment: tuple[str, ...] = ()  # NAME=VALUE

    def of(self, engine: str) -> tuple[str, dict[str, str]]:
        path = os.pathsep.join([str(_PROJECT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
        if engine != "vllm":
            return sys.executable, environment
        if self.vllm is None:
            raise EngineFailed(
                "give the Python of vLLM's environment: --vllm-python or BATCHLLM_VLLM_PYTHON (benchmarks/README.md)"
            )
        return self.vllm, environment | dict(entry.split("=", 1) for entry in self.vllm_environment)


class Worker:
    """One engine with one model and one KV budget. Made: started, first step done, and stopped."""

    def __init__(self, engine: str, settings: Settings, interpreters: Interpreters, scratch: Path):
        self.engine = engine
        self._scratch = scratch
        self._log = scratch / f"{engine}.log"
        python, environment = interpreters.of(engine)
        started = time.monotonic()
        with self._log.open("w") as log:
            # A process group of its own: it is stopped as one, and the kernel ends it when this process is gone.
            self._process = subprocess.Popen(
                [python, "-m", MODULES[engine], settings.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                process_group=0,
            )
        ready = self._reply()
        self.versions: dict[str, str] = ready["versions"]
        self.startup_seconds = float(ready["first_step"]) - started  # one clock for all processes
        self._signal(signal.SIGSTOP)

    def run(self, workload: Path) -> EngineResult:
        """The only engine that runs meanwhile. Raises EngineFailed."""
        answer = self._scratch / f"{self.engine}.json"
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"workload": str(workload), "result": str(answer)}) + "\n")
            self._process.stdin.flush()
            self._reply()
        finally:
            if self._process.poll() is None:
                self._signal(signal.SIGSTOP)
        return result.load(answer)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise EngineFailed(f"{self.engine} ended with code {code}: {last[0]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineFailed(f"{self.engine}: {reply['error']}")
        return reply

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


class Workers:
    """Starts each engine when it is first needed, and anew when it is needed with other settings."""

    def __init__(self, interpreters: Interpreters, scratch: Path):
        self._interpreters, self._scratch = interpreters, scratch
        self._workers: dict[str, tuple[Settings, Worker]] = {}
        self.startup_seconds: dict[str, list[float]] = {}
        self.versions: dict[str, dict[str, str]] = {}

    def run(self, engine: str, settings: Settings, workload: Path) -> EngineResult:
        held = self._workers.get(engine)
        if held is None or held[0] != settings:
            self._close(engine)
            self._workers[engine] = settings, self._start(engine, settings)
        return self._workers[engine][1].run(workload)

    def _start(self, engine: str, settings: Settings) -> Worker:
        worker = Worker(engine, settings, self._interpreters, self._scratch)
        self.startup_seconds.setdefault(engine, []).append(worker.startup_seconds)
        self.versions[engine] = worker.versions
        return worker

    @property
    def process_ids(self) -> list[int]:
        return [worker.process_id for _, worker in self._workers.values()]

    def _close(self, engine: str) -> None:
        held = self._workers.pop(engine, None)
        if held is not None:
            held[1].close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in list(self._workers):
            self._close(engine)


def save_workload(workload: Workload, scratch: Path) -> Path:
    path = scratch / f"workload-{workload.name}.json"
    workloads.save(workload, path)
    return path
