"""Decides whether one more sequence fits, by simulating KV use until everything running has finished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchllm.core import Plan
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.memory import peak_tokens

_FOREVER = np.iinfo(np.int64).max


class Admission:
    """One look at the running sequences, extended as candidates are taken. Made anew each step.

    Counts tokens: a running sequence holds what it has now plus one more a step until its estimated end; a shared
    node counts once and stays while a sequence below it runs or waits. Tokasaurus (Juravsky et al., 2025) admits
    by the same kind of simulation.
    """

    def __init__(self, plan: Plan, nodes: NodeStore, estimator: LengthEstimator, running: Sequence[Running]):
        self._plan, self._nodes, self._estimator = plan, nodes, estimator
        self._running = list(running)
        self._current = [run.leaf_tokens for run in running]
        self._remaining = self._estimate(running)
        self._shared = {node: nodes.prompt_length(node) for node in nodes.shared}
        self._candidate: Running | None = None
        self._candidate_remaining = 0
        self._total = sum(self._current) + sum(self._remaining) + sum(self._shared.values())

    def fits(self, candidate: Running, capacity: int) -> bool:
        """Whether the pool's `capacity` is never exceeded, as far as lengths can be foreseen."""
        added = {node: self._nodes.prompt_length(node) for node in candidate.path if node not in self._shared}
        remaining = self.remaining(candidate)
        if self._total + sum(added.values()) + candidate.leaf_tokens + remaining <= capacity:
            return True
        shared = {**self._shared, **added}
        running = [*self._running, candidate]
        currents = np.array([*self._current, candidate.leaf_tokens], dtype=np.int64)
        remainings = np.array([*self._remaining, remaining], dtype=np.int64)
        until = self._held_until(shared, running, remainings)
        sizes = np.fromiter(shared.values(), dtype=np.int64, count=len(shared))
        return bool(peak_tokens(currents, remainings, sizes, until) <= capacity)

    def remaining(self, candidate: Running) -> int:
        """Estimated output tokens still to come. Asked for several times of the same candidate, estimated once."""
        if self._candidate is not candidate:
            self._candidate, self._candidate_remaining = candidate, self._estimate([candidate])[0]
        return self._candidate_remaining

    def take(self, candidate: Running) -> None:
        """Counts an admitted candidate from here on."""
        remaining = self.remaining(candidate)
        self._running.append(candidate)
        self._current.append(candidate.leaf_tokens)
        self._remaining.append(remaining)
        added = {node: self._nodes.prompt_length(node) for node in candidate.path if node not in self._shared}
        self._shared.update(added)
        self._total += sum(added.values()) + candidate.leaf_tokens + remaining

    def _held_until(
        self, shared: dict[int, int], running: Sequence[Running], remaining: np.ndarray
    ) -> np.ndarray:
        """Step at which each shared node's last user ends; never, while sequences below it have yet to start."""
        index = {node: number for number, node in enumerate(shared)}
        until = np.zeros(len(shared), dtype=np.int64)
        users = np.zeros(len(shared), dtype=np.int64)
        for run, left in zip(running, remaining):
            for node in run.path:
                number = index[node]
                until[number] = max(until[number], left)
                users[number] += 1
        nodes = np.fromiter(shared, dtype=np.int64, count=len(shared))
        return np.where(self._nodes.unfinished[nodes] > users, _FOREVER, until)

    def _estimate(self, running: Sequence[Running]) -> list[int]:
        if not running:
            return []
        sequences = [run.sequence for run in running]
        params, groups = self._plan.sequence_params[sequences], self._plan.sequence_group[sequences]
        decoded = np.array([run.decoded for run in running], dtype=np.int64)
        limits = np.array([run.limit for run in running], dtype=np.int64)
        estimates: list[int] = self._estimator.estimate(params, decoded, limits, groups).tolist()
        return estimates
