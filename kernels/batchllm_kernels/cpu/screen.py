"""The largest output of a linear layer without computing all of them: the binding of `screen.c` and `bytes.c`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import address, check_memory, counts, rows_of_pairs
from batchllm_kernels.cpu.large_pages import zeros_in_large_pages
from batchllm_kernels.cpu.linear import PANEL

_ABOUT = 4  # as in bytes.h


class _Screen(ctypes.Structure):
    """As Screen in screen.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bytes", "about", "tokens")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "input_row")),
    ]


class ByteWeights(NamedTuple):
    """Weights in 8-bit integers, a byte each, and what is known of their rounding."""

    bytes: Tensor  # int32 [panels, ceil(inputs / 4), 64] four weights of an output
    about: Tensor  # float32 [panels, 4, 64]


def can_screen(kernels: ctypes.CDLL) -> bool:
    """Whether this CPU multiplies bytes (AVX-512 VNNI)."""
    return bool(kernels.batchllm_has_byte_products())


def pack_bytes(kernels: ctypes.CDLL, packed: Tensor) -> ByteWeights | None:
    """From weights of `pack_panels`; None where they are not numbers, or larger than any model's."""
    panels, pairs, _ = packed.shape
    steps = (pairs + 1) // 2
    found = ByteWeights(
        zeros_in_large_pages(panels * steps * PANEL, torch.int32).view(panels, steps, PANEL),
        zeros_in_large_pages(panels * _ABOUT * PANEL, torch.float32).view(panels, _ABOUT, PANEL),
    )
    fits = kernels.batchllm_pack_bytes(*map(address, (packed, *found)), *counts(panels, pairs))
    return found if fits else None


def first_largest(
    kernels: ctypes.CDLL, states: Tensor, packed: Tensor, weights: ByteWeights, outputs: int
) -> Tensor:
    """states bfloat16 [n, inputs] → int64 [n], the first largest of each row of `linear(states, packed, outputs)`.

    -1 where too many outputs are too close to the largest, or where states are 0, no numbers or very large.
    """
    states = rows_of_pairs(states)
    assert states.dtype == torch.bfloat16 and states.shape[1] == 2 * packed.shape[1]
    tokens = torch.empty(len(states), dtype=torch.int64)
    screen = _Screen(
        input=states.data_ptr(),
        weight=packed.data_ptr(),
        bytes=weights.bytes.data_ptr(),
        about=weights.about.data_ptr(),
        tokens=tokens.data_ptr(),
        rows=len(states),
        inputs=states.shape[1],
        outputs=outputs,
        input_row=states.stride(0),
    )
    check_memory(kernels.batchllm_screen(ctypes.byref(screen)), "the choice of greedy tokens")
    return tokens
