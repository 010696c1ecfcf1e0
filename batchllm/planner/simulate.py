"""Replays what the executor's scheduler does with a plan, without a model: which steps there are and what each does.

The rules are those of `executor.scheduler`: sequences start in the plan's order, the next one when all prompt tokens of
those before it are in a step that has room left, and when a look at all future steps says that memory suffices
(planner.memory). Each step holds one token of every decoding sequence, then prompt tokens. Lengths are taken as known,
so nothing ever steps back, and the future is fixed but for sequences that have not started: each is looked at once, its
start is searched for in the known future, and steps in which nothing starts cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.core import IntArray, Plan
from batchllm.planner.kept_donors import KeptDonors
from batchllm.planner.leaf_slots import LEAD, first_slots, grown_slots
from batchllm.planner.loads import StepLoads
from batchllm.planner.shared_reads import SharedReads
from batchllm.planner.timeline import Event, Level, Timeline


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """The memory and the steps that are replayed. `max_length`: of the model, for who says how long outputs are."""

    kv_tokens: int
    max_step_tokens: int
    max_running: int = 4096
    max_length: int | None = None


@dataclass(frozen=True)
class Simulation:
    """What a run of the plan comes to when every output is as long as expected."""

    loads: StepLoads
    peak_kv_tokens: int  # slots of KV memory taken, room for tokens to come included
    failed: int  # sequences that fit in memory not even alone

    @property
    def steps(self) -> int:
        return self.loads.num_steps

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed."""
        return round(self.loads.total("prompt_tokens"))


def simulate(plan: Plan, output_tokens: IntArray, options: SimulationOptions) -> Simulation:
    """`output_tokens`: expected length of each sequence's output; 0 counts as 1, for a sequence samples one token.

    Of an output that does not fit in memory even alone, what fits is simulated.
    """
    room = options.kv_tokens - plan.node_end[plan.sequence_node].astype(np.int64) + 1
    replay = _Replay(plan, np.maximum(np.minimum(output_tokens, room), 1), options)
    for sequence in range(plan.num_sequences):
        replay.start(sequence)
    loads = replay.time.finish()
    return Simulation(loads, min(replay.time.peak, options.kv_tokens), replay.failed)


