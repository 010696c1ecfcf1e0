"""Attention kernels compiled for GPUs that are not there: no spills, tensor cores, enough programs side by side."""

from __future__ import annotations

import pytest
import triton
from batchllm_kernels.compile_check import Compiled, Compiler

from tests.kernels.attention_variants import VARIANTS, Variant, compile_attention, compile_merge
from tests.kernels.resource_table import KERNELS, committed_rows, compile_row, table_row

LLAMA = "128, 4 heads a group (Llama 3.1 8B, Qwen3 4B)"


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
    "name", [LLAMA, "64, 8 heads, sinks and window (gpt-oss)", "96, 1 head (Phi-3 mini)"]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_nvidia_chips(compiler: Compiler, name: str, target: str) -> None:
    compiled = compile_attention(compiler, VARIANTS[name], target)
    check_tensor_cores_without_spills(compiled)
    assert compiled.shared_bytes <= 160 * 1024


@pytest.mark.parametrize("kv_type", ["bf16", "fp8e4b8"])
def test_amd(compiler: Compiler, kv_type: str) -> None:
    compiled = compile_attention(compiler, Variant(kv_type=kv_type), "gfx942")
    assert compiled.tensor_core and compiled.spills == 0
    assert compiled.registers <= 512 and compiled.shared_bytes <= 64 * 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_merge(compiler: Compiler, target: str) -> None:
    compiled = compile_merge(compiler, target)
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
