"""Whether this machine can run the kernels in C."""

from __future__ import annotations

import pytest
from batchllm_kernels.cpu import build

needs_kernels = pytest.mark.skipif(
    not build.cpu_has_bfloat16_products() or build._compiler() is None,
    reason="needs a CPU with AVX-512 BF16 and a C compiler",
)
