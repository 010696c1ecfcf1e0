"""The attention function that transformers' models call, and the step it works for.

Metadata travels in a module-level context, not in keyword arguments: some models (stablelm, nemotron) drop
extra arguments on the way to their attention layers. One forward pass runs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

ATTENTION_NAME = "batchllm"

# Arguments that models pass to their attention function and that change nothing here.
_HARMLESS = {"position_ids", "use_cache", "output_router_logits", "output_attentions", "cache_position"}


class StepAttention(Protocol):
    """What one step does in each attention layer."""

    @property
    def logit_rows(self) -> Tensor | None:
        """[L] tokens whose logits are read, if no other token's output of the last layer matters; else None."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        last_only: bool = False,
    ) -> Tensor:
        """query [Hq, T, Dk], key [Hkv, T, Dk], value [Hkv, T, Dv] (any strides) → [T, Hq, Dv] in query's dtype.

        With `last_only`, query holds the tokens of `logit_rows` alone: [Hq, L, Dk] → [L, Hq, Dv].
        """
        ...


class UnsupportedAttention(Exception):
    """A model asks its attention for something this executor does not do."""


_step: StepAttention | None = None


def current_step() -> StepAttention:
    """The step that the running forward pass works for."""
    assert _step is not None, "attention outside a step"
    return _step


@contextmanager
def attention_of(step: StepAttention) -> Iterator[None]:
    """Within the block, every attention layer works for `step`."""
    global _step
    assert _step is None, "forward passes do not nest"
    _step = step
    try:
        yield
    finally:
        _step = None


def batchllm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D] with RoPE applied → ([1, T, Hq, Dv], None)."""
    causal = kwargs.pop("is_causal", None)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise UnsupportedAttention(f"its attention takes {', '.join(unknown)}")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        raise UnsupportedAttention("its attention is not causal")
    if attention_mask is not None:
        raise UnsupportedAttention("it builds an attention mask of its own")
    out = current_step().attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0],
        key[0],
        value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Makes `attn_implementation="batchllm"` known. No mask function is registered on purpose: transformers
    then builds no mask at all."""
    AttentionInterface.register(ATTENTION_NAME, batchllm_attention)
