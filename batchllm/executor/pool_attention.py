"""What every attention over a KvPool does in a step, however it then computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchllm.executor.kv_pool import KvPool, KvWriter
from batchllm.executor.step import Chunk, SharedRead, StepBatch


class PoolAttention:
    """Keys and values go to the pool through `writer`; `_work` says which tokens attend and what they read."""

    def __init__(self, pool: KvPool, batch: StepBatch, writer: KvWriter):
        self._pool = pool
        self._writer = writer
        self._all = (batch.chunks, batch.shared_reads)
        self._last = batch.logit_tokens()
        self.logit_rows = None if self._last is None else torch.from_numpy(batch.logit_rows)

    def _work(self, last_only: bool) -> tuple[Sequence[Chunk], Sequence[SharedRead]]:
        """Of all tokens, or of those alone whose logits are read."""
        work = self._last if last_only else self._all
        assert work is not None, "logits are read of tokens that do not end a chunk"
        return work