class _Replay:
    """`stack` holds the shared nodes with sequences below that have not started, from the top down."""

    def __init__(self, plan: Plan, output: IntArray, options: SimulationOptions):
        self.time = Timeline()
        self.failed = 0
        self._kv_tokens = options.kv_tokens
        self._step_tokens = options.max_step_tokens
        self._max_running = min(options.max_running, options.max_step_tokens)
        self._output: list[int] = output.tolist()
        self._leaf: list[int] = plan.sequence_node.tolist()
        self._start: list[int] = plan.node_start.tolist()
        self._length: list[int] = (plan.node_end - plan.node_start).tolist()
        self._ends_sequence: list[bool] = _ends_sequences(plan).tolist()
        first = np.searchsorted(plan.sequence_node, np.arange(plan.num_nodes))
        self._last_sequence: list[int] = (first + plan.node_leaves - 1).tolist()
        self._last_use = [-1] * plan.num_nodes  # last step in which a sequence below runs
        self._placed = [False] * plan.num_nodes
        self._stack: list[int] = []
        self._open = 0  # tokens of the placed nodes of the stack
        self._kept = KeptDonors(plan, self.time)
        self._reads = SharedReads(self._length, self.time)
        self._used = 0  # tokens in the current step

    def start(self, sequence: int) -> None:
        """Lets the next sequence of the plan start as soon as it may."""
        self.time.forget()
        leaf, output = self._leaf[sequence], self._output[sequence]
        opened = self._leaf[sequence - 1] + 1 if sequence else 0
        self._stack.extend(range(opened, leaf))
        missing = self._missing()
        closing = self._closing(sequence)
        if self._used >= self._step_tokens:
            self._go(self.time.now + 1)
        slots = self._wait(leaf, output, missing, closing)
        if slots:
            self._place(leaf, output, missing, slots)
        else:
            self.failed += 1
        for _ in closing:
            self._close(self._stack.pop())

    def _missing(self) -> list[int]:
        """Nodes of the stack that have no memory: the lowest ones."""
        resident = len(self._stack)
        while resident and not self._placed[self._stack[resident - 1]]:
            resident -= 1
        return self._stack[resident:]

    def _closing(self, sequence: int) -> list[tuple[int, int]]:
        """(tokens, last use so far) of the nodes whose last sequence this is, the lowest first."""
        closing, use = [], -1
        for node in reversed(self._stack):
            if self._last_sequence[node] != sequence:
                break
            use = max(use, self._last_use[node])
            closing.append((self._length[node], use))
        return closing

    # ---- waiting

    def _go(self, step: int) -> None:
        self.time.advance(step)
        self._used = int(self.time.current[Level.DECODING])

    def _wait(self, leaf: int, output: int, missing: list[int], closing: list[tuple[int, int]]) -> int:
        """Goes to the step in which the sequence starts. Returns the slots that its leaf gets; 0: it never fits."""
        time, own = self.time, self._length[leaf]
        added = sum(self._length[node] for node in missing)
        slots = first_slots(own, output, LEAD)
        while time.current[Level.RUNNING] > 0:
            step = time.first_below(Level.RUNNING, self._max_running - 1)
            step = self._first_fit(step, own, output, added, closing)
            if step > time.now:
                self._go(step)
                continue
            if self._has_room(added + slots):
                return slots
            self._go(time.first_below(Level.RESERVED, self._kv_tokens - added - slots))
            self._kept.drop(time.now - 1)
        if self._has_room(added + slots):
            return slots
        slots = first_slots(own, output, 1)
        return slots if self._has_room(added + slots) else 0

    def _first_fit(self, step: int, own: int, output: int, added: int, closing: list[tuple[int, int]]) -> int:
        """The first step from `step` on in which no later step would hold too much, or in which nothing runs."""
        time = self.time
        if time.current[Level.CEILING] + added + own + output <= self._kv_tokens:
            return step
        steady = self._open + added - sum(tokens for tokens, _ in closing) - self._kv_tokens
        while step <= time.last:
            excess = time.foreseen(step, max(time.last, step + output - 1) + 1) + steady
            excess[:output] += own + np.arange(output)
            for tokens, use in closing:
                excess[: max(use - step + 1, output)] += tokens
            over = np.flatnonzero(excess > 0)
            if len(over) == 0:
                return step
            # Starting later lowers what it holds in a step by as much, and to nothing in the steps before.
            wait = np.where(over < output, np.minimum(excess[over], over + 1), over + 1)
            step += int(wait.max())
        return step

    def _has_room(self, slots: int) -> bool:
        """Whether memory has so many free slots, after what is kept only for copying has gone if need be."""
        free = self._kv_tokens - int(self.time.current[Level.RESERVED]) - slots
        if self._kept.slots() > free:
            self._kept.drop(self.time.now)
        return free >= 0

    # ---- starting

    def _place(self, leaf: int, output: int, missing: list[int], slots: int) -> None:
        """Takes memory, computes the prompt from the current step on, decodes after that."""
        time, begin = self.time, self.time.now
        own = self._length[leaf]
        for node in missing:
            self._placed[node] = True
            self._open += self._length[node]
            time.change(Level.RESERVED, begin, self._length[node])
            time.change(Level.CEILING, begin, self._length[node])
        time.change(Level.RUNNING, begin, 1)
        time.change(Level.RESERVED, begin, slots)
        time.change(Level.CEILING, begin, own + output - 1)
        copied = [self._kept.copy(node) for node in [*missing, leaf]]
        firsts = [self._compute(node, done) for node, done in zip([*missing, leaf], copied)]
        end = self._decode(leaf, output, begin)
        slots = self._grow(own, output, slots)
        time.change(Level.RUNNING, end + 1, -1)
        time.change(Level.RESERVED, end + 1, -slots)
        time.change(Level.CEILING, end + 1, -(own + output - 1))
        self._reads.read(self._stack, firsts, end)
        if self._stack:
            self._last_use[self._stack[-1]] = max(self._last_use[self._stack[-1]], end)
        self._kept.keep(leaf, end, slots)

    def _compute(self, node: int, done: int) -> int:
        """Puts the tokens of a node from `done` on into this and further steps; returns the first of them."""
        time, length, start = self.time, self._length[node], self._start[node]
        if done < length and self._used >= self._step_tokens:
            self._go(time.now + 1)
        first = time.now if done < length else -1
        while done < length:
            if self._used >= self._step_tokens:
                self._go(time.now + 1)
            count = min(self._step_tokens - self._used, length - done)
            now = time.now
            time.event(Event.PROMPT, now, count)
            time.event(Event.CHUNKS, now, 1)
            time.event(Event.OWN_PAIRS, now, count * done + count * (count + 1) // 2)
            time.event(Event.OWN_READ, now, done + count)
            time.event(Event.SHARED_PAIRS, now, count * start)
            done += count
            self._used += count
        if first >= 0 and self._ends_sequence[node]:
            time.event(Event.LOGITS, time.now, 1)
        return first

    def _decode(self, leaf: int, output: int, begin: int) -> int:
        """The first token is sampled in the current step. Returns the step in which the last one is."""
        time, own, start, now = self.time, self._length[leaf], self._start[leaf], self.time.now
        after = now + output
        time.reserve(after - 1)
        time.foresee(begin, now + 1, own)
        if output > 1:
            time.foresee(now + 1, after, own + 1, growing=True)
            time.change(Level.DECODING, now + 1, 1)
            time.change(Level.DECODING, after, -1)
            time.change(Level.OWN_READ, now + 1, own + 1)
            time.change(Level.OWN_READ, after, -(own + output - 1))
            time.grow(now + 2, after)
            time.change(Level.SHARED_PAIRS, now + 1, start)
            time.change(Level.SHARED_PAIRS, after, -start)
        return after - 1

    def _grow(self, own: int, output: int, slots: int) -> int:
        """Enlarges the leaf whenever it is full. Returns the slots it has in the end."""
        now = self.time.now
        while slots < own + output - 1:
            grown = grown_slots(own, output, slots)
            self.time.change(Level.RESERVED, now + slots - own + 1, grown - slots)
            slots = grown
        return slots

    # ---- ending

    def _close(self, node: int) -> None:
        """All sequences below have started: the node goes after the last of them."""
        time, tokens, use = self.time, self._length[node], self._last_use[node]
        if self._stack:
            self._last_use[self._stack[-1]] = max(self._last_use[self._stack[-1]], use)
        if not self._placed[node]:
            return
        self._open -= tokens
        after = max(use + 1, time.now)
        time.change(Level.RESERVED, after, -tokens)
        time.change(Level.CEILING, after, -tokens)
        time.foresee(time.now, after, tokens)
        self._kept.keep(node, after - 1, tokens)


def _ends_sequences(plan: Plan) -> NDArray[np.bool_]:
    """[nodes] whether logits at the node's end are computed: of leaves with tokens, and where such without end."""
    leaf = plan.sequence_node
    empty = plan.node_start[leaf] == plan.node_end[leaf]
    ends = np.zeros(plan.num_nodes, dtype=np.bool_)
    ends[leaf[~empty]] = True
    ends[plan.node_parent[leaf[empty]]] = True
    return ends
