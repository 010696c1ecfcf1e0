"""Prompt tokens whose KV is not computed but comes from elsewhere: what the scheduler and a step ask of its provider.

A node that is given memory is offered to the provider. It says which of the node's tokens still have to be computed;
all others it writes itself, layer by layer, just before the attention of that layer in the next step. A computed token
sees everything before it, whoever wrote it: its position alone decides.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from batchllm.executor.forward_context import StepAttention


class StoredKv(Protocol):
    """Called from the engine's thread only. An extent is one of the pool that `write_to` was called with."""

    def write_to(self, pool: Any) -> None:
        """The KV pool of the engine, before its first step."""
        ...

    def place(self, node: int, first: int, extent: Any) -> None:
        """`node` has memory now; its first `first` tokens are copied from another node. The extent does not move before
        the next step has run."""
        ...

    def next_run(self, node: int, done: int, total: int) -> tuple[int, int]:
        """(begin, end) of the next consecutive tokens to compute, from token `done` of the node on. The last token of
        a node is always computed; `total` may count output tokens behind the prompt, which are too."""
        ...

    def write(self, layer: int) -> None:
        """Writes what was placed since the last step, for one layer; waits for it if need be."""
        ...

    def end_step(self) -> None:
        """All layers have been run."""
        ...


class StoredKvAttention:
    """`StepAttention` that writes what is placed before the step's own keys and values."""

    def __init__(self, inner: StepAttention, stored: StoredKv):
        self._inner, self._stored = inner, stored

    @property
    def logit_rows(self) -> Tensor | None:
        return self._inner.logit_rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See StepAttention.attend."""
        self._stored.write(layer)
        return self._inner.attend(layer, query, key, value, **options)
