"""Weights that lie in a mapped file, as safetensors leaves them.

All pages of the file that were ever read count as this process's memory until nothing of it is used any more. Once
most weights have been joined, packed or quantised, the few that are still used where they lie hold on to all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

from torch import Tensor

_MOST_UNUSED = 0.1  # of the mapped files; more than that is given back


def leave_mapped_files(model: Any) -> int:
    """Copies the weights that are used in mapped files, if much else lies there, which is given back so.

    Returns the bytes copied. Does nothing where the system does not say what is mapped.
    """
    ranges = _file_mappings()
    starts = [first for first, _ in ranges]
    inside: list[Tensor] = []
    touched: set[tuple[int, int]] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        index = bisect_right(starts, tensor.data_ptr()) - 1 if tensor.numel() else -1
        if index >= 0 and tensor.data_ptr() < ranges[index][1]:
            inside.append(tensor)
            touched.add(ranges[index])
    used = sum(tensor.nbytes for tensor in inside)
    if used >= (1 - _MOST_UNUSED) * sum(end - first for first, end in touched):
        return 0
    for tensor in inside:
        tensor.data = tensor.data.clone()
    return used


def _file_mappings() -> list[tuple[int, int]]:
    """Addresses of this process's memory that are a file's, in order."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            first, end = addresses.split("-")
            found.append((int(first, 16), int(end, 16)))
    return found
