"""The closed simulation of KV use against one that walks through every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner.memory import FOREVER, fits, how_many_fit, peak_tokens


def walked_peak(current, remaining, shared_tokens, shared_until) -> int:
    last = max([0, *remaining, *(u for u in shared_until if u != FOREVER)])
    return max(
        sum(c + t for c, r in zip(current, remaining) if t < r)
        + sum(s for s, u in zip(shared_tokens, shared_until) if t < u)
        for t in range(last + 1)
    )


def random_state(rng):
    n, m = int(rng.integers(0, 7)), int(rng.integers(0, 5))
    until = rng.integers(0, 14, size=m)
    until[rng.random(m) < 0.3] = FOREVER
    return rng.integers(0, 20, size=n), rng.integers(1, 12, size=n), rng.integers(0, 30, size=m), until


RUNNING = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=7)  # (current, remaining)
SHARED = st.lists(st.tuples(st.integers(0, 30), st.just(FOREVER) | st.integers(0, 14)), max_size=5)


@settings(max_examples=3000, deadline=None)
@given(RUNNING, SHARED)
def test_peak_is_that_of_every_step(running, shared):
    current, remaining = np.array(running, dtype=np.int64).reshape(-1, 2).T
    tokens, until = np.array(shared, dtype=np.int64).reshape(-1, 2).T
    expected = walked_peak(current.tolist(), remaining.tolist(), tokens.tolist(), until.tolist())
    assert peak_tokens(current, remaining, tokens, until) == expected


def test_fits_is_exact():
    state = np.array([10, 3]), np.array([4, 1]), np.array([100]), np.array([FOREVER])
    assert peak_tokens(*state) == 113  # step 0: 10 + 3; step 3: 13 + 0
    assert fits(*state, budget=113)
    assert not fits(*state, budget=112)


@pytest.mark.parametrize("with_shared", [False, True])
def test_how_many_fit_is_the_longest_prefix(with_shared):
    rng = np.random.default_rng(4)
    for _ in range(800):
        current, remaining, tokens, until = random_state(rng)
        k = int(rng.integers(0, 9))
        prompt, steps, shared = (
            rng.integers(1, 15, size=k),
            rng.integers(1, 12, size=k),
            rng.integers(0, 9, size=k),
        )
        budget = int(rng.integers(0, 160))
        fitting = [
            walked_peak(
                [*current, *prompt[:i]],
                [*remaining, *steps[:i]],
                [*tokens, *(shared[:i] if with_shared else [])],
                [*until, *([FOREVER] * i if with_shared else [])],
            )
            <= budget
            for i in range(k + 1)
        ]
        expected = fitting.index(False) - 1 if False in fitting else k
        extra = {"candidates_shared": shared} if with_shared else {}
        found = how_many_fit(current, remaining, prompt, steps, tokens, until, budget, **extra)
        assert found == max(expected, 0)


def test_nothing_runs():
    none = np.empty(0, dtype=np.int64)
    assert peak_tokens(none, none, none, none) == 0
    assert peak_tokens(none, none, np.array([7, 5]), np.array([3, FOREVER])) == 12
    assert how_many_fit(none, none, np.array([9]), np.array([2]), none, none, budget=9) == 0
    assert how_many_fit(none, none, np.array([9]), np.array([2]), none, none, budget=10) == 1
