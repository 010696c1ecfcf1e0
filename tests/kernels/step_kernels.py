"""The kernels of a step beside attention as their launchers compile them for common models, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchllm_kernels import gated_activation, rms_norm, rope_kv_write, sampler, token_logprobs
from batchllm_kernels.compile_check import Compiled, Compiler


@dataclass(frozen=True)
class StepKernel:
    """One way a kernel is compiled."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)

    def compile(self, compiler: Compiler, target: str) -> Compiled:
        # MI300's format of 8-bit floats is another one.
        signature = {
            name: kind.replace("fp8e4nv", "fp8e4b8") if target == "gfx942" else kind
            for name, kind in self.signature.items()
        }
        return compiler.compile_for(
            self.kernel, signature, self.constexprs, target, num_warps=self.num_warps, **self.options
        )

    def runs_on(self, target: str) -> bool:
        """sm_80 has no 8-bit floats."""
        return target != "sm_80" or not any("fp8" in kind for kind in self.signature.values())


def _rms_norm(width: int) -> StepKernel:
    signature = dict.fromkeys(("States", "Residual", "Weight", "Output"), "*bf16")
    signature |= dict.fromkeys(("stride_states", "stride_residual", "stride_output"), "i32:16")
    return StepKernel(
        rms_norm.rms_norm_kernel,
        signature | {"epsilon": "fp32"},
        {"WIDTH": width, "BLOCK": width, "HAS_RESIDUAL": True, "ONE_PLUS": False},
        num_warps=rms_norm.warps_for(width),
    )


def _gated(gelu: bool) -> StepKernel:
    return StepKernel(
        gated_activation.gated_activation_kernel,
        {"GateUp": "*bf16", "Output": "*bf16", "stride_gate_up": "i32:16", "stride_output": "i32:16"},
        {"WIDTH": 14336, "BLOCK": 1024, "GELU": gelu},
    )


def _rope(
    width: int,
    pool: str = "*bf16",
    with_norm: bool = False,
    half: int | None = None,
    interleaved: bool = False,
) -> StepKernel:
    half, quantised = half or width // 2, pool != "*bf16"
    kernel = rope_kv_write.rope_kv_write_kernel
    signature = dict.fromkeys(("Query", "Key", "Value", "Cos", "Sin", "Output"), "*bf16")
    signature |= {"KeyPool": pool, "ValuePool": pool, "Slots": "*i32", "Positions": "*i32", "epsilon": "fp32"}
    signature |= {name: "i32:16" for name in kernel.arg_names if name.startswith("stride")}
    constexprs: dict[str, Any] = {
        "QUERY_HEADS": 32,
        "KV_HEADS": 8,
        "WIDTH": width,
        "VALUE_WIDTH": width,
        "HALF": half,
        "PAGE": 64,
        "BLOCK_HEADS": 1024 // width,
        "BLOCK_HALF": half,
        "BLOCK_REST": width - 2 * half,
        "BLOCK_VALUE": width,
        "INTERLEAVED": interleaved,
        "BY_POSITION": True,
        "HAS_NORM": with_norm,
        "ONE_PLUS": False,
        "LARGEST": 448.0 if quantised else 0.0,
        "KEY_SCALE_STRIDE": 0,
        "VALUE_SCALE_STRIDE": 0,
    }
    for names, present, pointer in (
        (("QueryNorm", "KeyNorm"), with_norm, "*bf16"),
        (("KeyScale", "ValueScale"), quantised, "*fp32"),
    ):
        if present:
            signature |= dict.fromkeys(names, pointer)
        else:
            constexprs |= dict.fromkeys(names)
    return StepKernel(kernel, signature, constexprs, num_warps=2)


def _sampler(logits: str) -> StepKernel:
    pointers = {
        **dict.fromkeys(("Logits", "CandidateLogits"), f"*{logits}"),
        **dict.fromkeys(("CandidateTokens", "TopK"), "*i32"),
        **dict.fromkeys(("TopP", "MinP"), "*fp64"),
        **dict.fromkeys(("Keys", "Indices", "Output"), "*i64"),
        "Temperature": "*fp32",
    }
    block, candidates = sampler.block_and_candidates(128256)
    return StepKernel(
        sampler.sample_tokens_kernel,
        {**pointers, "stride_logits": "i32:16", "vocabulary": "i32:16"},
        {"CANDIDATES": candidates, "BLOCK": block},
        num_warps=8,
    )


def _logprobs_of_logits() -> StepKernel:
    return StepKernel(
        token_logprobs.token_logprobs_kernel,
        {
            **{"Logits": "*fp32", "Tokens": "*i64", "Logprobs": "*fp32"},
            **{"stride_logits": "i32:16", "vocabulary": "i32:16"},
        },
        {"BLOCK": 4096},
        num_warps=8,
    )


def _logprobs_of_hidden(softcap: bool) -> StepKernel:
    return StepKernel(
        token_logprobs.linear_token_logprobs_kernel,
        {
            **{"Hidden": "*bf16", "Weight": "*bf16", "Tokens": "*i64", "Chosen": "*fp32", "Sums": "*fp32"},
            **{"rows": "i32", "vocabulary": "i32:16", "stride_hidden": "i32:16", "stride_weight": "i32:16"},
            **{"tiles_of_part": "i32", "scale": "fp32", "softcap": "fp32"},
        },
        {
            **{"WIDTH": 4096, "SOFTCAP": softcap, "UPCAST": False},
            **{"TILE_TOKENS": 128, "TILE_VOCABULARY": 128, "TILE_WIDTH": 64},
        },
        num_warps=8,
        options={"num_stages": 3},
    )


STEP_KERNELS = {
    "rms_norm with residual, 4096 wide": _rms_norm(4096),
    "rms_norm with residual, 8192 wide": _rms_norm(8192),
    "gated_activation, SiLU": _gated(gelu=False),
    "gated_activation, GELU": _gated(gelu=True),
    "rope_kv_write, 32/8 heads of 128": _rope(128),
    "rope_kv_write, heads normalised": _rope(128, with_norm=True),
    "rope_kv_write, heads normalised, fp8 pool": _rope(128, "*fp8e4nv", with_norm=True),
    "rope_kv_write, half of each head rotated, interleaved": _rope(128, half=32, interleaved=True),
    "rope_kv_write, heads of 64": _rope(64),
    "rope_kv_write, heads of 256 normalised": _rope(256, with_norm=True),
    "sample_tokens, float32": _sampler("fp32"),
    "sample_tokens, bfloat16": _sampler("bf16"),
    "token_logprobs": _logprobs_of_logits(),
    "linear_token_logprobs": _logprobs_of_hidden(softcap=False),
    "linear_token_logprobs, softcap": _logprobs_of_hidden(softcap=True),
}
