"""Small kernels with known properties, to test the tests' machinery."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(Input, Output, stride, SIZE: tl.constexpr, FACTOR: tl.constexpr = 2.0):
    """One row per program, times FACTOR."""
    offsets = tl.program_id(0) * stride + tl.arange(0, SIZE)
    tl.store(Output + offsets, tl.load(Input + offsets) * FACTOR)


@triton.jit
def square_product(Input, Output, SIZE: tl.constexpr):
    """Output = Input @ Input, [SIZE, SIZE]: needs tensor cores, and registers by the hundred when SIZE is large."""
    rows = tl.arange(0, SIZE)
    offsets = rows[:, None] * SIZE + rows[None, :]
    tile = tl.load(Input + offsets)
    tl.store(Output + offsets, tl.dot(tile, tile))


@triton.jit
def count_up(Limit, Output):
    """Output[0] = Limit[0], by a loop whose bound is loaded."""
    count = 0
    for _ in tl.range(0, tl.load(Limit)):
        count += 1
    tl.store(Output, count)
