"""What `auto` stands for in engine.max_step_tokens and engine.kv_memory: the same for a run and for its forecast."""

from __future__ import annotations

CPU_STEP_TOKENS = 2048
GPU_STEP_TOKENS = 8192
CPU_KV_SHARE = 0.5  # of the memory that is free beside the weights


def step_tokens(max_step_tokens: int | str, *, gpu: bool = False) -> int:
    """As the job says, else what suits the device."""
    if isinstance(max_step_tokens, int):
        return max_step_tokens
    return GPU_STEP_TOKENS if gpu else CPU_STEP_TOKENS


def cpu_kv_bytes(kv_memory: int | str, free_bytes: int) -> int:
    """As the job says, else a share of what is free with the weights loaded."""
    return kv_memory if isinstance(kv_memory, int) else max(0, int(free_bytes * CPU_KV_SHARE))
