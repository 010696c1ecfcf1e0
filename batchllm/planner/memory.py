"""How much KV memory the running sequences will need at worst, before they need it.

Time is counted in steps from the next one, step 0. A sequence takes part in steps 0 .. remaining - 1 and
decodes one token in each; it holds `current` tokens during step 0, the tokens that step writes included,
and one more in each step after. So for a prompt that is computed in step 0 `current` is its length, for a
sequence that has decoded g tokens it is prompt + g (the newest one is written in step 0), and the last
token decoded is never written: at most current + remaining - 1 are held. From step `remaining` on it holds
nothing.

A shared node holds `shared_tokens` in steps 0 .. shared_until - 1: `shared_until` is the largest
`remaining` of the sequences below it, or FOREVER while sequences below it have not been started.

Use grows between the steps at which something is freed, so its peak lies in the last step before one of
them. (The idea is Tokasaurus' scheduler simulation, its formula here being closed over sorted finish
steps.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray

FOREVER = int(np.iinfo(np.int64).max)

IntLike = NDArray[np.integer[Any]]


def peak_tokens(current: IntLike, remaining: IntLike, shared_tokens: IntLike, shared_until: IntLike) -> int:
    """Most tokens held in any step >= 0, in O((n+m) log(n+m)). `remaining` >= 1; arrays [n, n, m, m]."""
    finish = np.asarray(remaining, dtype=np.int64)
    until = np.asarray(shared_until, dtype=np.int64)
    ends = np.unique(np.concatenate((finish, until[until < FOREVER])))
    step = np.append(0, ends[ends > 1] - 1)
    running, held = _held_from(finish, np.asarray(current, dtype=np.int64), step)
    _, shared = _held_from(until, np.asarray(shared_tokens, dtype=np.int64), step)
    return int((held + running * step + shared).max())


def _held_from(until: IntArray, tokens: IntArray, step: IntArray) -> tuple[IntArray, IntArray]:
    """Number and summed tokens of the entries that are still there in each step: those with until > step."""
    by_end = np.argsort(until)
    gone = np.searchsorted(until[by_end], step, side="right")
    gone_tokens = np.append(0, np.cumsum(tokens[by_end]))
    return len(until) - gone, gone_tokens[-1] - gone_tokens[gone]


def fits(
    current: IntLike, remaining: IntLike, shared_tokens: IntLike, shared_until: IntLike, budget: int
) -> bool:
    """Whether no future step holds more than `budget` tokens."""
    return peak_tokens(current, remaining, shared_tokens, shared_until) <= budget


def how_many_fit(
    current: IntLike,
    remaining: IntLike,
    candidates_prompt: IntLike,
    candidates_remaining: IntLike,
    shared_tokens: IntLike,
    shared_until: IntLike,
    budget: int,
    candidates_shared: IntLike | None = None,
) -> int:
    """The largest k such that the first k candidates fit beside what is running; 0 if nothing more does.

    A candidate holds `candidates_prompt` tokens of its own from step 0 on (its prompt is computed in that
    step). `candidates_shared`: tokens of shared nodes that are not stored yet and come with this candidate;
    they are taken to stay for ever. More candidates never hold less in any step, hence the binary search.
    """
    prompt = np.asarray(candidates_prompt, dtype=np.int64)
    shared = np.zeros(len(prompt), dtype=np.int64) if candidates_shared is None else candidates_shared

    def first_fit(k: int) -> bool:
        return fits(
            np.concatenate((current, prompt[:k])),
            np.concatenate((remaining, candidates_remaining[:k])),
            np.append(shared_tokens, shared[:k].sum()),
            np.append(shared_until, FOREVER),
            budget,
        )

    fitting, failing = 0, len(prompt) + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if first_fit(middle):
            fitting = middle
        else:
            failing = middle
    return fitting
