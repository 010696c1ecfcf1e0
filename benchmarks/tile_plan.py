"""How long the tile planner takes for steps of many sizes: python -m benchmarks.tile_plan

CPU time of one thread, best of several runs, so that other work on the machine does not count.
"""

from __future__ import annotations

import time

import numpy as np
from batchllm_kernels.tile_plan import KvReads, TileShape, plan_tiles

_RUNS = 9
# Llama 3.1 8B
_SHAPE = TileShape(page_size=64, small_rows=16, large_rows=64, heads_per_row=4, head_programs=8)
_ROOT, _GROUP = 512, 1024  # tokens of the root and of each group's node


def decode_step(groups: int, rows_of_group: int, seed: int = 0) -> KvReads:
    """Decode rows below one root and a node for each group, with 32 to 480 tokens of their own."""
    rows = groups * rows_of_group
    own = np.random.default_rng(seed).integers(32, 480, rows)
    length = np.concatenate([[_ROOT], np.full(groups, _GROUP), own])
    page_ptr = np.concatenate([[0], np.cumsum(-(-length // _SHAPE.page_size))])
    readers = np.concatenate([[rows], np.full(groups, rows_of_group), np.ones(rows, dtype=np.int64)])
    return KvReads(
        positions=_ROOT + _GROUP + own - 1,
        start=np.concatenate([[0], np.full(groups, _ROOT), np.full(rows, _ROOT + _GROUP)]),
        length=length,
        page_ptr=page_ptr,
        pages=np.arange(page_ptr[-1]),
        row_ptr=np.concatenate([[0], np.cumsum(readers)]),
        rows=np.tile(np.arange(rows), 3),
    )


def milliseconds(reads: KvReads, window: int | None) -> float:
    times = []
    for _ in range(_RUNS):
        begin = time.thread_time()
        plan_tiles(reads, _SHAPE, window=window)
        times.append(time.thread_time() - begin)
    return min(times) * 1000


def main() -> None:
    print("rows  groups  window   tiles  entries  slots    ms")
    for groups, rows_of_group in ((64, 32), (16, 128), (1, 2048), (1024, 2), (8, 32)):
        reads = decode_step(groups, rows_of_group)
        for window in (None, 1024):
            plan = plan_tiles(reads, _SHAPE, window=window)
            print(
                f"{groups * rows_of_group:4}  {groups:6}  {window or '-':>6}  {len(plan.tiles):6}"
                f"  {len(plan.entry_pages):7}  {plan.num_slots:5}  {milliseconds(reads, window):4.2f}"
            )


if __name__ == "__main__":
    main()
