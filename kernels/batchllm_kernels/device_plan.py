"""A tile plan on the device: one buffer, one copy from the host, room for larger plans to come.

A captured CUDA graph reads the same addresses in each replay, so arrays have a fixed capacity and the kernels read
from the device how much of each is used.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm_kernels.tile_plan import TILE_COLUMNS, TilePlan

_ALIGNMENT = 16  # int32 values: every array begins at a multiple of 64 bytes, so that loads are vectorised


@dataclass(frozen=True)
class PlanCapacity:
    """How large a plan fits."""

    tiles: int
    tile_rows: int
    entries: int
    merge_rows: int
    slots: int

    @classmethod
    def of(cls, plan: TilePlan, room: float = 1.0) -> PlanCapacity:
        """What `plan` needs, times `room`."""
        sizes = (
            len(plan.tiles),
            len(plan.tile_rows),
            len(plan.entry_pages),
            len(plan.merge_rows),
            plan.num_slots,
        )
        return cls(*(max(1, int(np.ceil(size * room))) for size in sizes))

    def holds(self, plan: TilePlan) -> bool:
        return all(have >= need for have, need in zip(astuple(self), astuple(PlanCapacity.of(plan))))


class DevicePlan:
    """The arrays of a TilePlan as int32 tensors. `load` replaces them in place."""

    def __init__(self, capacity: PlanCapacity, device: torch.device):
        self.capacity = capacity
        sizes = {
            "num_tiles": 1,
            "num_merge_rows": 1,
            "tiles": capacity.tiles * TILE_COLUMNS,
            "tile_rows": capacity.tile_rows,
            "tile_slots": capacity.tile_rows,
            "entry_pages": capacity.entries,
            "entry_positions": capacity.entries,
            "entry_fills": capacity.entries,
            "merge_rows": capacity.merge_rows,
            "merge_ptr": capacity.merge_rows + 1,
        }
        self._ranges: dict[str, tuple[int, int]] = {}
        total = 0
        for name, size in sizes.items():
            self._ranges[name] = (total, total + size)
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self.has_merges = False

    @classmethod
    def of(cls, plan: TilePlan, device: torch.device) -> DevicePlan:
        """Just large enough, and loaded."""
        made = cls(PlanCapacity.of(plan), device)
        made.load(plan)
        return made

    def load(self, plan: TilePlan) -> None:
        """Copies a plan to the device. It must fit (`capacity.holds`); the copy before must have ended."""
        assert self.capacity.holds(plan), "the plan is larger than the arrays on the device"
        self.has_merges = len(plan.merge_rows) > 0
        self._write("num_tiles", np.array([len(plan.tiles)]))
        self._write("num_merge_rows", np.array([len(plan.merge_rows)]))
        self._write("tiles", plan.tiles.reshape(-1))
        for name in ("tile_rows", "tile_slots", "entry_pages", "entry_positions", "entry_fills"):
            self._write(name, getattr(plan, name))
        self._write("merge_rows", plan.merge_rows)
        self._write("merge_ptr", plan.merge_ptr)
        self._device.copy_(self._host, non_blocking=True)

    def _write(self, name: str, values: NDArray[np.integer]) -> None:
        begin, _ = self._ranges[name]
        self._host.numpy()[begin : begin + len(values)] = values

    def array(self, name: str) -> Tensor:
        """One array, at its full capacity."""
        begin, end = self._ranges[name]
        return self._device[begin:end]
