"""A graph for CPUs that freezes what a CUDA graph freezes: the operations, the memory they use, every host value.

Recording runs the step and notes each torch operation and kernel call with its very tensors. A replay runs these again
and copies results to where they were, so a step that reads anything new from the host gives old results, and one that
waits for the device (reading a number from a tensor) is refused, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
_EXPERTS = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
Call = tuple[Callable[[], Any], list[Tensor]]


def _waits(func: Any, args: Any) -> bool:
    """Whether a GPU's host would wait in this operation. Experts in other types than bfloat16 are multiplied with one
    by one, and the host has to know how many tokens each of them gets."""
    name = func._schema.name
    return name in _WAITS or (name in _EXPERTS and args[0].dtype != torch.bfloat16)


class _Waits(Exception):
    """The step reads a number from the device while it is recorded."""


class _Watch(TorchDispatchMode):
    """Notes what a GPU's step would wait in."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            self.waits.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class _Notes(TorchDispatchMode):
    def __init__(self, calls: list[Call]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            raise _Waits
        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        is_view = all(tensor.untyped_storage().data_ptr() in memory for tensor in outputs)
        if func._schema.is_mutable or not is_view:  # views of what is recorded need not be made again
            self._calls.append((lambda: func(*args, **(kwargs or {})), outputs))
        return result


class RecordedGraph:
    def __init__(self, calls: list[Call]):
        self._calls = calls

    @torch.inference_mode()
    def replay(self) -> None:
        for call, outputs in self._calls:
            for place, new in zip(outputs, _tensors(call()), strict=True):
                if place.data_ptr() != new.data_ptr():
                    place.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


class CpuRecorder:
    """With RecordedKernels as the backend's kernels: their calls are noted as one operation each."""

    def __init__(self, kernels: RecordedKernels):
        self._kernels = kernels
        self.failure = ""
        self.records = 0  # tried

    def watch(self, step: Callable[[], object]) -> str | None:
        with _Watch() as watch:
            step()
        return f"{watch.waits[0]} waits for the device" if watch.waits else None

    def record(self, step: Callable[[], None], state: Sequence[Tensor]) -> RecordedGraph | None:
        self.records += 1
        before = [tensor.clone() for tensor in state]
        calls: list[Call] = []
        self._kernels.calls = calls
        try:
            with torch.inference_mode(), _Notes(calls):
                step()
        except _Waits:
            self.failure = "recording failed"
            return None
        finally:
            self._kernels.calls = None
            for tensor, old in zip(state, before):
                tensor.copy_(old)
        return RecordedGraph(calls)


class RecordedKernels:
    """Passes calls on to `kernels`, and notes them while a step is recorded."""

    def __init__(self, kernels: Any):
        self._kernels = kernels
        self.calls: list[Call] | None = None

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)

        def launch(*args: Any, **kwargs: Any) -> Tensor:
            calls, self.calls = self.calls, None
            with torch.utils._python_dispatch._disable_current_modes():
                output: Tensor = kernel(*args, **kwargs)
            self.calls = calls
            if calls is not None:
                calls.append((lambda: kernel(*args, **kwargs), [output]))
            return output

        return launch
