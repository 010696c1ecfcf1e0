"""A random sample of a job's rows, to be run first: the lengths of its answers are those of the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchllm.planner.plan import PlanDraft


def sampled_requests(draft: PlanDraft, sample_rows: int) -> NDArray[np.bool_]:
    """[requests of the RequestTable] those of `sample_rows` rows, with every request that shares a sequence with them.

    The rows are the first by key. A key is a hash of the row's content, so they are a random sample, the same whenever
    the job is run again, whatever has been answered since, and whichever way its rows are ordered.
    """
    prompts, requests, sequences = draft.prompts, draft.requests, draft.sequences
    answerable = np.ones(prompts.num_rows, dtype=np.bool_)
    answerable[np.fromiter(prompts.faults, dtype=np.int64, count=len(prompts.faults))] = False
    first = np.flatnonzero(requests.sample == 0)
    first = first[answerable[requests.row[first]]]
    by_key = np.lexsort((requests.key[first, 1], requests.key[first, 0]))
    chosen = np.zeros(prompts.num_rows, dtype=np.bool_)
    chosen[requests.row[first[by_key[:sample_rows]]]] = True
    sampled: NDArray[np.bool_] = chosen[requests.row]
    if len(sequences):
        whole = np.logical_or.reduceat(sampled[sequences.request], sequences.request_ptr[:-1])
        sampled[sequences.request] = np.repeat(whole, np.diff(sequences.request_ptr))
    return sampled
