"""The versions of everything that can change a result, for manifests and metrics."""

from __future__ import annotations

import platform
from importlib import metadata

_DISTRIBUTIONS = {
    "batchllm": "batchllm-engine",
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "pyarrow": "pyarrow",
    "numpy": "numpy",
}


def batchllm_version() -> str:
    return _version("batchllm-engine")


def versions() -> dict[str, str]:
    """Read from the installed metadata: nothing is imported."""
    found = {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
