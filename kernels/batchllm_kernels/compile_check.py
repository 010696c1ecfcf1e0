"""Compiles a kernel for a GPU that is not there, and says what it came to: registers, spills, shared memory.

Triton's wheel brings the assemblers (ptxas, LLVM's AMD back end) and cuobjdump, so no GPU, driver or toolkit is
needed. Kernels compile in a process of their own, where TRITON_INTERPRET is not set:

    with Compiler() as compiler:
        compiled = compiler.compile_for(
            "batchllm_kernels.merge:merge_parts",
            signature={"parts": "*fp16", "count": "i32:16"},
            constexprs={"BLOCK": 128},
            target="sm_90",
            num_warps=4,
        )

`python -m batchllm_kernels.compile_check` is that process: one JSON request a line in, one answer a line out.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma\w*)")
_ASYNC_COPY = re.compile(r"\b(?:cp\.async\b|buffer_load\w*\s.*\blds\b)")


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target."""

    target: str
    registers: int  # per thread (vector registers on AMD)
    spills: int  # bytes of stack per thread on NVIDIA, spilled vector registers on AMD; 0 is what we want
    shared_bytes: int  # per program
    num_warps: int
    tensor_core: bool  # matrix products use wgmma, mma, tcgen05 or mfma instructions
    async_copy: bool  # loads go to shared memory asynchronously (a software pipeline)

    @property
    def programs_per_sm(self) -> int:
        """Programs that one multiprocessor of an H100 or H200 holds at once, by registers, shared memory, threads."""
        threads = 32 * self.num_warps
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        by_shared = 227 * 1024 // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 2048 // threads)


class CompileError(Exception):
    """Triton could not compile a kernel; the message is Triton's own."""


class Compiler:
    """A process that compiles kernels; the same request is compiled once."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # Triton 3.10 turns the fusion of a product and a sum into one instruction off unless asked.
        environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._known: dict[str, Compiled] = {}

    def compile_for(
        self,
        kernel: Any,
        signature: Mapping[str, str],
        constexprs: Mapping[str, Any],
        target: str,
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        **options: Any,
    ) -> Compiled:
        """`kernel` is a `@triton.jit` function at the top of its module, or its "module:name".

        signature: type of every argument that is no constexpr: "*bf16", "*i32", "fp32", "i32", "*fp8e4nv",
          "tensordesc<bf16[64,128]>". Pointers count as multiples of 16 bytes, as torch's are; an integer that is a
          multiple of 16 (a stride) is "i32:16", else loads are not vectorised and the figures are wrong. An integer
          that is always 1 belongs to `constexprs`, which is what Triton's launcher does with it.
        constexprs: values of the others; those with a default may be left out. Data types are given as `tl.dtype`.
        target: one of TARGETS. options: further compile options such as `maxnreg`.
        Raises CompileError with Triton's words when the kernel does not compile.
        """
        request = json.dumps(
            {
                "kernel": kernel if isinstance(kernel, str) else _name_of(kernel.fn),
                "signature": dict(signature),
                "constexprs": {name: _encoded(value) for name, value in constexprs.items()},
                "target": target,
                "options": {"num_warps": num_warps, "num_stages": num_stages, **options},
            },
            sort_keys=True,
        )
        if request not in self._known:
            self._known[request] = self._ask(request)
        return self._known[request]

    def _ask(self, request: str) -> Compiled:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CompileError("the compiling process has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise CompileError(answer["error"])
        return Compiled(**answer)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name_of(function: Any) -> str:
    return f"{function.__module__}:{function.__name__}"


def _encoded(value: Any) -> Any:
    """Values as JSON; Triton's data types by name."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else {"dtype": str(value)}


# ---- the compiling process


def _compile(request: dict[str, Any]) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = request["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    types = {name: text.split(":")[0] for name, text in request["signature"].items()}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {
        name: tl.dtype(value["dtype"]) if isinstance(value, dict) else value
        for name, value in {**_defaults(kernel.fn), **request["constexprs"]}.items()
        if name not in types
    }
    unknown = (set(types) | set(request["constexprs"])) - set(kernel.arg_names)
    missing = set(kernel.arg_names) - set(types) - set(constexprs)
    if unknown or missing:
        raise ValueError(
            f"arguments not given: {sorted(missing)}; not arguments of {name}: {sorted(unknown)}"
        )
    multiples = [
        name for name, text in request["signature"].items() if text.startswith("*") or text.endswith(":16")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    target = GPUTarget(*TARGETS[request["target"]])
    return _measured(triton.compile(source, target=target, options=request["options"]), request["target"])


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value.default for name, value in parameters.items() if value.default is not value.empty}


def _measured(compiled: Any, target: str) -> Compiled:
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spills = _amd_count(assembly, "vgpr_count"), _amd_count(assembly, "vgpr_spill_count")
    return Compiled(
        target=target,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        tensor_core=bool(_TENSOR_CORE.search(assembly)),
        async_copy=bool(_ASYNC_COPY.search(assembly)),
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the binary itself."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"])


def _amd_count(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    assert found is not None, f"{name} is not in the assembly"
    return int(found.group(1))


def _answer(line: str) -> dict[str, Any]:
    try:
        return asdict(_compile(json.loads(line)))
    except Exception as error:
        # The one place where any failure is a result: the message goes back to the caller.
        return {"error": f"{type(error).__name__}: {error}"}


def _serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what Triton or an assembler prints must not mix with the answers
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            out.write(json.dumps(_answer(line)) + "\n")
            out.flush()


if __name__ == "__main__":
    _serve()
