"""Attention over contiguous stretches of KV on a CPU: the binding of `attention.c`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchllm_kernels.cpu.arguments import check_memory

MAX_VALUE_DIM = 512  # what a tile works in should stay in the second-level cache


@dataclass(frozen=True)
class TiledReads:
    """What the rows of a step read, in tiles of rows. All arrays are int64 and contiguous."""

    token: NDArray[np.int64]  # [R] index of each row's token in the step
    position: NDArray[np.int64]  # [R] its absolute position
    tile_first: NDArray[np.int64]  # [tiles + 1] rows of tile i: tile_first[i] .. tile_first[i + 1]
    segment_ptr: NDArray[np.int64]  # [tiles + 1] segments of tile i
    segments: NDArray[np.int64]  # [S, 5] first row, last row, first slot, position of that slot, length


class AttentionJob(ctypes.Structure):
    """As Job in job.h."""

    kept: tuple[object, ...]  # what its addresses belong to

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "sinks")),
        *((name, ctypes.c_void_p) for name in ("token", "position", "tile_first", "segment_ptr", "segments")),
        *((name, ctypes.c_int64) for name in ("query_token", "query_head", "key_slot", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_slot", "value_head", "output_token", "output_head")),
        *(
            (name, ctypes.c_int64)
            for name in ("tiles", "kv_heads", "group", "key_dim", "value_dim", "window")
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def make_job(
    reads: TiledReads,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> AttentionJob:
    """The attention of all rows of `reads`, to be written to `output`. The job keeps what it is given.

    query [T, Hq, D], keys [slots, Hkv, D], values [slots, Hkv, Dv], output [T, Hq, Dv]: bfloat16, last dimension
    contiguous, other strides as they are; Hq a multiple of Hkv, D even. sinks: float32 [Hq], contiguous. A row at
    position p sees positions p - window + 1 .. p of its segments, and must see at least one.
    """
    heads, kv_heads = query.shape[1], keys.shape[1]
    job = AttentionJob(
        query=query.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        output=output.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        token=reads.token.ctypes.data,
        position=reads.position.ctypes.data,
        tile_first=reads.tile_first.ctypes.data,
        segment_ptr=reads.segment_ptr.ctypes.data,
        segments=reads.segments.ctypes.data,
        query_token=query.stride(0),
        query_head=query.stride(1),
        key_slot=keys.stride(0),
        key_head=keys.stride(1),
        value_slot=values.stride(0),
        value_head=values.stride(1),
        output_token=output.stride(0),
        output_head=output.stride(1),
        tiles=len(reads.tile_first) - 1,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_dim=query.shape[2],
        value_dim=values.shape[2],
        window=window or 0,
        scale=scale,
        softcap=softcap or 0.0,
    )
    job.kept = (reads, query, keys, values, output, sinks)
    return job


def attend(kernels: ctypes.CDLL, job: AttentionJob) -> None:
    """Does a job of `make_job`. Raises MemoryError."""
    check_memory(kernels.batchllm_attention(ctypes.byref(job)), "attention")
