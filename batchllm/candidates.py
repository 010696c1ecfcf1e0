"""`best_of`: more answers are computed than are owed, and the best of each row stay.

What is computed has its own tables, `prompts` and `requests`; without `best_of` they are those of the job. The first
`n` candidates of a row have the keys of its answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.core import PromptTable, RequestResult, RequestTable, SamplingParams
from batchllm.dataset.keys import make_requests


class Candidates:
    """The answers that are computed for those that are owed."""

    def __init__(
        self, prompts: PromptTable, requests: RequestTable, ids: pa.ChunkedArray | None, configuration: bytes
    ) -> None:
        self._owed, self._owed_params, self._params_of = requests, prompts.params, prompts.params_of
        self.prompts, self.requests = prompts, requests
        self._waiting: dict[int, list[RequestResult]] = {}  # row → candidates that are known
        self._chooses = any(map(_chooses, prompts.params))
        if self._chooses:
            more = tuple(replace(params, n=max(params.n, params.best_of)) for params in prompts.params)
            self.requests = make_requests(replace(prompts, params=more), ids, configuration)
            weighed = (
                replace(params, logprobs=True) if _chooses(owed) else params
                for owed, params in zip(prompts.params, more)
            )
            self.prompts = replace(prompts, params=tuple(weighed))
            self._first_owed = np.searchsorted(requests.row, np.arange(prompts.num_rows))

    def pending(self, done: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[candidates] those of rows that are owed an answer; `done` is by owed request."""
        if not self._chooses:
            return ~done
        owed = np.zeros(len(self._params_of), dtype=bool)
        owed[self._owed.row[~done]] = True
        return owed[self.requests.row]

    def settle(self, results: Iterable[RequestResult], done: NDArray[np.bool_]) -> list[RequestResult]:
        """Answers for owed requests that are not done, of the rows whose candidates are now all known."""
        if not self._chooses:
            return list(results)
        settled: list[RequestResult] = []
        for result in results:
            row = int(self.requests.row[result.request])
            params = self._owed_params[self._params_of[row]]
            waiting = self._waiting.setdefault(row, [])
            waiting.append(result)
            if len(waiting) < max(params.n, params.best_of):
                continue
            del self._waiting[row]
            waiting.sort(key=lambda known: known.request)
            if _chooses(params):
                waiting.sort(key=_mean_logprob, reverse=True)
            first = int(self._first_owed[row])
            for request, known in enumerate(waiting[: params.n], start=first):
                if not done[request]:
                    shown = known.logprobs if params.logprobs else None
                    settled.append(replace(known, request=request, logprobs=shown))
        return settled


def _chooses(params: SamplingParams) -> bool:
    """Else a row's answers stay in their order, also beside rows whose best are chosen."""
    return params.best_of > params.n


def _mean_logprob(result: RequestResult) -> float:
    """Of its tokens; an error comes last."""
    if not result.logprobs:
        return float("-inf")
    return sum(result.logprobs) / len(result.logprobs)
