"""Greedy tokens without all logits: only tokens that could have the largest one are multiplied out (screen.c).

The tokens are those of an argmax over the output projection's logits, bit for bit. Where 8-bit integers cannot tell
tokens apart, as in rows with a few states far larger than the others, all logits are computed after all.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from batchllm_kernels.cpu.screen import ByteWeights, can_screen, first_largest, pack_bytes
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import SamplingParams
from batchllm.executor.logit_rules import has_rules
from batchllm.executor.native import native_kernels
from batchllm.executor.native_linear import NativeLinear
from batchllm.executor.sampler import largest_tokens

# Their logits are the output projection of the last states and nothing else: not scaled, not capped.
_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_MOST_BYTES = 160 * 2**20  # of weights as integers: memory beside the weights and KV that users know of
_MOST_INPUTS = 2**14  # for which screen.c's bounds are meant
_ROWS = 512  # at a time
# More rows than this share left undecided cost more than is saved; seen after so many rows.
_UNDECIDED, _SEEN = 0.25, 256


class GreedyHead:
    """The output projection of one model, for rows that want their largest logit's token and nothing else."""

    def __init__(self, layer: NativeLinear, kernels: ctypes.CDLL, weights: ByteWeights) -> None:
        self._layer, self._kernels, self._weights = layer, kernels, weights
        self._rows = self._undecided = 0

    @classmethod
    def of(cls, model: Any) -> GreedyHead | None:
        """None where the model's logits are something else, or its output projection or this CPU not fit for it."""
        layer, kernels = getattr(model, "lm_head", None), native_kernels(torch.bfloat16)
        known = type(model).__name__ in _MODELS and type(model).__module__.startswith("transformers.")
        if not known or not isinstance(layer, NativeLinear) or layer.bias is not None:
            return None
        if layer.in_features > _MOST_INPUTS or layer.in_features * layer.out_features > _MOST_BYTES:
            return None
        if kernels is None or not can_screen(kernels):
            return None
        weights = pack_bytes(kernels, layer.packed)
        return None if weights is None else cls(layer, kernels, weights)

    @property
    def pays(self) -> bool:
        """False once too many rows have needed all their logits."""
        return self._rows < _SEEN or self._undecided <= _UNDECIDED * self._rows

    def tokens(self, states: Tensor) -> NDArray[np.int64]:
        """states [n, hidden], as the output projection takes them → tokens [n]: the largest logit's, the first of
        equals."""
        parts = [
            first_largest(self._kernels, part, self._layer.packed, self._weights, self._layer.out_features)
            for part in torch.split(states, _ROWS)
        ]
        tokens = torch.cat(parts)
        undecided = (tokens < 0).nonzero().flatten()
        self._rows += len(tokens)
        self._undecided += len(undecided)
        if len(undecided):
            logits = self._layer(states[undecided]).float()
            tokens[undecided] = torch.from_numpy(largest_tokens(logits))
        found: NDArray[np.int64] = tokens.numpy()
        return found


def needs_only_largest(params: SamplingParams) -> bool:
    """Whether of its logits a sequence reads nothing but which one is the largest."""
    reads_more = params.logprobs or params.top_logprobs or params.structure or has_rules(params)
    return params.greedy and not reads_more
