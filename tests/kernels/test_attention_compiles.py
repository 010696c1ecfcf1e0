"""Attention kernels compiled for GPUs that are not there: no spills, tensor cores, enough programs side by side."""

from __future__ import annotations

import pytest
import triton
from batchllm_kernels.compile_check import Compiled, Compiler

from tests.kernels.attention_variants import (
    FLOAT32_VARIANTS,
    VARIANTS,
    Variant,
    compile_attention,
    compile_merge,
)
from tests.kernels.resource_table import KERNELS, committed_rows, compile_row, table_row

LLAMA = "128, 4 heads a group (Llama 3.1 8B, Qwen3 4B)"
TINY = "8, 2 heads (tiny models of tests)"
# Bytes that a program may have: of an A100, an H100 or H200, a B200, an MI300.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.mark.parametrize("name", VARIANTS)
def test_default_kernels_on_hopper(compiler: Compiler, name: str) -> None:
    variant = VARIANTS[name]
    compiled = compile_attention(compiler, variant, "sm_90")
    check_tensor_cores_without_spills(compiled)
    assert compiled.registers <= 240
    # Two programs side by side: one computes while the other waits for memory. Wide heads leave room for one only.
    assert compiled.programs_per_sm >= (2 if max(variant.dim, variant.values) <= 128 else 1)


@pytest.mark.parametrize("name", [LLAMA, "64, 4 heads (Llama 3.2 1B)"])
def test_without_descriptors_on_hopper(compiler: Compiler, name: str) -> None:
    """What runs where the pool's strides allow no descriptor."""
    compiled = compile_attention(compiler, VARIANTS[name], "sm_90", descriptors=False)
    check_tensor_cores_without_spills(compiled)
    assert compiled.async_copy, "pages are fetched ahead"


@pytest.mark.parametrize(
    "name", [LLAMA, "64, 8 heads, sinks and window (gpt-oss)", "96, 1 head (Phi-3 mini)", TINY]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_nvidia_chips(compiler: Compiler, name: str, target: str) -> None:
    compiled = compile_attention(compiler, VARIANTS[name], target)
    check_tensor_cores_without_spills(compiled)
    assert compiled.shared_bytes <= 160 * 1024


@pytest.mark.parametrize("variant", [Variant(), Variant(kv_type="fp8e4b8"), VARIANTS[TINY]])
def test_amd(compiler: Compiler, variant: Variant) -> None:
    compiled = compile_attention(compiler, variant, "gfx942")
    assert compiled.tensor_core and compiled.spills == 0
    assert compiled.registers <= 512 and compiled.shared_bytes <= 64 * 1024


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("name", FLOAT32_VARIANTS)
def test_float32_fits(compiler: Compiler, name: str, target: str) -> None:
    """NVIDIA's tensor cores do not compute it exactly. Operands that are held in registers would fill many times what
    there is of them: with bfloat16's tiles, 11,000 bytes a thread are spilled."""
    compiled = compile_attention(compiler, FLOAT32_VARIANTS[name], target)
    assert compiled.tensor_core == (target == "gfx942")
    assert compiled.spills <= 16
    assert compiled.shared_bytes <= SHARED[target]
    if target == "sm_90":
        assert compiled.programs_per_sm >= 2, "pages are not fetched ahead: another program has to compute"


@pytest.mark.parametrize("name", ["float32, 128, 4 heads", "float32, 8, 2 heads"])
def test_float32_without_descriptors_on_hopper(compiler: Compiler, name: str) -> None:
    compiled = compile_attention(compiler, FLOAT32_VARIANTS[name], "sm_90", descriptors=False)
    assert compiled.spills <= 16 and not compiled.tensor_core


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("target", SHARED)
def test_merge(compiler: Compiler, target: str, float32: bool) -> None:
    compiled = compile_merge(compiler, target, float32=float32)
    assert compiled.spills == 0 and compiled.registers <= 128


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="docs/kernels.md is of Triton 3.6")
def test_the_committed_table_is_what_the_compiler_says(compiler: Compiler) -> None:
    committed = committed_rows()
    assert list(committed) == KERNELS, "run python -m tests.kernels.resource_table"
    for kernel in KERNELS:
        assert committed[kernel] == table_row(kernel, compile_row(compiler, kernel))


def check_tensor_cores_without_spills(compiled: Compiled) -> None:
    assert compiled.tensor_core, "matrix products do not use tensor cores"
    assert compiled.spills == 0
