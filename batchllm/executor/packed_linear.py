"""Linear layers whose weights lie in memory as products want them: our kernel's (native_linear), or else oneDNN's.

Plain weights would be put into that order anew in every product: for oneDNN that is 20% of the time of a hundred rows.
The original weights are dropped, so memory stays as it was.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from batchllm.executor.fused_layer import FusedDecoderLayer, GatedProjection
from batchllm.executor.mapped_weights import MappedFiles
from batchllm.executor.native_linear import NativeGatedLinear, NativeLinear, can_be_native
from batchllm.executor.whole_layer import WholeLayer, WorkMemory

_ROWS = 2048  # that the order is chosen for; any number may come


class PackedLinear(nn.Module):
    """Takes the place of an nn.Linear in bfloat16, for oneDNN: the same numbers bit for bit.

    Raises RuntimeError or AttributeError where torch cannot pack.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, _ROWS)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """states [..., in_features] → [..., out_features]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")
        return output

    def unpacked(self) -> nn.Linear:
        """The layer that this was made of."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        linear.bias = self.bias
        return linear


def pack_linears(model: Any, kernels: ctypes.CDLL | None) -> int:
    """Packs every bfloat16 linear layer on a CPU that is used as it is; returns how many. Layers whose weights are
    those of the embedding stay, and so do all where nothing packs them."""
    embedding = model.get_input_embeddings()
    kept = {embedding.weight.data_ptr()} if embedding is not None else set()
    fused = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    unused = {id(linear) for layer in fused for linear in layer.unused()}
    for layer in fused:
        layer.release_originals()  # so that a joined weight is let go as soon as it is packed
    count, files = 0, MappedFiles()
    for parent in _parents(model):
        for name, child in list(parent.named_children()):
            if not _fits(child) or id(child) in unused or child.weight.data_ptr() in kept:
                continue
            packed = _packed(child, kernels)
            if packed is not None:
                setattr(parent, name, packed)
                files.let_go(child.weight)
                count += 1
    if not count:
        for layer in fused:
            layer.restore_originals()
    if kernels is not None:
        memory = WorkMemory()
        for layer in fused:
            layer.whole = WholeLayer.of(layer, kernels, memory)
    return count


def pack_projection(model: Any, kernels: ctypes.CDLL | None) -> None:
    """`pack_linears` for the output projection alone, of a model whose layers are in another form."""
    projection, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not _fits(projection) or projection.weight.data_ptr() == embedding.weight.data_ptr():
        return
    files = MappedFiles()
    packed = _packed(projection, kernels)
    if packed is not None:
        model.set_output_embeddings(packed)
        files.let_go(projection.weight)


def unpack_linears(model: Any) -> None:
    """Undoes `pack_linears` and `pack_projection`."""
    fused = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    for layer in fused:
        layer.whole = None  # so that a packed weight is let go as soon as it is unpacked
    packed = False
    for parent in _parents(model):
        for name, child in list(parent.named_children()):
            if isinstance(child, NativeGatedLinear):
                setattr(parent, name, GatedProjection(child.unpacked(), parent.ops))
                packed = True
            elif isinstance(child, PackedLinear | NativeLinear):
                setattr(parent, name, child.unpacked())
                packed = True
    if packed:
        for layer in fused:
            layer.restore_originals()


def _parents(model: Any) -> list[Any]:
    """All modules that have parts. Those that are replaced are not held by it."""
    return [module for module in model.modules() if next(module.children(), None) is not None]


def _packed(linear: nn.Linear, kernels: ctypes.CDLL | None) -> nn.Module | None:
    """What takes its place; None where nothing does."""
    if kernels is not None and can_be_native(linear):
        return NativeLinear(kernels, linear)
    try:
        return PackedLinear(linear)
    except (RuntimeError, AttributeError):
        return None


def _fits(module: Any) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
