"""Calibrations kept from run to run: one small JSON file for each model, device and version of what runs it."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from batchllm_kernels.cpu.build import sources

from batchllm.core import SamplingParams
from batchllm.executor.native import native_kernels
from batchllm.planner.hardware import DeviceProfile, RateCurve
from batchllm.user_cache import user_cache_folder
from batchllm.versions import versions

if TYPE_CHECKING:
    from batchllm.executor.model import ModelRunner


def calibrated_profile(
    model: ModelRunner, fingerprint: str, params: SamplingParams, *, may_measure: bool
) -> DeviceProfile | None:
    """The profile of this device with this model: kept from an earlier run, else measured now if that is allowed.

    Nothing that goes wrong with the cache matters: then the device is measured again next time.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    profile = stored_profile(fingerprint, dtype, params)
    if profile is not None or not may_measure:
        return profile
    from batchllm.executor.calibrate import calibrate

    profile = calibrate(model, params)
    _write(_path(fingerprint, dtype, params), profile)
    return profile


def stored_profile(fingerprint: str, dtype: str, params: SamplingParams) -> DeviceProfile | None:
    """The same, without the model: None when it has not been measured yet."""
    if not os.path.isdir(_folder()):
        return None  # without looking for the kernels, which may have to be compiled
    return _read(_path(fingerprint, dtype, params))


def _folder() -> Path:
    return user_cache_folder() / "profiles"


def _path(fingerprint: str, dtype: str, params: SamplingParams) -> Path:
    """Named after everything that can change a measurement, of what is known."""
    parts = {
        "model": fingerprint,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "device": [platform.node(), platform.machine(), _cpu_name(), os.cpu_count()],
        "versions": versions(),
        "kernels": [xxhash.xxh3_64_hexdigest(sources()), native_kernels(torch.bfloat16) is not None],
        "sampling": [params.greedy, params.top_p < 1, params.top_k > 0, params.min_p > 0, params.logprobs],
        "profile": [field.name for field in fields(DeviceProfile)],
    }
    name = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
    return _folder() / f"{name}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read(path: Path) -> DeviceProfile | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        curves = {name: RateCurve(**_tuples(values[name])) for name in ("layer_rate", "logit_rate")}
        return DeviceProfile(**{**values, **curves})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _tuples(curve: dict[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(map(float, values)) for name, values in curve.items()}


def _write(path: Path, profile: DeviceProfile) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # two jobs may measure at the same time
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(profile), indent=1), encoding="utf-8")
        os.replace(temporary, path)
