"""How attend_tiles is compiled for a model's heads on a device: tile sizes, warps, pipeline stages.

The figures behind each choice (registers, shared memory, programs a multiprocessor holds) are in docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchllm_kernels.tile_plan import TileShape

_WIDE = 128  # head dims beyond this need smaller pages and more warps
_SMALL_ROWS = 16


@dataclass(frozen=True)
class TileConfig:
    """Compile options of one attend_tiles kernel."""

    page_size: int
    small_rows: int
    large_rows: int
    group_splits: int
    num_warps: int
    stages: int
    descriptors: bool  # pages are fetched by the tensor memory accelerator (Hopper and later)

    def tile_shape(self, heads: int, kv_heads: int) -> TileShape:
        """What the planner has to know."""
        heads_per_row = -(-heads // kv_heads // self.group_splits)
        return TileShape(
            self.page_size, self.small_rows, self.large_rows, heads_per_row, kv_heads * self.group_splits
        )


def best_page_size(dim: int, value_dim: int) -> int:
    """Tokens a page for a model whose heads have these sizes."""
    return 64 if _padded(max(dim, value_dim)) <= _WIDE else 32


def tile_config(
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    target: str,
    page_size: int | None = None,
    float32: bool = False,
) -> TileConfig:
    """target: "sm_90", "sm_80", "gfx942", ... as `compile_check.TARGETS`; "cpu" for the interpreter.
    page_size: of a pool that is there already; a power of two, at least 16. float32: products are in float32.

    Stages: page ids are loaded before pages, and Triton shares the stages between the two: 5 gives two buffers of KV,
    3 only one. Chips that fetch pages by pointer keep addresses in registers: smaller tiles, or registers spill.

    Exact float32 products run on no tensor core of NVIDIA's: each thread reads whole rows of both operands, which only
    small tiles and pages that are not fetched ahead leave registers for. Programs side by side wait for memory instead.
    """
    wide = _padded(max(dim, value_dim)) > _WIDE
    is_nvidia = target.startswith("sm_")
    descriptors = is_nvidia and int(target[3:].rstrip("af")) >= 90
    large_rows = 64 if descriptors else 32
    num_warps, stages = 8 if wide else 4, 5 if descriptors else 3 if is_nvidia else 2
    if float32 and target != "cpu":
        large_rows, num_warps, stages = _SMALL_ROWS, 8 if is_nvidia else 4, 1
    return TileConfig(
        page_size=page_size or best_page_size(dim, value_dim),
        small_rows=_SMALL_ROWS,
        large_rows=large_rows,
        group_splits=-(-heads // kv_heads // large_rows),
        num_warps=num_warps,
        stages=stages,
        descriptors=descriptors,
    )


def _padded(dim: int) -> int:
    """The power of two that a dimension is computed with."""
    return 1 << (dim - 1).bit_length()
