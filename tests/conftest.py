"""Fixtures for tests that need a model on disk, and the switch that lets kernels run without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Triton's interpreter, unless the environment says otherwise. Before any test module can import triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads that wait do not spin: they would take the cores from the processes that run other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer. Not to be changed: copy it first."""
    from tests.jobs import save_model

    return save_model(tmp_path_factory.mktemp("models") / "llama")
