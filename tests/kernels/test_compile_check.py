"""The compiler for absent GPUs tells a good kernel from a bad one, and the interpreter runs kernels."""

from __future__ import annotations

import pytest
import torch
from batchllm_kernels.compile_check import TARGETS, CompileError, Compiler

from tests.kernels.toy_kernels import count_up, scale_rows, square_product

POINTERS = {"Input": "*bf16", "Output": "*fp32"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_and_finds_the_matrix_instructions(compiler: Compiler, target: str):
    plain = compiler.compile_for(scale_rows, {**POINTERS, "stride": "i32:16"}, {"SIZE": 128}, target)
    assert plain.registers > 0 and plain.spills == 0 and not plain.tensor_core
    product = compiler.compile_for(square_product, POINTERS, {"SIZE": 64}, target)
    assert product.tensor_core and product.spills == 0
    assert product.shared_bytes > 0


def test_spills_are_seen(compiler: Compiler):
    starved = compiler.compile_for(square_product, POINTERS, {"SIZE": 64}, "sm_80", maxnreg=32)
    assert starved.spills > 0 and starved.registers <= 32


def test_a_kernel_that_does_not_compile_says_why_and_the_next_one_does(compiler: Compiler):
    with pytest.raises(CompileError, match="power of 2"):
        compiler.compile_for(square_product, POINTERS, {"SIZE": 48}, "sm_90")
    assert compiler.compile_for(square_product, POINTERS, {"SIZE": 32}, "sm_90").tensor_core


def test_arguments_must_fit_the_kernel(compiler: Compiler):
    with pytest.raises(
        CompileError, match=r"not given: \['Output'\]; not arguments of square_product: \['output'\]"
    ):
        compiler.compile_for(square_product, {"Input": "*bf16", "output": "*fp32"}, {"SIZE": 32}, "sm_90")


def test_programs_per_sm_is_what_fits():
    from batchllm_kernels.compile_check import Compiled

    def fitting(registers: int, shared_bytes: int, num_warps: int) -> int:
        return Compiled("sm_90", registers, 0, shared_bytes, num_warps, False, False).programs_per_sm

    assert fitting(209, 114_688, 4) == 2  # shared memory and registers both allow two
    assert fitting(100, 37_900, 4) == 4  # registers: 104 * 128 * 4 = 53,248 of 65,536
    assert fitting(32, 0, 8) == 8  # threads: 2,048


def test_the_interpreter_runs_kernels_with_loaded_loop_bounds(device: torch.device):
    counted = torch.zeros(1, dtype=torch.int32, device=device)
    count_up[(1,)](torch.tensor([7], dtype=torch.int32, device=device), counted)
    assert counted.item() == 7
    rows = torch.randn(3, 8, device=device)
    doubled = torch.empty_like(rows)
    scale_rows[(3,)](rows, doubled, rows.stride(0), SIZE=8)
    assert torch.equal(doubled, rows * 2)
