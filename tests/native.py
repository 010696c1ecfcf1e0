"""Whether this machine can run the kernels in C."""

from __future__ import annotations

import pytest
from batchllm_kernels.cpu import build

from batchllm.executor import certain_draws, sampler

needs_kernels = pytest.mark.skipif(
    not (build.cpu_has_bfloat16_products() and build.compilers()),
    reason="needs a CPU with AVX-512 BF16 and a C compiler",
)


def sample_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the kernels."""
    for module in (sampler, certain_draws):
        monkeypatch.setattr(module, "native_kernels", lambda _dtype: None)
