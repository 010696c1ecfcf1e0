"""Counter-based random numbers on the device: the number at (key, index) depends on nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), with the counters, key and
conversion of BatchLLM's CPU path, so both draw the very same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchllm_kernels import interpreter  # noqa: F401 - prepares the interpreter where it runs the kernels

_BLOCK = 128


def uniform_numbers(keys: Tensor, indices: Tensor) -> Tensor:
    """keys int64 [n, 2] (the bits of 128-bit keys), indices int64 [n] → float64 [n] in (0, 1), 53 bits each."""
    assert keys.shape == (len(indices), 2) and keys.is_contiguous() and indices.is_contiguous()
    numbers = torch.empty(len(indices), dtype=torch.float64, device=keys.device)
    if len(indices):
        uniform_numbers_kernel[(triton.cdiv(len(indices), _BLOCK),)](
            keys, indices, numbers, len(indices), BLOCK=_BLOCK
        )
    return numbers


@triton.jit
def uniform_number(first, second, index):
    """int64 key halves and token index → float64 in (0, 1)."""
    first, second = first.to(tl.uint64, bitcast=True), second.to(tl.uint64, bitcast=True)
    mixed = first ^ second
    high, low, _, _ = tl.philox(
        (second & 0xFFFFFFFF) | (mixed << 32),
        index.to(tl.uint32),
        (first >> 32).to(tl.uint32),
        first.to(tl.uint32),
        (second >> 32).to(tl.uint32),
    )
    bits = (high.to(tl.uint64) << 21) ^ (low.to(tl.uint64) >> 11)
    return (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def uniform_numbers_kernel(Keys, Indices, Numbers, count, BLOCK: tl.constexpr):
    """BLOCK numbers per program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    first = tl.load(Keys + 2 * row, mask=inside, other=0)
    second = tl.load(Keys + 2 * row + 1, mask=inside, other=0)
    index = tl.load(Indices + row, mask=inside, other=0)
    tl.store(Numbers + row, uniform_number(first, second, index), mask=inside)
