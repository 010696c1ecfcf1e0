"""What a device can do, in figures: ready profiles of known ones, and the form in which a calibration is kept.

Data sheets state what a chip could do at best. What a matrix product, a copy and an attention kernel reach was measured
on an H200 (bfloat16 products 769-798 TFLOP/s of 989, copies 4.3 TB/s of 4.8); the same fractions are assumed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import JobError
from batchllm.suggest import nearest

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES_PER_VALUE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# Fractions of the data sheet, from the H200 figures above; attention: Triton kernels of FlashAttention's kind.
_MATMUL, _COPY, _ATTENTION = 0.79, 0.9, 0.4
_USABLE_MEMORY = 0.9  # the rest is activations, the allocator and the driver


@dataclass(frozen=True, slots=True)
class RateCurve:
    """FLOP/s of a matrix product with so many rows: straight lines over log(rows), level outside."""

    rows: tuple[float, ...]
    flops: tuple[float, ...]

    def at(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        known = np.log(np.asarray(self.rows))
        rates: NDArray[np.float64] = np.exp(
            np.interp(np.log(np.maximum(rows, 1.0)), known, np.log(np.asarray(self.flops)))
        )
        return rates


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Seconds are for one device; FLOP/s and bytes/s are what is reached, not what a data sheet says."""

    name: str
    layer_rate: RateCurve  # a layer without its attention, by tokens of the step
    logit_rate: RateCurve  # the output projection, by rows
    weight_bandwidth: float  # bytes/s of weights read by a product that is too small to hide it
    shared_flops: float  # attention of all tokens below a shared node to it
    own_flops: float  # attention of tokens to their own stretch
    kv_bandwidth: float  # bytes/s of keys and values read
    overlapped: bool  # attention arithmetic hides reads of KV (GPU), or adds to them (measured so on CPUs)
    step_seconds: float  # fixed, of a step
    layer_seconds: float  # fixed, of a layer: kernel launches
    read_seconds: float  # of a shared node that is read, in a layer
    token_seconds: float  # of a token in a layer beside the products: writing its KV, packing queries
    chunk_seconds: float  # of a chunk in a step: scheduling, finding what it reads
    row_seconds: float  # of a sampled row: the choice of a token
    memory_bytes: int | None = None  # for weights and KV; None: not known
    calibrated: bool = False  # measured with this model on this device
    short_last_layer: bool = (
        False  # the last layer works only for tokens with logits, but for its keys and values
    )


@dataclass(frozen=True, slots=True)
class _DataSheet:
    """Dense figures of the maker's data sheet: TFLOP/s, TB/s, GB."""

    name: str
    half_tflops: float
    single_tflops: float
    bandwidth: float
    memory: int


_SHEETS = {
    # nvidia.com, H100 data sheet, SXM: 989 TFLOP/s bfloat16 (without sparsity), 67 float32, 3.35 TB/s, 80 GB
    "h100": _DataSheet("H100 SXM", 989, 67, 3.35, 80),
    # nvidia.com, H200 data sheet, SXM: the same chip, 4.8 TB/s, 141 GB
    "h200": _DataSheet("H200 SXM", 989, 67, 4.8, 141),
    # nvidia.com, A100 data sheet, SXM 80 GB: 312 TFLOP/s bfloat16, 19.5 float32, 2.04 TB/s
    "a100": _DataSheet("A100 SXM 80 GB", 312, 19.5, 2.04, 80),
    # nvidia.com, L40S data sheet: 362 TFLOP/s bfloat16 (without sparsity), 91.6 float32, 864 GB/s, 48 GB
    "l40s": _DataSheet("L40S", 362, 91.6, 0.864, 48),
    # amd.com, Instinct MI300X data sheet: 1307 TFLOP/s bfloat16, 163 float32, 5.3 TB/s, 192 GB
    "mi300x": _DataSheet("MI300X", 1307, 163, 5.3, 192),
}
NAMES = (*_SHEETS, "cpu")

# Estimates, to be replaced by measurements once the engine runs on a GPU: a step is scheduled and sampled in a
# millisecond, a layer is some ten launches from a graph.
_GPU_STEP, _GPU_LAYER, _GPU_CHUNK, _GPU_ROW = 1e-3, 1.5e-5, 1e-6, 1e-6

# Of one thread of a server CPU with AVX-512 (measured on AMD EPYC: products 41-80 GFLOP/s in float32 and 140-207 in
# bfloat16, the attention kernel 65-78 in both, some 10 GB/s; small products reach a fraction of that).
_CPU_SINGLE, _CPU_HALF, _CPU_ATTENTION, _CPU_BANDWIDTH = 60e9, 130e9, 60e9, 10e9
_CPU_MEMORY_CHANNELS = 12  # threads that bandwidth grows with


def ready_profile(name: str, dtype: str, threads: int = 1) -> DeviceProfile:
    """A profile by name, in any case. `threads` is for cpu. Raises JobError for a name that is not known."""
    key = name.strip().lower()
    if key == "cpu":
        return cpu_profile(dtype, threads)
    if key not in _SHEETS:
        hint = nearest(key, NAMES)
        meant = f"did you mean {hint}?" if hint else "choose from " + ", ".join(NAMES)
        raise JobError(f"--hardware: {name} is not a device with a ready profile; {meant}")
    sheet = _SHEETS[key]
    peak = 1e12 * (sheet.single_tflops if dtype == "float32" else sheet.half_tflops)
    products = RateCurve((1.0,), (peak * _MATMUL,))
    bandwidth = sheet.bandwidth * 1e12 * _COPY
    return DeviceProfile(
        name=sheet.name,
        layer_rate=products,
        logit_rate=products,
        weight_bandwidth=bandwidth,
        shared_flops=peak * _ATTENTION,
        own_flops=peak * _ATTENTION,
        kv_bandwidth=bandwidth,
        overlapped=True,
        step_seconds=_GPU_STEP,
        layer_seconds=_GPU_LAYER,
        read_seconds=0.0,
        token_seconds=0.0,
        chunk_seconds=_GPU_CHUNK,
        row_seconds=_GPU_ROW,
        memory_bytes=int(sheet.memory * 1e9 * _USABLE_MEMORY),
    )


def gpu_profile(name: str, dtype: str) -> DeviceProfile:
    """For a GPU as its driver names it ("NVIDIA H200"); one that is not known is taken for an H100."""
    known = [key for key in _SHEETS if key in name.lower()]
    return ready_profile(known[0] if known else "h100", dtype)


def cpu_profile(dtype: str, threads: int) -> DeviceProfile:
    """A server CPU nobody has measured: right within a factor of two or so."""
    flops = threads * (_CPU_HALF if dtype == "bfloat16" else _CPU_SINGLE)
    bandwidth = min(threads, _CPU_MEMORY_CHANNELS) * _CPU_BANDWIDTH
    products = RateCurve((1.0, 64.0, 512.0), (flops / 4, flops / 2, flops))
    return DeviceProfile(
        name=f"CPU, {threads} thread{'s' if threads > 1 else ''}",
        layer_rate=products,
        logit_rate=products,
        weight_bandwidth=bandwidth,
        shared_flops=threads * _CPU_ATTENTION,
        own_flops=threads * _CPU_ATTENTION / 2,
        kv_bandwidth=bandwidth,
        overlapped=False,
        step_seconds=5e-3,
        layer_seconds=2e-4,
        read_seconds=1e-4,
        token_seconds=1e-6,
        chunk_seconds=5e-5,
        row_seconds=5e-5,
    )
