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

    def __init__(self, capacity: PlanCapacity, device: torch.device, always_merges: bool = False):
        """always_merges: parts are merged even where a plan has none, as a captured graph needs it."""
        self.capacity = capacity
        self._always_merges = always_merges
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
        self._is_pinned = device.type == "cuda"
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self.has_merges = always_merges

    @classmethod
    def of(cls, plan: TilePlan, device: torch.device) -> DevicePlan:
        """Just large enough, and loaded."""
        made = cls(PlanCapacity.of(plan), device)
        made.load(plan)
        return made

    def load(self, plan: TilePlan) -> None:
        """Copies a plan to the device, behind the work that is queued there. It must fit (`capacity.holds`).

        The host's side is new each time: torch keeps page-locked memory until the copy from it is done.
        """
        assert self.capacity.holds(plan), "the plan is larger than the arrays on the device"
        self.has_merges = self._always_merges or len(plan.merge_rows) > 0
        host = torch.empty(len(self._device), dtype=torch.int32, pin_memory=self._is_pinned)
        arrays: dict[str, NDArray[np.integer]] = {
            "num_tiles": np.array([len(plan.tiles)]),
            "num_merge_rows": np.array([len(plan.merge_rows)]),
            "tiles": plan.tiles.reshape(-1),
            **{name: getattr(plan, name) for name in ("tile_rows", "tile_slots", "merge_rows", "merge_ptr")},
            **{name: getattr(plan, name) for name in ("entry_pages", "entry_positions", "entry_fills")},
        }
        for name, values in arrays.items():
            begin, _ = self._ranges[name]
            host.numpy()[begin : begin + len(values)] = values
        self._device.copy_(host, non_blocking=True)

    def array(self, name: str) -> Tensor:
        """One array, at its full capacity."""
        begin, end = self._ranges[name]
        return self._device[begin:end]
