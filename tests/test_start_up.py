"""What a command imports, and that it does so without garbage collection."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchllm.collection import hold_collection, no_collection, resume_collection
from tests.jobs import make_job, questions

# What only other commands, other devices, or jobs that ask for more than a plain answer need.
_NOT_FOR_A_PLAIN_RUN = {
    *"polars llguidance matplotlib lm_eval datasets".split(),
    *"batchllm.llm batchllm.dry_run batchllm.score_job batchllm.evals batchllm.openai_batch.run".split(),
    *"batchllm.executor.calibrate batchllm.chunkcache.precompute".split(),
    *"batchllm.executor.paged_backend batchllm.executor.device_engine batchllm.executor.device_model".split(),
}
_RUN = """
import gc, json, sys
from batchllm import cli
code = cli._exit_code(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules), gc.isenabled(), gc.get_freeze_count()]))
"""


def in_a_process(*arguments: str) -> tuple[int, set[str], bool, int]:
    """Exit code, modules; whether garbage is collected at the end, and how many objects are never looked at."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found[0], set(found[1]), found[2], found[3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return make_job(tmp_path_factory.mktemp("start"), model_folder, questions(3))


def test_a_plain_run_imports_nothing_it_does_not_need(job: Path) -> None:
    code, modules, collects, frozen = in_a_process("run", str(job), "--quiet")
    assert code == 0 and "torch" in modules
    assert sorted(_NOT_FOR_A_PLAIN_RUN & modules) == []
    assert collects and frozen > 100_000, "imports are over before collection begins"


def test_a_plan_loads_no_modelling_code(job: Path) -> None:
    code, modules, collects, _ = in_a_process("plan", str(job), "--quiet")
    assert code == 0 and collects
    assert sorted({"transformers.modeling_utils", "batchllm.executor.engine", "polars"} & modules) == []


def test_collection_goes_on_only_where_it_was_held() -> None:
    frozen = gc.get_freeze_count()
    resume_collection()
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    try:
        hold_collection()
        hold_collection()
        assert not gc.isenabled()
        resume_collection()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_imports_of_a_library_are_not_frozen() -> None:
    frozen = gc.get_freeze_count()
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_a_process_that_does_not_collect_is_left_so() -> None:
    gc.disable()
    try:
        hold_collection()
        resume_collection()
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
