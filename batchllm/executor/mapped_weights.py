"""Weights that lie in a mapped file, as safetensors leaves them.

All pages of the file that were ever read count as this process's memory, until nothing of it is used any more. So when
a weight has been joined, packed or quantised, its pages are given back: few others are used where they lie to the end.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from pathlib import Path

from torch import Tensor


class MappedFiles:
    """The files that lie in this process's memory now. Knows of none where the system does not say."""

    def __init__(self) -> None:
        self._ranges = _file_mappings() if sys.platform == "linux" else []

    def let_go(self, *weights: Tensor) -> None:
        """Gives back the pages that hold only these weights, which nobody changes.

        What is read there again comes from the file again.
        """
        for weight in weights:
            first, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            if self._holds(first, end):
                inner = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                _forget(inner, end // mmap.PAGESIZE * mmap.PAGESIZE - inner)

    def _holds(self, first: int, end: int) -> bool:
        index = bisect_right(self._ranges, (first, sys.maxsize)) - 1
        return index >= 0 and end <= self._ranges[index][1]


def _forget(address: int, length: int) -> None:
    if length > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))


def _file_mappings() -> list[tuple[int, int]]:
    """First and last address of this process's memory that is a file's, in order."""
    try:  # names of files are bytes, and all but line feeds may be in them
        lines = Path("/proc/self/maps").read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in filter(None, lines):
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != b"0":
            first, end = addresses.split(b"-")
            found.append((int(first, 16), int(end, 16)))
    return found
