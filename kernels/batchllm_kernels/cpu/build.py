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
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"]
_INSTRUCTIONS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
_SECONDS = 120  # a compiler that takes longer is stuck


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
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler (gcc or clang)"
    command = [compiler, *_FLAGS, *_INSTRUCTIONS]
    name = hashlib.sha256(" ".join(command).encode() + sources()).hexdigest()[:16]
    path = folder / f"kernels-{name}.so"
    try:
        if not path.exists():
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} could not compile them: {_first_line(error)}"


@cache
def sources() -> bytes:
    """All of the kernels' code."""
    return b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]")))


def _compiler() -> str | None:
    wanted = os.environ.get("CC")
    return next(
        (found for name in (wanted, "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )


def _compile(command: list[str], path: Path) -> None:
    """Under another name first, so that nobody loads half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        done = subprocess.run(
            [*command, *map(str, sorted(_FOLDER.glob("*.c"))), "-o", part, "-lm"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if done.returncode:
            raise OSError(done.stderr or "no reason was given")
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
