"""Compiles the C kernels with the machine's own compiler, once: the library is kept and found again by its content.

Triton does the same for its launchers. Where there is no compiler, or the CPU lacks the instructions, there is simply
no library, and callers go on with torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"]
_INSTRUCTIONS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
_SECONDS = 120  # a compiler that takes longer is stuck


class CompilerFailed(Exception):
    """In the compiler's own words."""


def cpu_has_bfloat16_products() -> bool:
    """Whether this CPU has the instructions that the kernels are written in (AVX-512 with its BF16 extension)."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked and asked())


@cache
def library(folder: Path) -> ctypes.CDLL | str:
    """The kernels as a library in `folder`, compiled if it is not there yet; or, in words, why there is none.

    The library shares torch's threads: it is linked with the OpenMP runtime that torch has loaded.
    """
    if not cpu_has_bfloat16_products():
        return "the CPU has no AVX-512 BF16 instructions"
    failures = []
    for compiler in compilers():
        try:
            return _library_of(compiler, folder)
        except CompilerFailed as error:
            failures.append(f"{compiler} could not compile them: {error}")
        except OSError as error:
            return f"what {compiler} made of them could not be kept or loaded: {error}"
    return failures[0] if failures else "there is no C compiler (gcc or clang)"


@cache
def sources() -> bytes:
    """All of the kernels' code."""
    return b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]")))


def compilers() -> list[str]:
    """Those of this machine, the likeliest to do first: clang's OpenMP runtime is not the one that torch has loaded."""
    names = (os.environ.get("CC"), "gcc", "cc", "clang")
    return list(dict.fromkeys(found for name in names if name and (found := shutil.which(name))))


def _library_of(compiler: str, folder: Path) -> ctypes.CDLL:
    """From `folder`. Where that cannot be written, or what is there not be loaded (a disk without execution, another
    user's file), it is compiled for this process alone.

    Raises CompilerFailed, and OSError for all that is no compiler's fault.
    """
    command = [compiler, *_FLAGS, *_INSTRUCTIONS]
    name = f"kernels-{hashlib.sha256(' '.join(command).encode() + sources()).hexdigest()[:16]}.so"
    path = folder / name
    with suppress(OSError):
        if not os.path.exists(path):
            _compile(command, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="batchllm-", ignore_cleanup_errors=True) as alone:
        path = Path(alone) / name
        _compile(command, path)
        return ctypes.CDLL(str(path))  # stays in memory when its file has gone


def _compile(command: list[str], path: Path) -> None:
    """Under another name first, so that nobody loads half a library. One that is there by then stays: other processes
    may have it in memory, on other machines too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        _run([*command, *map(str, sorted(_FOLDER.glob("*.c"))), "-o", part, "-lm"])
        os.chmod(part, 0o755)  # of mkstemp and the linker only its owner could read it
        try:
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerFailed(str(error)) from None
    if done.returncode:
        raise CompilerFailed(_telling_line(done.stderr))


def _telling_line(output: str) -> str:
    """A compiler's output begins with where it is, and comes to its complaint later."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no reason was given"]
    return next((line for line in lines if "error" in line), lines[0])
