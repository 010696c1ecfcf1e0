"""Host arrays to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """int64 tensors on the device, parts of one buffer that is copied in one piece.

    The copy is queued behind the device's work. Its page-locked source is torch's to keep until it is done.
    """
    if device.type != "cuda":
        return [torch.from_numpy(np.array(array)) for array in arrays]
    lengths = [len(array) for array in arrays]
    host = torch.empty(sum(lengths), dtype=torch.int64, pin_memory=True)
    if len(host):
        np.concatenate(arrays, out=host.numpy())
    return list(torch.split(host.to(device, non_blocking=True), lengths))


def upload_as(array: NDArray[np.generic], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One array as a tensor of `dtype` on the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
