"""int8 for the linear layers of a loaded model, by torchao.

    int8_weight_only   weights in int8, one scale per output; multiplied in the model's own number format
    int8_dynamic       inputs too, one scale per token, found anew for each; integers are multiplied (W8A8)

Embeddings, the output projection, norms and the routers of experts stay as they are. Every scale belongs to one weight
row or to one token, so what a token gets does not depend on what is batched beside it.

In bfloat16, on CPUs that multiply bytes, int8_dynamic's products are the kernel's (native_byte_linear), twice as fast
as those in bfloat16; elsewhere they are torch's. The numbers are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchllm.errors import ModelError
from batchllm.executor.mapped_weights import MappedFiles
from batchllm.executor.native_byte_linear import NativeByteLinear, byte_kernels

if TYPE_CHECKING:
    from batchllm.executor.model import ModelRunner

QUANTIZATIONS = ("int8_weight_only", "int8_dynamic")

_ROUTERS = ("gate", "router", "shared_expert_gate")  # a handful of outputs that decide much
_ROWS = 256  # of a product at a time: its integers and floats stay in the cache


def check_quantization(quantization: str) -> None:
    """Raises ModelError when there is no such quantisation, or the library for it is not installed."""
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"model.quantize: must be {' or '.join(QUANTIZATIONS)}, found {quantization!r}.")
    if find_spec("torchao") is None:
        raise ModelError(
            f"model.quantize: {quantization} needs the package torchao, which is not installed; run "
            f"pip install torchao, or leave model.quantize out."
        )


def quantize_model(runner: ModelRunner, quantization: str) -> None:
    """Replaces the model's linear layers, fused ones and the originals below them, by int8. There is no way back.

    Raises ModelError when the model has none, or as `check_quantization` does.
    """
    check_quantization(quantization)
    from torchao.quantization import quantize_

    named = _linears(runner.model)
    if not named:
        raise ModelError(
            f"model.quantize: model type {runner.model_type} has no linear layers to quantise; leave it out."
        )
    config = _torchao_config(quantization)
    files = MappedFiles()
    fast: dict[nn.Linear, nn.Module] = {}
    for whole, views in _by_memory(list(named.values())):
        weight = whole.weight
        quantize_(whole, config, filter_fn=lambda *_: True)
        for view, rows in views.items():
            view.weight = nn.Parameter(whole.weight[rows], requires_grad=False)
        files.let_go(weight)
        if quantization == "int8_dynamic":
            fast |= _dynamic(whole, views, byte_kernels(runner.dtype))
    for name, linear in named.items():
        if linear in fast:
            parent, _, child = name.rpartition(".")
            setattr(runner.model.get_submodule(parent), child, fast[linear])


def _dynamic(
    whole: nn.Linear, views: Mapping[nn.Linear, slice], kernels: ctypes.CDLL | None
) -> dict[nn.Linear, nn.Module]:
    """What takes the place of a layer that torchao has quantised for int8_dynamic, and of those in its rows.

    Packed weights take the place of torchao's, which are gone then; the others keep theirs.
    """
    if kernels is None:
        return {linear: Int8DynamicLinear(linear) for linear in (whole, *views)}
    packed = NativeByteLinear.of(kernels, whole)
    found: dict[nn.Linear, nn.Module] = {whole: packed}
    for view, rows in views.items():
        found[view] = packed.rows(rows, view.bias) or Int8DynamicLinear(view)
    for linear, module in found.items():
        if isinstance(module, NativeByteLinear):
            linear.weight = None  # type: ignore[assignment]
    return found


class Int8DynamicLinear(nn.Module):
    """torchao's int8 linear layer with fewer passes over memory: the same integers, the same scales.

    torchao leaves it to torch.compile to join its steps, and one by one they take longer than the product.
    """

    def __init__(self, linear: nn.Linear):
        """`linear` holds a weight that torchao has quantised for int8_dynamic."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight: Any = linear.weight  # torchao's tensor, with fields of its own
        self.weight = weight
        self.bias = linear.bias
        # Without VNNI, products of two full int8 numbers would overflow; torchao then halves their range.
        self._largest = 63 if weight.reduce_range else 127

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → [..., out], in the inputs' own dtype."""
        states = inputs.reshape(-1, self.in_features)
        output = inputs.new_empty(len(states), self.out_features)
        integers, scales = self._quantized(states)
        weight, weight_scales = self.weight.qdata.t(), self.weight.scale.flatten()
        sums = torch.empty(min(_ROWS, len(states)), self.out_features, dtype=torch.int32)
        for first in range(0, len(states), _ROWS):
            rows = slice(first, min(first + _ROWS, len(states)))
            block = sums[: rows.stop - first]
            torch._int_mm(integers[rows], weight, out=block)
            scaled = block.float().mul_(scales[rows]).mul_(weight_scales)
            output[rows] = scaled if self.bias is None else scaled.add_(self.bias)
        return output.view(*inputs.shape[:-1], self.out_features)

    def _quantized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [T, in], and the float32 scale of each row, [T, 1]."""
        scales = (states.abs().amax(dim=-1, keepdim=True) / (self._largest + 0.5)).float()
        scales.clamp_min_(torch.finfo(torch.float32).eps)
        # The largest number of a row comes to a half above the largest integer.
        integers = (states * scales.reciprocal()).round_().clamp_max_(self._largest)
        return integers.to(torch.int8), scales


def _torchao_config(quantization: str) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.utils import should_reduce_range

    if quantization == "int8_weight_only":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False, reduce_range=should_reduce_range(torch.device("cpu"))
    )


def _linears(model: Any) -> dict[str, nn.Linear]:
    """By name, what is quantised."""
    projection = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not projection and name.rpartition(".")[2] not in _ROUTERS
    }


def _by_memory(linears: list[nn.Linear]) -> list[tuple[nn.Linear, dict[nn.Linear, slice]]]:
    """The linears that have memory of their own, each with those whose weights are some of its rows."""
    wholes: list[tuple[nn.Linear, dict[nn.Linear, slice]]] = []
    for linear in sorted(linears, key=lambda linear: -linear.weight.numel()):
        for whole, views in wholes:
            rows = _rows_within(linear.weight, whole.weight)
            if rows is not None:
                views[linear] = rows
                break
        else:
            wholes.append((linear, {}))
    return wholes


def _rows_within(part: Tensor, whole: Tensor) -> slice | None:
    if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    first, offset = divmod(int(part.storage_offset() - whole.storage_offset()), whole.shape[1])
    inside = offset == 0 and 0 <= first <= len(whole) - len(part)
    return slice(first, first + len(part)) if inside and part.stride() == whole.stride() else None
