"""Kernels of a step compile for every target without spills, and matrix products use the matrix units."""

from __future__ import annotations

import pytest
from batchllm_kernels.compile_check import TARGETS, Compiler

from tests.kernels.step_kernels import STEP_KERNELS

# Registers a thread on sm_90; few enough that memory-bound kernels keep many programs on a multiprocessor.
REGISTERS = {
    "rms_norm": 64,
    "gated_activation": 40,
    "rope_kv_write": 48,
    "sample_tokens": 128,
    "token_logprobs": 64,
    "linear_token_logprobs": 255,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", STEP_KERNELS)
def test_compiles_without_spills(compiler: Compiler, name: str, target: str) -> None:
    variant = STEP_KERNELS[name]
    if not variant.runs_on(target):
        pytest.skip(f"{target} has no 8-bit floats")
    compiled = variant.compile(compiler, target)
    assert compiled.spills == 0
    kernel = name.split(" ")[0].rstrip(",")
    if target == "sm_90":
        assert compiled.registers <= REGISTERS[kernel]
    assert compiled.tensor_core == (kernel == "linear_token_logprobs")
    if kernel == "linear_token_logprobs" and target.startswith("sm_"):
        assert compiled.async_copy  # weights arrive while the tile before is multiplied
