"""Launches tree attention: attend_tiles, then merge_parts where rows have several parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batchllm_kernels.device_plan import DevicePlan
from batchllm_kernels.interpreter import INTERPRETED
from batchllm_kernels.merge import merge_parts
from batchllm_kernels.tile_config import TileConfig
from batchllm_kernels.tree_attention import attend_tiles

_MERGE_HEADS = 8  # heads a program of merge_parts handles
_DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer's attention does to scores and values."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Parts:
    """Room for the parts of rows that are in several tiles; all layers may share it."""

    output: Tensor  # [slots, Hq, Dv]
    lse: Tensor  # [slots, Hq] float32

    @classmethod
    def empty(cls, slots: int, heads: int, value_dim: int, like: Tensor) -> Parts:
        """For queries like `like`. Parts of 16-bit models are float16: finer than bfloat16, half of float32."""
        dtype = torch.float32 if like.dtype == torch.float32 else torch.float16
        return cls(
            torch.empty(slots, heads, value_dim, dtype=dtype, device=like.device),
            torch.empty(slots, heads, dtype=torch.float32, device=like.device),
        )


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    plan: DevicePlan,
    config: TileConfig,
    options: AttentionOptions,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    parts: Parts | None = None,
) -> Tensor:
    """query [T, Hq, Dk]; keys [pages, Hkv, page_size, Dk] and values [..., Dv] of the pool; positions int32 [T];
    sinks [Hq] → [T, Hq, Dv] in query's dtype.

    scales: float32 [Hkv] or [1] each, what stored keys and values are multiplied with; for a float8 pool.
    Any strides, as long as the last dimension is contiguous. `plan` must have been made with
    `config.tile_shape` and the window of `options`. Rows that no tile holds are left as they are in memory.
    """
    rows, heads, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[-1]
    assert keys.shape[2] == values.shape[2] == config.page_size, "the pool's pages are not the plan's"
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1, (
        "the last dimension is not contiguous"
    )
    output = torch.empty(rows, heads, value_dim, dtype=query.dtype, device=query.device)
    parts = parts or Parts.empty(plan.capacity.slots, heads, value_dim, query)
    (key_pool, key_strides), (value_pool, value_strides) = _pools(keys, values, config)
    attend_tiles[(plan.capacity.tiles * kv_heads * config.group_splits,)](
        query,
        key_pool,
        value_pool,
        output,
        parts.output,
        parts.lse,
        parts.lse if sinks is None else sinks,
        plan.array("tiles"),
        plan.array("num_tiles"),
        plan.array("tile_rows"),
        plan.array("tile_slots"),
        positions,
        plan.array("entry_pages"),
        plan.array("entry_positions"),
        plan.array("entry_fills"),
        *(scales or (parts.lse, parts.lse)),
        options.scale,
        options.softcap or 1.0,
        query.stride(0),
        query.stride(1),
        *key_strides,
        *value_strides,
        output.stride(0),
        output.stride(1),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_SPLITS=config.group_splits,
        DIM=dim,
        VALUE_DIM=value_dim,
        PAGE=config.page_size,
        SMALL_ROWS=config.small_rows,
        LARGE_ROWS=config.large_rows,
        WINDOW=options.window or 0,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_SCALES=scales is not None,
        SCALE_STRIDE=int(scales is not None and scales[0].numel() > 1),
        DESCRIPTORS=isinstance(key_pool, TensorDescriptor),
        DOT_TYPE=_dot_type(query, keys),
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    if plan.has_merges:
        merge_parts[(plan.capacity.merge_rows, triton.cdiv(heads, _MERGE_HEADS))](
            parts.output,
            parts.lse,
            output,
            parts.lse if sinks is None else sinks,
            plan.array("merge_rows"),
            plan.array("merge_ptr"),
            plan.array("num_merge_rows"),
            output.stride(0),
            output.stride(1),
            HEADS=heads,
            BLOCK_HEADS=_MERGE_HEADS,
            DIM=value_dim,
            HAS_SINKS=sinks is not None,
            num_warps=2,
        )
    return output


def _dot_type(query: Tensor, keys: Tensor) -> Any:
    """Operands of the matrix products: the pool's type; float16 for a float8 pool, which converts in one step."""
    if INTERPRETED:
        return tl.float32
    return _DOT_TYPES.get(keys.dtype, _DOT_TYPES[query.dtype] if query.dtype == torch.float32 else tl.float16)


_Pool = tuple[Any, tuple[int, int, int]]


def _pools(keys: Tensor, values: Tensor, config: TileConfig) -> tuple[_Pool, _Pool]:
    """What the kernel takes as pools [pages, Hkv, page_size, D], and three strides to find a page of a head in each."""
    if config.descriptors:
        described_keys, described_values = _described(keys, config), _described(values, config)
        if described_keys and described_values:
            return described_keys, described_values
    return (keys, keys.stride()[:3]), (values, values.stride()[:3])


def _described(pool: Tensor, config: TileConfig) -> _Pool | None:
    """A descriptor of the pool as a matrix of tokens, whose blocks are pages of one head; and by how many rows a page
    and a head, and by how many columns a head lies further on. None if its strides do not allow one.

    The accelerator fills columns beyond D with zeros, which pads D to a power of two, 16 at least.
    """
    pages, heads, _, dim = pool.shape
    page_stride, head_stride, token_stride = pool.stride()[:3]
    block = [config.page_size, max(16, triton.next_power_of_2(dim))]
    by_columns = heads > 1 and head_stride < token_stride
    row_strides = (page_stride,) if by_columns else (page_stride, head_stride)
    aligned = token_stride * pool.element_size() % 16 == 0 and pool.data_ptr() % 16 == 0
    if not aligned or any(stride % token_stride for stride in row_strides):
        return None
    if by_columns and (dim != block[1] or heads * head_stride > token_stride):
        return None  # columns beyond D are the next head's
    page_rows = page_stride // token_stride
    head_rows = 0 if by_columns else head_stride // token_stride
    shape = [
        (pages - 1) * page_rows + (heads - 1) * head_rows + config.page_size,
        (heads - 1) * head_stride + dim,
    ]
    if not by_columns:
        shape[1] = dim
    matrix = pool.as_strided(shape, [token_stride, 1])
    return TensorDescriptor.from_tensor(matrix, block), (
        page_rows,
        head_rows,
        head_stride if by_columns else 0,
    )
