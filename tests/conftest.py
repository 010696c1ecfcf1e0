"""Fixtures for tests that need a model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer. Not to be changed: copy it first."""
    from tests.jobs import save_model

    return save_model(tmp_path_factory.mktemp("models") / "llama")
