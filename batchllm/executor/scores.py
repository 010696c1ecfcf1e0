"""Log-probabilities of given tokens, read from the logits of many steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.executor.step import StepScores

SLICE_VALUES = 1 << 24  # logits held at once: rows x vocabulary, 64 MiB in float32


@dataclass(frozen=True)
class ScoreStore:
    """Every score of a run; those of tokens not yet read are NaN."""

    logprob: NDArray[np.float32]  # [scores] natural logarithm
    greedy: NDArray[np.bool_]  # [scores] no token is more probable

    @classmethod
    def empty(cls, count: int) -> ScoreStore:
        return cls(np.full(count, np.nan, dtype=np.float32), np.zeros(count, dtype=bool))

    def read(self, scores: StepScores, first: int, logits: Tensor) -> None:
        """Takes the scores that rows first .. first + n - 1 of a step's logits give; logits [n, V] float32."""
        begin, end = np.searchsorted(scores.row, (first, first + len(logits)))
        if begin == end:
            return
        target = torch.from_numpy(scores.target[begin:end]).to(logits.device)
        row = torch.from_numpy(scores.row[begin:end] - first).to(logits.device)
        logprob = logits[row, target] - torch.logsumexp(logits, dim=-1)[row]
        number = scores.score[begin:end]
        self.logprob[number] = logprob.cpu().numpy()
        self.greedy[number] = (logits.argmax(dim=-1)[row] == target).cpu().numpy()


def slice_rows(vocabulary: int) -> int:
    """Rows of logits held at once."""
    return max(1, SLICE_VALUES // vocabulary)
