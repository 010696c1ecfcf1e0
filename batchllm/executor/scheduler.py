"""What the next step computes: every decode token, then as much prompt as the step holds.

Sequences start in the plan's order, so a shared prefix is computed once, just before its first user, and freed
after its last. When outputs run longer than estimated and memory runs out, the newest sequences step back: they keep
their tokens, lose their KV, and come back before anything new starts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batchllm.core import Plan, PromptTable
from batchllm.executor.admission import Admission
from batchllm.executor.kv_memory import KvMemory
from batchllm.executor.node_memory import NodeMemory
from batchllm.executor.node_store import NodeStore
from batchllm.executor.prompt_ends import PromptEnds
from batchllm.executor.prompt_queue import PromptQueue
from batchllm.executor.running import Running
from batchllm.executor.step import UNREAD, Sample, StepBatch
from batchllm.executor.step_builder import StepBuilder
from batchllm.executor.stored_kv import StoredKv
from batchllm.executor.waiting_line import WaitingLine
from batchllm.planner.leaf_slots import LEAD
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.score_reads import ScoreReads

_MOST_WASTE = 16


class TokensOutstanding(Exception):
    """A step cannot be scheduled before the tokens of the step that is under way are known."""


class Scheduler:
    """`schedule` gives the next step or None when all is done; `absorb` takes the sampled tokens of that step.

    A device that works while the next step is scheduled splits `absorb`: `advance` as soon as the step has been
    handed over, `settle` when its tokens are known. One step may be under way while the next is scheduled.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: PromptTable,
        pool: KvMemory,
        estimator: LengthEstimator,
        max_step_tokens: int,
        max_length: int | None,
        max_running: int,
        scores: ScoreReads | None = None,
        stored: StoredKv | None = None,
    ):
        self.plan, self.prompts, self.estimator = plan, prompts, estimator
        self.max_step_tokens = max_step_tokens
        self.max_running = min(max_running, max_step_tokens)
        self.max_length = max_length
        self.stored = stored
        self.running: dict[int, Running] = {}  # by sequence, in order of admission
        self.failed: list[tuple[Running, str]] = []  # sequences that no memory can hold
        self.preemptions = 0
        self.output_tokens = 0  # that became part of an answer
        scored = np.zeros(plan.num_sequences, dtype=bool) if scores is None else scores.scored
        self.nodes = NodeStore(plan, pool)
        self.memory = NodeMemory(self.nodes, stored)
        self._line = WaitingLine(plan, prompts, self.nodes, max_length)
        self._queue = PromptQueue(plan, prompts, self.nodes, scores, stored)
        self._ends = PromptEnds(plan, self.nodes, scored)
        self._under_way = 0  # steps that have been handed over and not settled

    @property
    def pool(self) -> KvMemory:
        return self.nodes.pool

    @property
    def waiting(self) -> int:
        """Sequences that have not started, or stepped back and have not come back."""
        return len(self._line)

    def is_scored(self, sequence: int) -> bool:
        """Whether the sequence's tokens are scored and none is chosen."""
        return self._ends.is_scored(sequence)

    def keeps_logits(self, node: int) -> bool:
        """Whether logits at the end of `node` will be needed by sequences that start later."""
        return self._ends.keeps_logits(node)

    # ---- the next step

    def schedule(self) -> StepBatch | None:
        """Raises TokensOutstanding when a sequence would have to step back whose tokens are not all known."""
        builder = StepBuilder()
        for run in self._make_room():
            self._add_decode(builder, run)
        admission = Admission(self.plan, self.nodes, self.estimator, list(self.running.values()))
        while builder.size < self.max_step_tokens and (self._queue or self._admit(builder, admission)):
            if self._queue:
                self._add_prompt(builder)
        if builder.size == 0 and not builder.samples:
            assert not self.running or self._under_way, "nothing to do although sequences run"
            return None
        return builder.build()

    def _add_decode(self, builder: StepBuilder, run: Running) -> None:
        position = run.leaf_start + run.leaf_tokens - 1
        if run.pending:
            builder.pending.append((builder.size, run.sequence))
        tokens = np.array([-1] if run.pending else run.output[-1:], dtype=np.int64)
        above = self.nodes.kv_above(run.path)
        builder.add_chunk(tokens, position, run.leaf_start, self.nodes.kv(run.leaf), above, prompt_tokens=0)
        builder.decode_tokens += 1
        self.nodes.computed[run.leaf] += 1
        builder.samples.append(Sample(run.sequence, builder.read_last_logits(run.leaf), run.leaf))

    def _add_prompt(self, builder: StepBuilder) -> None:
        ended = self._queue.add_next(builder, self.max_step_tokens - builder.size)
        if ended is not None:
            self._ends.reached(builder, *ended)

    def _admit(self, builder: StepBuilder, admission: Admission) -> bool:
        """Starts the next sequence, or fails it when no memory could ever hold it. False: not now."""
        run = self._line.first()
        if run is None or len(self.running) >= self.max_running:
            return False
        alone = not self.running
        extents = len(self.running) + len(self.nodes.shared) + 1
        if not alone and not admission.fits(run, self.pool.usable(extents)):
            return False
        lead = min(LEAD, admission.remaining(run))
        placed = self.memory.place(builder, run, lead, alone)
        if not placed and alone:
            placed = self.memory.place(builder, run, 1, alone)
        if not placed and not alone:
            return False
        self._line.take()
        if not placed:
            for node, heir in self.nodes.abandon(run.path, run.leaf):
                self._queue.pass_on(node, heir)
            needed = run.prompt_length + len(run.output)
            self.failed.append((run, f"{needed} tokens do not fit in KV memory; raise engine.kv_memory"))
            return True
        admission.take(run)
        self.running[run.sequence] = run
        self._queue.put(run)
        self.nodes.enter(run.path, run.leaf)
        self._ends.start(builder, run)
        return True

    # ---- when memory is short

    def _make_room(self) -> list[Running]:
        """Gives every decoding sequence a slot for its token; steps back the newest ones if it must."""
        for run in list(self.running.values()):
            while run.sequence in self.running and run.decodes and not self.memory.grow(run):
                if not self.memory.give_up_some(run):
                    self._give_way(run)
        return [run for run in self.running.values() if run.decodes]

    def _give_way(self, run: Running) -> None:
        """The newest sequence steps back, `run` itself if it is the newest; alone, it can never go on."""
        if self._under_way:
            raise TokensOutstanding
        if len(self.running) > 1:
            self._step_back(next(reversed(self.running.values())))
            return
        self._leave(run)
        self.nodes.finish(run.path, run.leaf)
        reason = f"KV memory ran out after {len(run.output)} output tokens; raise engine.kv_memory"
        self.failed.append((run, reason))

    def _step_back(self, run: Running) -> None:
        self._leave(run)
        self.nodes.leave(run.path, run.leaf)
        self._line.put_back(run)
        self.preemptions += 1

    def _leave(self, run: Running) -> None:
        """It runs no more, without having finished."""
        del self.running[run.sequence]
        self._queue.forget(run)
        self._ends.forget(run)

    def restart(self, batch: StepBatch, pool: KvMemory) -> None:
        """Another pool, empty: `batch` has not been run, nothing is under way, every sequence steps back."""
        assert self._under_way == 0
        for run in reversed(list(self.running.values())):
            self._step_back(run)
        self._ends.undo(batch)
        self._queue.clear()
        self.nodes.drop_all()
        self.nodes.pool = pool

    # ---- what becomes of a step

    def absorb(
        self,
        batch: StepBatch,
        tokens: np.ndarray,
        logprobs: np.ndarray | None,
        finish: Callable[[Running], bool],
    ) -> list[Running]:
        """Appends each sample's token to its sequence; returns those that `finish` says have ended."""
        self.advance(batch)
        return self.settle(batch, tokens, logprobs, finish)

    def advance(self, batch: StepBatch, repeats: int = 1) -> None:
        """The step, repeated so often with each time's tokens, is under way: its tokens are pending."""
        for sample in batch.samples:
            run = self.running[sample.sequence]
            run.pending += repeats
            if repeats > 1:
                self.nodes.computed[run.leaf] += repeats - 1
        self._under_way += 1
        self.nodes.end_step()

    def settle(
        self,
        batch: StepBatch,
        tokens: np.ndarray,
        logprobs: np.ndarray | None,
        finish: Callable[[Running], bool],
    ) -> list[Running]:
        """Tokens of the oldest step under way, [samples] or, of a repeated step, [repeats, samples].

        Returns the sequences that `finish` says have ended. What was computed beyond their end is left out.
        """
        self._under_way -= 1
        finished: list[Running] = []
        by_repeat = (-1, max(1, len(batch.samples)))
        for number, chosen in enumerate(tokens.reshape(by_repeat).tolist()):
            chances = None if logprobs is None else logprobs.reshape(by_repeat)[number]
            for index, sample in enumerate(batch.samples):
                run = self.running.get(sample.sequence)
                if run is None:  # it ended in an earlier step, while this one was under way
                    continue
                run.take(chosen[index], None if chances is None else chances[index])
                self.output_tokens += sample.logit_row != UNREAD
                if finish(run):
                    finished.append(run)
                    del self.running[run.sequence]
                    self.nodes.finish(run.path, run.leaf)
        if finished:
            self._learn(finished)
        return finished

    def _learn(self, finished: list[Running]) -> None:
        """What later sequences are expected to decode is refreshed in every step."""
        sequences = [run.sequence for run in finished]
        params, groups = self.plan.sequence_params[sequences], self.plan.sequence_group[sequences]
        lengths = np.array([len(run.output) for run in finished], dtype=np.int64)
        limits = np.array([run.limit for run in finished], dtype=np.int64)
        self.estimator.learn(params, lengths, limits, groups)

    def repeats(self, batch: StepBatch, most: int) -> int:
        """How often a step that only decodes may be run in a row, each time with the tokens of the time before.

        The leaves have room for all of it, and no position is beyond the model's last. Some sequences may reach their
        limit earlier: no more of the work than one part in _MOST_WASTE is in vain for that.
        """
        runs = [self.running[sample.sequence] for sample in batch.samples]
        left = np.array([run.limit - run.decoded for run in runs], dtype=np.int64)
        count = most
        if self.max_length is not None:
            count = min(count, self.max_length - int(batch.positions.max()))
        while count > 1 and _MOST_WASTE * int(np.maximum(count - left, 0).sum()) > count * len(left):
            count -= 1
        for run in runs:
            count = self.memory.grow_ahead(run, count)
        return count
