"""attend_tiles and merge_parts as the models we run would compile them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl
from batchllm_kernels.compile_check import Compiled, Compiler
from batchllm_kernels.merge import merge_parts
from batchllm_kernels.tile_config import TileConfig, tile_config
from batchllm_kernels.tree_attention import attend_tiles


@dataclass(frozen=True)
class Variant:
    """Heads and features of a model's attention."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    value_dim: int = 0  # 0: as dim
    kv_type: str = "bf16"
    window: int = 0
    softcap: bool = False
    sinks: bool = False

    @property
    def values(self) -> int:
        return self.value_dim or self.dim

    def config(self, target: str) -> TileConfig:
        return tile_config(
            self.heads, self.kv_heads, self.dim, self.values, target, float32=self.kv_type == "fp32"
        )


# What a default run uses, by the models it is for.
VARIANTS = {
    "128, 4 heads a group (Llama 3.1 8B, Qwen3 4B)": Variant(),
    "128, 4 heads, float8": Variant(kv_type="fp8e4nv"),
    "128, 4 heads, window (Mistral)": Variant(window=4096),
    "128, 8 heads (Qwen3 30B A3B, Llama 70B)": Variant(heads=32, kv_heads=4),
    "128, 7 heads (Qwen2.5 7B)": Variant(heads=28, kv_heads=4),
    "128, 1 head (Llama 2)": Variant(kv_heads=32),
    "128, soft cap and window (Gemma 2 27B)": Variant(kv_heads=16, softcap=True, window=4096),
    "64, 4 heads (Llama 3.2 1B)": Variant(dim=64),
    "64, 8 heads, sinks and window (gpt-oss)": Variant(heads=64, dim=64, sinks=True, window=128),
    "80, 1 head (Phi-2)": Variant(kv_heads=32, dim=80),
    "96, 1 head (Phi-3 mini)": Variant(kv_heads=32, dim=96),
    "256, 2 heads, soft cap and window (Gemma 2 9B)": Variant(
        heads=16, kv_heads=8, dim=256, softcap=True, window=4096
    ),
    "192 keys, 128 values (DeepSeek)": Variant(kv_heads=32, dim=192, value_dim=128),
    "8, 2 heads (tiny models of tests)": Variant(heads=4, kv_heads=2, dim=8),
}
FLOAT32_VARIANTS = {
    "float32, 128, 4 heads": Variant(kv_type="fp32"),
    "float32, 128, 7 heads": Variant(heads=28, kv_heads=4, kv_type="fp32"),
    "float32, 64, 8 heads, sinks and window": replace(
        VARIANTS["64, 8 heads, sinks and window (gpt-oss)"], kv_type="fp32"
    ),
    "float32, 256, 2 heads, soft cap and window": replace(
        VARIANTS["256, 2 heads, soft cap and window (Gemma 2 9B)"], kv_type="fp32"
    ),
    "float32, 192 keys, 128 values": replace(VARIANTS["192 keys, 128 values (DeepSeek)"], kv_type="fp32"),
    "float32, 8, 2 heads": replace(VARIANTS["8, 2 heads (tiny models of tests)"], kv_type="fp32"),
}
_DOT_TYPES = {
    "fp32": tl.float32,
    "bf16": tl.bfloat16,
    "fp16": tl.float16,
    "fp8e4nv": tl.float16,
    "fp8e4b8": tl.float16,
}


def compile_attention(compiler: Compiler, variant: Variant, target: str, **changes: Any) -> Compiled:
    """`changes` replace fields of the target's TileConfig."""
    config = TileConfig(**{**vars(variant.config(target)), **changes})
    integers = (
        "tiles", "num_tiles", "tile_rows", "tile_slots", "positions", "entry_pages", "entry_positions", "entry_fills"
    )  # fmt: skip
    stride = "i32:16" if variant.dim % 16 == variant.values % 16 == 0 else "i32"
    strides = [name for name in attend_tiles.arg_names if name.endswith("_stride")]
    model, parts = ("*fp32", "*fp32") if variant.kv_type == "fp32" else ("*bf16", "*fp16")
    signature = {
        "query": model,
        "keys": _pool(variant.kv_type, config, variant.dim),
        "values": _pool(variant.kv_type, config, variant.values),
        "output": model,
        "part_output": parts,
        "part_lse": "*fp32",
        "sinks": model,
        **dict.fromkeys(integers, "*i32"),
        **dict.fromkeys(("key_scales", "value_scales"), "*fp32"),
        **dict.fromkeys(("score_scale", "softcap"), "fp32"),
        **dict.fromkeys(strides, stride),
    }
    constexprs = {
        "KV_HEADS": variant.kv_heads,
        "GROUP": variant.heads // variant.kv_heads,
        "GROUP_SPLITS": config.group_splits,
        "DIM": variant.dim,
        "VALUE_DIM": variant.values,
        "PAGE": config.page_size,
        "SMALL_ROWS": config.small_rows,
        "LARGE_ROWS": config.large_rows,
        "WINDOW": variant.window,
        "HAS_SOFTCAP": variant.softcap,
        "HAS_SINKS": variant.sinks,
        "HAS_SCALES": variant.kv_type.startswith("fp8"),
        "SCALE_STRIDE": 1,
        "DESCRIPTORS": config.descriptors,
        "DOT_TYPE": _DOT_TYPES[variant.kv_type],
        "STAGES": config.stages,
    }
    return compiler.compile_for(attend_tiles, signature, constexprs, target, num_warps=config.num_warps)


def compile_merge(
    compiler: Compiler, target: str, heads: int = 32, dim: int = 128, float32: bool = False
) -> Compiled:
    model = "*fp32" if float32 else "*bf16"
    signature = {
        "part_output": "*fp32" if float32 else "*fp16",
        "part_lse": "*fp32",
        "output": model,
        "sinks": model,
        **dict.fromkeys(("merge_rows", "merge_ptr", "num_rows"), "*i32"),
        **dict.fromkeys(("output_row_stride", "output_head_stride"), "i32:16"),
    }
    constexprs = {"HEADS": heads, "BLOCK_HEADS": 8, "DIM": dim, "HAS_SINKS": False}
    return compiler.compile_for(merge_parts, signature, constexprs, target, num_warps=2)


def _pool(kv_type: str, config: TileConfig, dim: int) -> str:
    columns = max(16, 1 << (dim - 1).bit_length())
    return f"tensordesc<{kv_type}[{config.page_size},{columns}]>" if config.descriptors else f"*{kv_type}"
