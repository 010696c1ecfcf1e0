"""Times on a device, and what it does at best: bytes copied and matrix products a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, the mean of `repeats` after one that is not counted."""
    work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class Rates:
    """Measured."""

    copy_bytes: float  # a second, read and written together
    product_flops: float  # a second, square matrices in the model's dtype


def measure_rates(device: torch.device, dtype: torch.dtype, tiny: bool) -> Rates:
    size = 1 << (16 if tiny else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, 2 if tiny else 20)
    width = 64 if tiny else 8192
    left = torch.randn(width, width, dtype=dtype, device=device)
    product = seconds_of(lambda: left @ left, device, 2 if tiny else 20)
    return Rates(2 * size / copy, 2 * width**3 / product)
