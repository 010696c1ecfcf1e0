"""What kernel tests share: the device kernels run on, and the compiler for GPUs that are not there.

Without a GPU kernels run in Triton's interpreter, on CPU tensors (tests/conftest.py sets TRITON_INTERPRET before
anything imports triton). With TRITON_INTERPRET=0 and a GPU the same tests run on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from batchllm_kernels.compile_check import Compiler


class _WithoutTriton(pytest.Module):
    """A test module that cannot be imported because triton is missing."""

    def collect(self) -> NoReturn:
        pytest.skip("triton is not installed: pip install triton", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Every module of this folder is skipped, saying so, where triton is missing."""
    return _WithoutTriton.from_parent(parent, path=module_path) if find_spec("triton") is None else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels' tensors live."""
    from batchllm_kernels.interpreter import INTERPRETED

    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Compiles for GPUs that are not there; remembers what it has compiled."""
    with Compiler() as shared:
        yield shared
