"""Log-probabilities of given tokens, read from the logits of many steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import IntArray, PromptLogprobs, TokenArray
from batchllm.executor.sampler import largest_logits
from batchllm.executor.step import StepScores
from batchllm.planner.sequences import take_ranges

SLICE_VALUES = 1 << 24  # logits held at once: rows x vocabulary, 64 MiB in float32


@dataclass(frozen=True)
class ScoreStore:
    """Every score of a run; those of tokens not yet read are NaN."""

    logprob: NDArray[np.float32]  # [scores] natural logarithm
    greedy: NDArray[np.bool_]  # [scores] no token is more probable
    top_ptr: IntArray  # [scores + 1] CSR into the most probable tokens at the same place, falling
    top_token: NDArray[np.int32]
    top_logprob: NDArray[np.float32]

    @classmethod
    def empty(cls, count: int, top: NDArray[np.int32] | None = None) -> ScoreStore:
        """`top` [scores]: how many of the most probable tokens are taken beside each; default: none."""
        ends = np.zeros(count, dtype=np.int64) if top is None else np.cumsum(top, dtype=np.int64)
        total = int(ends[-1]) if count else 0
        return cls(
            np.full(count, np.nan, dtype=np.float32),
            np.zeros(count, dtype=bool),
            np.concatenate(([0], ends)),
            np.full(total, -1, dtype=np.int32),
            np.full(total, np.nan, dtype=np.float32),
        )

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
        self._read_top(number, row.cpu().numpy(), logits)

    def prompt_logprobs(self, tokens: TokenArray, numbers: IntArray, top: int) -> PromptLogprobs:
        """Of a prompt [n], from the scores of its tokens [n - 1], with `top` tokens beside each."""
        stored = self.top_ptr[numbers + 1] - self.top_ptr[numbers]
        top = int(min(top, stored.min(initial=top)))
        places = self.top_ptr[numbers][:, None] + np.arange(top)
        first = np.full((1, top), -1, np.int32), np.full((1, top), np.nan, np.float32)
        return PromptLogprobs(
            np.array(tokens, dtype=np.int32),
            np.concatenate((np.full(1, np.nan, np.float32), self.logprob[numbers])),
            np.concatenate((first[0], self.top_token[places])),
            np.concatenate((first[1], self.top_logprob[places])),
        )

    def _read_top(self, number: NDArray[np.int64], row: NDArray[np.int64], logits: Tensor) -> None:
        count = self.top_ptr[number + 1] - self.top_ptr[number]
        number, row, count = number[count > 0], row[count > 0], count[count > 0]
        if not len(number):
            return
        rows, place = np.unique(row, return_inverse=True)
        chosen = logits[torch.from_numpy(rows).to(logits.device)]
        values, tokens = largest_logits(chosen, int(count.max()))
        values = values - torch.logsumexp(chosen, dim=-1, keepdim=True)
        taken = np.arange(int(count.max())) < count[:, None]
        into = take_ranges(self.top_ptr[number], count)
        self.top_token[into] = tokens.cpu().numpy()[place][taken]
        self.top_logprob[into] = values.cpu().numpy()[place][taken]


def slice_rows(vocabulary: int) -> int:
    """Rows of logits held at once."""
    return max(1, SLICE_VALUES // vocabulary)
