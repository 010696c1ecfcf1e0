"""Which device a job runs on: what was asked for if that works, else one sentence that says why not.

`auto` takes the GPU where one can be used and falls back to the CPU with a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from batchllm.errors import JobError
from batchllm.executor.backend import Backend, CpuBackend

_RESERVED = 1 << 30  # bytes of a GPU that neither weights nor KV get at the least: activations, workspaces


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, as far as the choice depends on it."""

    name: str
    has_bfloat16: bool
    free_bytes: int
    device: torch.device  # what its tensors are made on


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine has. `missing` says why there is no GPU."""

    gpu: Gpu | None
    missing: str = ""
    has_triton: bool = True


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs. `note` is for the user: what `auto` could not have."""

    gpu: Gpu | None = None
    note: str | None = None

    @property
    def device(self) -> torch.device:
        return self.gpu.device if self.gpu else torch.device("cpu")

    def backend(self) -> Backend:
        if self.gpu is None:
            return CpuBackend()
        from batchllm.executor.paged_backend import PagedBackend  # needs triton

        return PagedBackend(self.gpu.device)


def this_machine() -> Machine:
    """Asks torch. Starts no CUDA context where there is no GPU."""
    has_triton = find_spec("triton") is not None
    if torch.version.cuda is None and torch.version.hip is None:
        return Machine(None, "this build of torch is for CPUs only", has_triton)
    if not torch.cuda.is_available():
        return Machine(None, "torch finds no GPU", has_triton)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu(
        name=torch.cuda.get_device_name(device),
        has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        free_bytes=torch.cuda.mem_get_info(device)[0],
        device=device,
    )
    return Machine(gpu, has_triton=has_triton)


def choose_device(wanted: str, weight_bytes: int, machine: Machine, quantize: str | None = None) -> Placement:
    """wanted: `cpu`, `cuda` or `auto`; weight_bytes: of the model as it will be loaded; quantize: what becomes of them.

    Raises JobError when `cuda` cannot be had.
    """
    if wanted == "cpu":
        return Placement()
    obstacle = _obstacle(weight_bytes, machine, quantize)
    if obstacle is None:
        return Placement(machine.gpu)
    reason, remedy = obstacle
    if wanted == "cuda":
        raise JobError(f"engine.device: cuda cannot be used, for {reason}; {remedy} or set it to cpu.")
    return Placement(note=f"engine.device: auto runs on the CPU, for {reason}")


def _obstacle(weight_bytes: int, machine: Machine, quantize: str | None) -> tuple[str, str] | None:
    """(why the GPU cannot be used, what to do), or None."""
    gpu = machine.gpu
    if gpu is None:
        return machine.missing, "install a build of torch for your GPU and its driver"
    if quantize:
        return "model.quantize works on a CPU only", "leave model.quantize out"
    if not machine.has_triton:
        return "the package triton is not installed", "run pip install triton"
    if not gpu.has_bfloat16:
        return f"{gpu.name} does not compute in bfloat16", "choose a newer GPU"
    if weight_bytes + _RESERVED > gpu.free_bytes:
        reason = (
            f"the model's weights take {weight_bytes / 1e9:.1f} GB and {gpu.name} has "
            f"{gpu.free_bytes / 1e9:.1f} GB free"
        )
        return reason, "choose a smaller model.dtype, free memory on it"
    return None
