"""A decoder layer of the Llama family in one call: the binding of `decoder_layer.c`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from batchllm_kernels.cpu.arguments import check_memory
from batchllm_kernels.cpu.attention import AttentionJob, TiledReads, make_job
from batchllm_kernels.cpu.linear import Product


class Weights(NamedTuple):
    """Of one product, as `pack_panels` or `pack_gated_panels` returns them."""

    packed: Tensor
    outputs: int  # of a gated product: gates and the numbers they apply to
    bias: Tensor | None = None

    def product(self, gated: int = 0) -> Product:
        return Product(
            weight=self.packed.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            inputs=2 * self.packed.shape[1],
            outputs=self.outputs,
            gated=gated,
        )


class Norm(NamedTuple):
    weight: Tensor  # [hidden], or [dim] of heads, contiguous
    epsilon: float


class _Layer(ctypes.Structure):
    """As Layer in decoder_layer.c."""

    _fields_ = [
        *((name, Product) for name in ("qkv", "output", "gated", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_float) for name in ("input_epsilon", "mlp_epsilon", "head_epsilon")),
    ]


class _Step(ctypes.Structure):
    """As Step in decoder_layer.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "cosine", "sine", "keys", "values", "slot")),
        *((name, ctypes.c_void_p) for name in ("normed", "joined", "attended", "gated")),
        ("rows", ctypes.c_int64),
    ]


class DecoderLayer:
    """norm, joined q, k and v, rotary positions, attention, output projection, norm, gated MLP; all in bfloat16.

    `qkv` [heads + 2 kv_heads][dim] outputs of `hidden` inputs, `gated` 2 size outputs, `down` of size inputs.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        qkv: Weights,
        output: Weights,
        gated: Weights,
        down: Weights,
        norms: tuple[Norm, Norm],
        head_norms: tuple[Norm, Norm] | None,
        heads: int,
        kv_heads: int,
        dim: int,
    ):
        hidden, size = 2 * qkv.packed.shape[1], gated.outputs // 2
        assert qkv.outputs == (heads + 2 * kv_heads) * dim and output.outputs == down.outputs == hidden
        assert 2 * output.packed.shape[1] == heads * dim and 2 * down.packed.shape[1] == size
        assert all(norm.weight.is_contiguous() and len(norm.weight) == hidden for norm in norms)
        query_norm, key_norm = head_norms or (None, None)
        assert query_norm is None or key_norm is None or query_norm.epsilon == key_norm.epsilon
        self._kernels, self._kept = kernels, (qkv, output, gated, down, norms, head_norms)
        self.hidden, self.heads, self.kv_heads, self.dim, self.size = hidden, heads, kv_heads, dim, size
        self._layer = _Layer(
            qkv.product(),
            output.product(),
            gated.product(gated=1),
            down.product(),
            *(norm and norm.weight.data_ptr() for norm in (*norms, query_norm, key_norm)),
            *(hidden, heads, kv_heads, dim),
            *(norm.epsilon for norm in norms),
            query_norm.epsilon if query_norm else 0.0,
        )

    def run(self, step: LayerStep, keys: Tensor, values: Tensor, scale: float, window: int | None) -> None:
        """The step's hidden states go through the layer, in place; `keys` and `values` are its pool
        [slots, kv_heads, dim], contiguous. Raises MemoryError."""
        step.set_layer(keys, values, scale, window)
        arguments = map(ctypes.byref, (self._layer, step.step, step.job))
        check_memory(self._kernels.batchllm_decoder_layer(*arguments), "attention")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """bfloat16 numbers of a row that a step works in: hidden states, all heads, query heads, the MLP."""
        all_heads = (self.heads + 2 * self.kv_heads) * self.dim
        return self.hidden, all_heads, self.heads * self.dim, self.size


class LayerStep:
    """What is the same for all layers of a step, if they have one shape."""

    step: _Step
    job: AttentionJob

    def __init__(
        self,
        layer: DecoderLayer,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        reads: TiledReads,
        memory: Tensor,
    ):
        """hidden [n, hidden], cos and sin [n, dim] with equal halves, all bfloat16 and contiguous; slots int64 [n];
        memory: bfloat16 [n * sum(layer.widths)] or more, to work in."""
        rows = len(hidden)
        sizes = [rows * width for width in layer.widths]
        normed, joined, attended, gated = torch.split(memory[: sum(sizes)], sizes)
        self._kept = (hidden, cos, sin, slots, memory)
        assert all(tensor.is_contiguous() for tensor in self._kept)
        self.step = _Step(
            hidden=hidden.data_ptr(),
            cosine=cos.data_ptr(),
            sine=sin.data_ptr(),
            slot=slots.data_ptr(),
            normed=normed.data_ptr(),
            joined=joined.data_ptr(),
            attended=attended.data_ptr(),
            gated=gated.data_ptr(),
            rows=rows,
        )
        heads, output = joined.view(rows, -1, layer.dim), attended.view(rows, layer.heads, layer.dim)
        pool = heads[:, : layer.kv_heads]  # stands for the layers', which come later
        self.job = make_job(reads, heads[:, : layer.heads], pool, pool, output, scale=1.0)
        self.job.key_slot = self.job.value_slot = layer.kv_heads * layer.dim

    def is_of(self, hidden: Tensor, cos: Tensor) -> bool:
        """Whether these are the hidden states that go through the layers, and their positions."""
        same = (hidden.data_ptr(), cos.data_ptr(), len(hidden))
        return same == (self.step.hidden, self.step.cosine, self.step.rows)

    def set_layer(self, keys: Tensor, values: Tensor, scale: float, window: int | None) -> None:
        self.step.keys, self.step.values = keys.data_ptr(), values.data_ptr()
        self.job.scale, self.job.window = scale, window or 0
