"""The table of docs/kernels.md: what the default kernels need on an H100 or H200.

python -m tests.kernels.resource_table     prints it anew
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from batchllm_kernels.compile_check import Compiled, Compiler

from tests.kernels.attention_variants import FLOAT32_VARIANTS, VARIANTS, compile_attention, compile_merge
from tests.kernels.step_kernels import STEP_KERNELS

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
TARGET = "sm_90"
_ATTENTION, _MERGE = "attend_tiles, ", "merge_parts, "
_VARIANTS = VARIANTS | FLOAT32_VARIANTS
KERNELS = [*(_ATTENTION + name for name in _VARIANTS), _MERGE + "32 heads of 128", *STEP_KERNELS]
_HEADER = "| kernel | registers | spilled bytes | shared bytes | programs per SM |"


def compile_row(compiler: Compiler, kernel: str) -> Compiled:
    if kernel.startswith(_ATTENTION):
        return compile_attention(compiler, _VARIANTS[kernel.removeprefix(_ATTENTION)], TARGET)
    if kernel.startswith(_MERGE):
        return compile_merge(compiler, TARGET)
    return STEP_KERNELS[kernel].compile(compiler, TARGET)


def table_row(kernel: str, compiled: Compiled) -> str:
    figures = (compiled.registers, compiled.spills, compiled.shared_bytes, compiled.programs_per_sm)
    return f"| {kernel} | " + " | ".join(f"{figure:,}" for figure in figures) + " |"


def committed_rows() -> dict[str, str]:
    """Lines of the table in docs/kernels.md, by kernel."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = takewhile(lambda line: line.startswith("|"), lines[lines.index(_HEADER) + 2 :])
    return {line.split("|")[1].strip(): line for line in rows}


def main() -> None:
    print(_HEADER)
    print("|---|---|---|---|---|")
    with Compiler() as compiler:
        for kernel in KERNELS:
            print(table_row(kernel, compile_row(compiler, kernel)))


if __name__ == "__main__":
    main()
