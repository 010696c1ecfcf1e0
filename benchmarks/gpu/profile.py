"""Where the device's time goes in a job, by kind of kernel, and what of the wall time no kernel ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS = {
    "attention": ("attend_tiles", "merge_parts", "scaled_dot_product", "flash"),
    "rope and KV write": ("rope_kv_write",),
    "norms": ("rms_norm",),
    "activation": ("gated_activation",),
    "sampling": ("sample_tokens", "argmax", "token_logprobs", "ArgMax"),
    "products": ("gemm", "nvjet", "cutlass", "aten::mm", "aten::addmm", "aten::linear", "grouped_mm"),
    "copies": ("Memcpy", "memcpy", "Memset", "aten::copy_"),
}


def shares(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds by kind of kernel during `work`."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    started = time.perf_counter()
    with profile(activities=activities) as recorded:
        work()
    wall = time.perf_counter() - started
    seconds: dict[str, float] = dict.fromkeys([*_KINDS, "other"], 0.0)
    for event in recorded.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next(
            (kind for kind, names in _KINDS.items() if any(name in event.key for name in names)), "other"
        )
        seconds[kind] += micros * 1e-6
    return {"wall_seconds": wall, "idle_seconds": max(0.0, wall - sum(seconds.values())), **seconds}
