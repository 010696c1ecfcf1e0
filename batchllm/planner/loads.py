"""What each step of a run has to do, as numbers: made by the simulator (and by an engine that counts its steps), read
by the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class StepLoads:
    """One entry per step, or per run of alike steps: entry i stands for `steps[i]` steps, and its other numbers are
    means of one of them. The cost of a run is therefore `(steps * seconds(loads)).sum()`.

    All arrays are float64 `[entries]`. A pair is one query token that attends to one key token, counted once for
    all heads and layers, as if every layer saw every key (sliding windows are the cost model's business).

    A chunk is what a step computes of one node: a piece of prompt, or one decoded token. It reads the KV of its own
    stretch, alone, and that of every shared node above, which is read once a step for all chunks below it.
    """

    steps: FloatArray
    prompt_tokens: FloatArray  # through the model: computed, not copied; recomputed ones included
    decode_tokens: FloatArray  # decoded tokens that are fed to the model
    logit_rows: FloatArray  # tokens whose logits are computed
    chunks: FloatArray  # stretches with a read of their own
    own_pairs: (
        FloatArray  # within the chunks' own stretches, causal: h * c + c * (c + 1) / 2 for c tokens after h
    )
    own_kv_read: FloatArray  # KV tokens of the own stretches: h + c
    shared_reads: FloatArray  # shared nodes read
    shared_pairs: FloatArray  # chunk tokens x tokens of the shared nodes above them
    shared_kv_read: FloatArray  # KV tokens of the shared nodes, each counted once a step
    copied_tokens: FloatArray  # KV tokens copied within memory

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> FloatArray:
        """Tokens through the model."""
        return self.prompt_tokens + self.decode_tokens

    @property
    def pairs(self) -> FloatArray:
        return self.own_pairs + self.shared_pairs

    @property
    def kv_read(self) -> FloatArray:
        """KV tokens read."""
        return self.own_kv_read + self.shared_kv_read

    @property
    def num_steps(self) -> int:
        return round(float(self.steps.sum()))

    def total(self, name: str) -> float:
        """Sum over all steps of the field or property with this name, `steps` excepted."""
        return float((self.steps * getattr(self, name)).sum())


def join_loads(parts: Sequence[StepLoads]) -> StepLoads:
    """One after the other."""
    names = [field.name for field in fields(StepLoads)]
    if not parts:
        return StepLoads(*(np.zeros(0) for _ in names))
    return StepLoads(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
