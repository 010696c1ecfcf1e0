"""Which streams of tokens have to be decoded: requests that cannot differ become one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, PromptTable, RequestTable
from batchllm.planner.sort import sort_prompts


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of the planned rows in lexicographic order."""

    lcp: IntArray  # [prompts] tokens in common with the one before
    length: IntArray  # [prompts]
    of_row: IntArray  # [rows of the PromptTable] -1: not planned


@dataclass(frozen=True)
class Sequences:
    """Sequences in lexicographic order of their prompts, those of one prompt by first request."""

    prompt: IntArray  # [sequences]
    params: NDArray[np.int32]  # [sequences]
    request_ptr: IntArray  # [sequences + 1] CSR into `request`
    request: IntArray  # indices into the RequestTable, ascending within a sequence

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def first_request(self) -> IntArray:
        return self.request[self.request_ptr[:-1]]


def planned_requests(prompts: PromptTable, requests: RequestTable, todo: NDArray[np.bool_]) -> IntArray:
    """Indices of the requests to plan, ascending: those to do whose row has a prompt."""
    if len(todo) != len(requests):
        raise ValueError(f"todo has {len(todo)} entries for {len(requests)} requests")
    faulty = np.zeros(prompts.num_rows, dtype=np.bool_)
    faulty[np.fromiter(prompts.faults, dtype=np.int64, count=len(prompts.faults))] = True
    return np.flatnonzero(todo & ~faulty[requests.row])


def distinct_prompts(prompts: PromptTable, rows: IntArray) -> Prompts:
    """`rows` may repeat. A row without tokens must have been left out: it cannot be decoded."""
    used = np.zeros(prompts.num_rows, dtype=np.bool_)
    used[rows] = True
    row = np.flatnonzero(used)
    start = prompts.offsets[row]
    length = prompts.offsets[row + 1] - start
    outside = (start < 0) | (length < 0) | (start + length > len(prompts.tokens))
    if outside.any():
        damaged = int(row[outside.argmax()])
        raise ValueError(f"the token store is damaged: it does not hold the tokens of row {damaged}")
    if len(row) and not length.all():
        raise ValueError(f"row {row[length.argmin()]} has neither a prompt nor a fault")
    order, lcp = sort_prompts(prompts.tokens, start, length)
    length = length[order]
    new = lcp < length  # a whole prompt in common with the one before means it is the same
    of_row = np.full(prompts.num_rows, -1, dtype=np.int64)
    of_row[row[order]] = np.cumsum(new) - 1
    return Prompts(lcp[new], length[new], of_row)


def collapse_requests(
    prompts: PromptTable, prompt_of_row: IntArray, requests: RequestTable, planned: IntArray
) -> Sequences:
    """Greedy requests with the same prompt and parameters share a sequence; every other one has its own."""
    prompt = prompt_of_row[requests.row[planned]]
    params = prompts.params_of[requests.row[planned]]
    greedy = np.array([p.greedy for p in prompts.params], dtype=np.bool_)[params]
    own = len(prompts.params) + np.arange(len(planned))
    kind = np.where(greedy, params, own)

    together = _sorted_by_prompt(prompt, kind)
    prompt, kind, params, request = prompt[together], kind[together], params[together], planned[together]
    new = np.ones(len(planned), dtype=np.bool_)
    new[1:] = (prompt[1:] != prompt[:-1]) | (kind[1:] != kind[:-1])
    first = np.flatnonzero(new)
    count = np.diff(first, append=len(planned))

    if (prompt[first[1:]] == prompt[first[:-1]]).any():  # else they are in order already
        by_request = np.lexsort((request[first], prompt[first]))
        first, count = first[by_request], count[by_request]
    ptr = np.append(0, np.cumsum(count))
    return Sequences(prompt[first], params[first], ptr, request[take_ranges(first, count)])


def _sorted_by_prompt(prompt: IntArray, kind: IntArray) -> IntArray:
    """Indices by prompt, then kind, then place. Without a sort where every prompt is there once, as most often."""
    place = np.full(int(prompt.max(initial=-1)) + 1, -1, dtype=np.int64)
    place[prompt] = np.arange(len(prompt))
    if len(place) == len(prompt) and place.min(initial=0) >= 0:
        return place
    ordered: IntArray = np.lexsort((kind, prompt))
    return ordered


def take_ranges(start: IntArray, count: IntArray) -> IntArray:
    """The indices start[0] .. start[0] + count[0] - 1, start[1] ..., one range after another."""
    skipped = np.cumsum(count) - count
    indices: IntArray = np.arange(int(count.sum())) + np.repeat(start - skipped, count)
    return indices
