"""What the next step computes: every decode token, then as much prompt as the step holds.

Sequences start in the plan's order, so a shared prefix is computed once, just before its first user, and freed
after its last. When outputs run longer than estimated and memory runs out, the newest sequences step back: they keep
their tokens, lose their KV, and come back before anything new starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from batchllm.core import Plan, PromptTable
from batchllm.executor.admission import Admission
from batchllm.executor.kv_memory import KvExtent, KvMemory
from batchllm.executor.node_store import NodeStore
from batchllm.executor.running import Running
from batchllm.executor.step import KEPT, UNREAD, Sample, StepBatch
from batchllm.executor.step_builder import Ancestor, StepBuilder
from batchllm.executor.stored_kv import StoredKv
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.score_reads import ScoreReads

_ROUND = 16  # leaf extents are multiples of this many slots, so that neighbours are often equally long
_LEAD = 128  # most output tokens a leaf reserves ahead
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
        self.plan, self.prompts, self.pool = plan, prompts, pool
        self.estimator = estimator
        self.max_step_tokens = max_step_tokens
        self.max_running = min(max_running, max_step_tokens)
        self.max_length = max_length
        self.nodes = NodeStore(plan, pool)
        self.stored = stored
        self.running: dict[int, Running] = {}  # by sequence, in order of admission
        self.failed: list[tuple[Running, str]] = []  # sequences that no memory can hold
        self.preemptions = 0
        self.output_tokens = 0  # that became part of an answer
        self._next = 0
        self._under_way = 0  # steps that have been handed over and not settled
        self._returning: deque[Running] = deque()
        self._queue: deque[tuple[int, Running | None]] = (
            deque()
        )  # nodes with tokens to compute; a leaf's owner
        self._awaiting: dict[int, list[Running]] = {}  # zero-length leaves whose parent is being computed
        self._scores = scores
        self._scored = np.zeros(plan.num_sequences, dtype=bool) if scores is None else scores.scored
        self._zero_leaves = _count_zero_leaves(plan, ~self._scored)

    def schedule(self) -> StepBatch | None:
        """Raises TokensOutstanding when a sequence would have to step back whose tokens are not all known."""
        builder = StepBuilder()
        decoding = self._make_room()
        for run in decoding:
            self._add_decode(builder, run)
        admission = Admission(self.plan, self.nodes, self.estimator, list(self.running.values()))
        while builder.size < self.max_step_tokens and (self._queue or self._admit(builder, admission)):
            if self._queue:
                self._add_prompt(builder)
        if builder.size == 0 and not builder.samples:
            assert not self.running or self._under_way, "nothing to do although sequences run"
            return None
        return builder.build()

    @property
    def waiting(self) -> int:
        """Sequences that have not started, or stepped back and have not come back."""
        return self.plan.num_sequences - self._next + len(self._returning)

    def is_scored(self, sequence: int) -> bool:
        """Whether the sequence's tokens are scored and none is chosen."""
        return bool(self._scored[sequence])

    def keeps_logits(self, node: int) -> bool:
        """Whether logits at the end of `node` will be needed by sequences that start later."""
        return self._zero_leaves.get(node, 0) > 0

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
                run.output.append(chosen[index])
                run.pending -= 1
                self.output_tokens += sample.logit_row != UNREAD
                if chances is not None and run.params.logprobs:
                    run.logprobs.append(float(chances[index]))
                if finish(run):
                    finished.append(run)
                    del self.running[run.sequence]
                    self.nodes.finish(run.path, run.leaf)
        self._learn(finished)
        return finished

    def repeats(self, batch: StepBatch, most: int) -> int:
        """How often a step that only decodes may be run in a row, each time with the tokens of the time before.

        The leaves have room for all of it. Some sequences may reach their limit earlier: no more of the work than
        one part in _MOST_WASTE is in vain for that.
        """
        runs = [self.running[sample.sequence] for sample in batch.samples]
        left = np.array([run.limit - run.decoded for run in runs], dtype=np.int64)
        count = most
        while count > 1 and _MOST_WASTE * int(np.maximum(count - left, 0).sum()) > count * len(left):
            count -= 1
        for run in runs:
            extent = self._leaf_extent(run)
            needed = run.leaf_tokens + count - 1
            if needed > extent.capacity and not self.pool.grow(extent, needed):
                count = extent.capacity - run.leaf_tokens + 1
        return count

    def restart(self, batch: StepBatch, pool: KvMemory) -> None:
        """Another pool, empty: `batch` has not been run, nothing is under way, every sequence steps back."""
        assert self._under_way == 0
        for sample in batch.samples:
            if sample.node != self.running[sample.sequence].leaf:
                self._zero_leaves[sample.node] += 1
        for run in reversed(list(self.running.values())):
            self._step_back(run)
        self.nodes.drop_all()
        self.pool = self.nodes.pool = pool
        self._queue.clear()
        self._awaiting.clear()

    def _learn(self, finished: list[Running]) -> None:
        """What later sequences are expected to decode is refreshed in every step."""
        sequences = [run.sequence for run in finished]
        params, groups = self.plan.sequence_params[sequences], self.plan.sequence_group[sequences]
        lengths = np.array([len(run.output) for run in finished], dtype=np.int64)
        limits = np.array([run.limit for run in finished], dtype=np.int64)
        if finished:
            self.estimator.learn(params, lengths, limits, groups)

    # ---- decode tokens

    def _make_room(self) -> list[Running]:
        """Gives every decoding sequence a slot for its token; steps back the newest ones if it must."""
        for run in list(self.running.values()):
            while run.sequence in self.running and self._decodes(run) and not self._has_slot(run):
                self._free_memory(run)
        return [run for run in self.running.values() if self._decodes(run)]

    def _decodes(self, run: Running) -> bool:
        return 0 < run.decoded < run.limit and not run.prefilling

    def _has_slot(self, run: Running) -> bool:
        """Whether the leaf has a slot for the next token, after growing it if there is room."""
        extent = self._leaf_extent(run)
        if run.leaf_tokens <= extent.capacity:
            return True
        wanted = _rounded(extent.capacity + max(_ROUND, extent.capacity // 2))
        capacity = min(wanted, max(run.leaf_tokens, run.most_leaf_tokens))
        if self.pool.grow(extent, capacity):
            return True
        moved = self.pool.allocate(capacity)
        if moved is None:
            return False
        self.pool.copy(extent, moved, extent.capacity)
        self.pool.free(extent)
        self.nodes.extent[run.leaf] = moved
        return True

    def _free_memory(self, run: Running) -> None:
        """One measure, the cheapest first. `run` itself steps back when it is the newest."""
        if self.nodes.drop_held() or self.nodes.drop_idle():
            return
        extent = self._leaf_extent(run)
        if self.pool.used < self.pool.capacity:
            self.pool.compact(last=extent)
            room = self.pool.capacity - self.pool.used
            if self.pool.grow(extent, extent.capacity + min(_ROUND, room)):
                return
        if self._under_way:
            raise TokensOutstanding
        if len(self.running) == 1:
            self._fail(
                run, f"KV memory ran out after {len(run.output)} output tokens; raise engine.kv_memory"
            )
        else:
            self._step_back(next(reversed(self.running.values())))

    def _leaf_extent(self, run: Running) -> KvExtent:
        extent = self.nodes.extent[run.leaf]
        assert extent is not None, "a running sequence has no KV"
        return extent

    def _step_back(self, run: Running) -> None:
        del self.running[run.sequence]
        self._forget(run)
        self.nodes.leave(run.path, run.leaf)
        self._returning.appendleft(run)
        self.preemptions += 1

    def _fail(self, run: Running, reason: str) -> None:
        del self.running[run.sequence]
        self._forget(run)
        self.nodes.finish(run.path, run.leaf)
        self.failed.append((run, reason))

    def _forget(self, run: Running) -> None:
        """Takes a sequence's unfinished prompt work out of the queue, with nodes nobody else needs yet."""
        run.prefilling = False
        mine = {node for node in run.path if self.nodes.users[node] == 1}
        self._queue = deque(
            (node, owner) for node, owner in self._queue if owner is not run and (owner or node not in mine)
        )
        for waiting in self._awaiting.values():
            if run in waiting:
                waiting.remove(run)

    def _add_decode(self, builder: StepBuilder, run: Running) -> None:
        extent = self._leaf_extent(run)
        position = run.leaf_start + run.leaf_tokens - 1
        if run.pending:
            builder.pending.append((builder.size, run.sequence))
        tokens = np.array([-1] if run.pending else run.output[-1:], dtype=np.int64)
        builder.add_chunk(
            tokens, position, run.leaf_start, extent, self._ancestors(run.path), prompt_tokens=0
        )
        builder.decode_tokens += 1
        self.nodes.computed[run.leaf] += 1
        builder.samples.append(Sample(run.sequence, builder.read_last_logits(run.leaf), run.leaf))

    # ---- prompt tokens

    def _add_prompt(self, builder: StepBuilder) -> None:
        """The next piece of the node at the head of the queue."""
        node, owner = self._queue[0]
        total = owner.leaf_tokens if owner else self.nodes.prompt_length(node)
        done = int(self.nodes.computed[node])
        end = total
        if self.stored is not None:
            done, end = self.stored.next_run(node, done, total)
        count = min(self.max_step_tokens - builder.size, end - done)
        tokens = self._node_tokens(node, owner, done, count)
        extent = self.nodes.extent[node]
        assert extent is not None
        path = owner.path if owner else self.nodes.path(node)
        start = int(self.plan.node_start[node])
        prompt = min(count, max(0, self.nodes.prompt_length(node) - done))
        builder.add_chunk(tokens, start + done, start, extent, self._ancestors(path), prompt)
        if self._scores is not None:
            builder.read_scores(self._scores.within(node, start + done, start + done + count))
        self.nodes.computed[node] = done + count
        if done + count == total:
            self._queue.popleft()
            self._complete(builder, node, owner)

    def _complete(self, builder: StepBuilder, node: int, owner: Running | None) -> None:
        """All known tokens of a node are in this step: samples what can be sampled from its last one."""
        if owner is not None:
            owner.prefilling = False
            row = UNREAD if self._scored[owner.sequence] else builder.read_last_logits(node)
            builder.samples.append(Sample(owner.sequence, row, node))
            return
        row = UNREAD
        if self._zero_leaves.get(node):
            row = builder.read_last_logits(node)
            builder.keep_logits.append((node, row))
        for run in self._awaiting.pop(node, []):
            self._sample_zero_leaf(builder, run, row, node)

    def _sample_zero_leaf(self, builder: StepBuilder, run: Running, row: int, node: int) -> None:
        if self._scored[run.sequence]:
            builder.samples.append(Sample(run.sequence, UNREAD, node))
            return
        builder.samples.append(Sample(run.sequence, row, node))
        self._zero_leaves[node] -= 1

    def _node_tokens(self, node: int, owner: Running | None, done: int, count: int) -> np.ndarray:
        begin = int(self.prompts.offsets[self.plan.node_row[node]]) + int(self.plan.node_start[node])
        own = self.nodes.prompt_length(node)
        prompt = self.prompts.tokens[begin + done : begin + min(done + count, own)]
        if owner is None or done + count <= own:
            return np.asarray(prompt, dtype=np.int64)
        output = np.array(owner.output[max(0, done - own) : done + count - own], dtype=np.int64)
        return np.concatenate([np.asarray(prompt[: max(0, own - done)], dtype=np.int64), output])

    def _ancestors(self, path: tuple[int, ...]) -> list[Ancestor]:
        found: list[Ancestor] = []
        for node in path:
            extent = self.nodes.extent[node]
            assert extent is not None, "a node above a running sequence has no KV"
            found.append((node, extent, int(self.plan.node_start[node]), self.nodes.prompt_length(node)))
        return found

    # ---- admission

    def _admit(self, builder: StepBuilder, admission: Admission) -> bool:
        """Starts the next sequence, or fails it when no memory could ever hold it. False: not now."""
        run = self._candidate()
        if run is None or len(self.running) >= self.max_running:
            return False
        alone = not self.running
        extents = len(self.running) + len(self.nodes.shared) + 1
        if not alone and not admission.fits(run, self.pool.usable(extents)):
            return False
        lead = min(_LEAD, admission.remaining(run))
        placed = self._place(builder, run, lead, alone) or (alone and self._place(builder, run, 1, alone))
        if not placed and not alone:
            return False
        self._take_candidate()
        if not placed:
            self.nodes.abandon(run.path, run.leaf)
            needed = run.prompt_length + len(run.output)
            self.failed.append((run, f"{needed} tokens do not fit in KV memory; raise engine.kv_memory"))
            return True
        admission.take(run)
        self.running[run.sequence] = run
        self.nodes.enter(run.path, run.leaf)
        self._start_zero_leaf(builder, run)
        return True

    def _candidate(self) -> Running | None:
        if self._returning:
            return self._returning[0]
        if self._next >= self.plan.num_sequences:
            return None
        return self._new_running(self._next)

    def _take_candidate(self) -> None:
        if self._returning:
            self._returning.popleft()
        else:
            self._next += 1

    def _new_running(self, sequence: int) -> Running:
        leaf = int(self.plan.sequence_node[sequence])
        params = self.prompts.params[self.plan.sequence_params[sequence]]
        prompt_length = int(self.plan.node_end[leaf])
        room = params.max_tokens if self.max_length is None else self.max_length - prompt_length
        return Running(
            sequence=sequence,
            leaf=leaf,
            path=self.nodes.path(leaf),
            leaf_start=int(self.plan.node_start[leaf]),
            prompt_length=prompt_length,
            params=params,
            limit=max(1, min(params.max_tokens, room)),  # a scored prompt may fill the model's whole length
        )

    def _place(self, builder: StepBuilder, run: Running, lead: int, alone: bool) -> bool:
        """Gives the sequence's missing nodes memory and queues their tokens. All or nothing.

        The leaf gets room for what is known and for `lead` output tokens; it grows later if need be.
        """
        missing = [node for node in run.path if self.nodes.extent[node] is None]
        leaf = min(
            _rounded(run.leaf_tokens + lead) if lead > 1 else run.leaf_tokens + 1, run.most_leaf_tokens
        )
        sizes = [self.nodes.prompt_length(node) for node in missing] + [max(leaf, run.leaf_tokens)]
        extents = self._allocate(sizes, run.path, alone)
        if extents is None:
            return False
        for node, extent in zip([*missing, run.leaf], extents):
            copied = self.nodes.place(node, extent)
            if copied is not None:
                builder.add_copy(copied[0], extent, copied[1])
            if self.stored is not None:
                self.stored.place(node, int(self.nodes.computed[node]), extent)
        queued = {node for node, _ in self._queue}
        for node in run.path:
            if self.nodes.computed[node] < self.nodes.prompt_length(node) and node not in queued:
                self._queue.append((node, None))
        if run.leaf_tokens:
            run.prefilling = True
            self._queue.append((run.leaf, run))
        return True

    def _allocate(self, sizes: list[int], path: tuple[int, ...], alone: bool) -> list[KvExtent] | None:
        """Extents of the given sizes, or None with nothing changed but memory tidied."""
        for attempt in range(4):
            if attempt == 1 and not self.nodes.drop_held():
                continue
            if attempt == 2 and not (alone and self.nodes.drop_idle(keep=path)):
                continue
            if attempt == 3:
                if self.pool.capacity - self.pool.used < sum(sizes):
                    return None
                self.pool.compact()
            extents = self._try_allocate(sizes)
            if extents is not None:
                return extents
        return None

    def _try_allocate(self, sizes: list[int]) -> list[KvExtent] | None:
        extents: list[KvExtent] = []
        for index, size in enumerate(sizes):
            extent = self.pool.allocate(size, high=index < len(sizes) - 1)  # the leaf is last
            if extent is None:
                for done in extents:
                    self.pool.free(done)
                return None
            extents.append(extent)
        return extents

    def _start_zero_leaf(self, builder: StepBuilder, run: Running) -> None:
        """A leaf without tokens of its own samples from logits at the end of its parent."""
        if run.leaf_tokens:
            return
        parent = run.path[-1]
        row = builder.logits_of(parent)
        if row is not None:
            self._sample_zero_leaf(builder, run, row, parent)
        elif self.nodes.computed[parent] == self.nodes.prompt_length(parent):
            self._sample_zero_leaf(builder, run, KEPT, parent)
        else:
            self._awaiting.setdefault(parent, []).append(run)


def _count_zero_leaves(plan: Plan, sampled: np.ndarray) -> dict[int, int]:
    """For each node, how many of the `sampled` sequences below end exactly where it ends."""
    leaves = plan.sequence_node[sampled]
    empty = leaves[plan.node_start[leaves] == plan.node_end[leaves]]
    parents, counts = np.unique(plan.node_parent[empty], return_counts=True)
    return dict(zip(parents.tolist(), counts.tolist()))


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND
