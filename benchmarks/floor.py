"""The least time that a workload's matrix products take on this machine, measured with the model's own shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from benchmarks.workloads import Workload

_LOGIT_ROWS = 128  # sampled in one step


@dataclass(frozen=True)
class Products:
    """Work of a workload in tokens. Every distinct prompt token and every output token but an answer's last goes
    through the layers once; logits are computed for output tokens alone. That no token but a sampled one needs the
    last layer is not counted."""

    layer_tokens: int
    logit_tokens: int
    distinct_prompt_tokens: int


def products(workload: Workload) -> Products:
    prompts = sorted(set(map(tuple, workload.prompts)))
    shared = sum(_common(left, right) for left, right in pairwise(prompts))
    distinct = sum(map(len, prompts)) - shared
    return Products(
        layer_tokens=distinct + len(prompts) * (workload.max_tokens - 1),
        logit_tokens=len(prompts) * workload.max_tokens,
        distinct_prompt_tokens=distinct,
    )


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


class Floor:
    """The linear layers of a model with random weights, to be timed again and again: machines drift."""

    def __init__(self, model_folder: str, step_tokens: int):
        config = AutoConfig.from_pretrained(model_folder)
        dtype: torch.dtype = config.dtype
        hidden, inner = config.hidden_size, config.intermediate_size
        head = hidden // config.num_attention_heads
        qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
        shapes = [(qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
        self._step_tokens = step_tokens
        self._layers = [
            _weight(rows, columns, dtype) for _ in range(config.num_hidden_layers) for rows, columns in shapes
        ]
        self._logits = _weight(config.vocab_size, hidden, dtype)
        self._inputs = {
            (tokens, width): torch.randn(tokens, width).to(dtype)
            for tokens in (step_tokens, _LOGIT_ROWS)
            for width in (hidden, inner)
        }
        self.gflops: list[float] = []  # of the layers, each time

    @torch.inference_mode()
    def seconds(self, work: Products) -> float:
        """Times one pass through all layers and some of the output projection, and counts up."""
        layers = self._best(self._layers, self._step_tokens)
        logits = self._best([self._logits] * 4, _LOGIT_ROWS) / 4
        parameters = sum(weight.numel() for weight in self._layers)
        self.gflops.append(2 * parameters * self._step_tokens / layers / 1e9)
        return work.layer_tokens * layers / self._step_tokens + work.logit_tokens * logits / _LOGIT_ROWS

    def _best(self, weights: Sequence[Tensor], tokens: int) -> float:
        """Seconds of the faster of plain weights and weights packed for the purpose."""
        plain = _timed(lambda: [F.linear(self._input(weight, tokens), weight) for weight in weights])
        packed = [_packed(weight, tokens) for weight in weights]
        if any(weight is None for weight in packed):
            return plain
        return min(
            plain, _timed(lambda: [self._packed_linear(*pair, tokens) for pair in zip(weights, packed)])
        )

    def _input(self, weight: Tensor, tokens: int) -> Tensor:
        return self._inputs[tokens, weight.shape[1]]

    def _packed_linear(self, weight: Tensor, packed: Tensor | None, tokens: int) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            self._input(weight, tokens), packed, None, "none", [], ""
        )
        return found


def _packed(weight: Tensor, tokens: int) -> Tensor | None:
    """oneDNN's own layout, where torch has it."""
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    except (AttributeError, RuntimeError):
        return None
    return packed


def _weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype).uniform_(-0.05, 0.05)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
