"""The engine of a GPU: while the device runs one step, the host schedules the next one.

A step's tokens stay on the device, where the next step takes them from, and are read back when that step has been
queued. So a sequence is seen to have ended one launch late; what was computed beyond its end is left out, and nothing
a row gets depends on it. Steps that only decode are repeated on the device (decode_loop). All work goes to one stream:
memory that is freed while a step still uses it is used again only by later steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchllm.core import SequenceResult
from batchllm.errors import JobError
from batchllm.executor.cuda_graph import Recorder, recorder_for
from batchllm.executor.decode_loop import MOST_REPEATS, DecodeLoop
from batchllm.executor.device_memory import collect, is_out_of_memory
from batchllm.executor.engine import Engine
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.paged_pool import PagedPool
from batchllm.executor.running import Running
from batchllm.executor.sample_rows import DeviceRows, SampleRows
from batchllm.executor.scheduler import TokensOutstanding
from batchllm.executor.step import StepBatch
from batchllm.executor.upload import upload

_SMALLER = 0.8  # the next pool, after memory ran out in a step
_WAITING_REPEATS = 4  # while sequences wait for those that run
_STOPPING_REPEATS = 8  # while those that run may end early: what is decoded beyond an end is in vain


@dataclass
class Launch:
    """A step under way."""

    batch: StepBatch
    repeats: int
    last_tokens: Tensor  # [samples] of the last repeat, on the device
    readback: Readback
    held: tuple[int, int]  # KV slots and sequences, for the trace


class Readback:
    """Results on their way to the host."""

    def __init__(self, tokens: Tensor, logprobs: Tensor | None):
        self._event: torch.cuda.Event | None = None
        self._tokens, self._logprobs = self._copy(tokens), None if logprobs is None else self._copy(logprobs)
        if tokens.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @staticmethod
    def _copy(values: Tensor) -> Tensor:
        """A copy: the device's own memory is soon overwritten."""
        if not values.is_cuda:
            return values.clone()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def wait(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.numpy(), None if self._logprobs is None else self._logprobs.numpy()


class DeviceEngine(Engine):
    """Engine for a PagedBackend. The same results as `Engine`; memory that runs out is answered by a smaller pool."""

    backend: PagedBackend
    pool: PagedPool

    def __init__(self, *arguments: Any, recorder: Recorder | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self._recorder = recorder or recorder_for(self.backend.device)
        self._under_way: Launch | None = None
        self._smallest_pool = self.pool.capacity // 8
        self.decode = self._make_decode()

    def run(self) -> Iterator[list[SequenceResult]]:
        """Whatever happens, graphs and the pool are given back: what runs next may need their memory."""
        try:
            yield from self._run_all()
        finally:
            self._under_way = None
            if self.decode is not None:
                self.decode.forget()
            self.pool.release()
        failed = self._take_failed()
        if failed:
            yield failed

    def _run_all(self) -> Iterator[list[SequenceResult]]:
        self._lap("other")
        while True:
            batch = self._schedule()
            if batch is None and self._under_way is None:
                break
            self._lap("schedule")
            launched, finished = self._launch_and_land(batch)
            self._under_way = launched
            results = [self._result(run) for run in finished] + self._take_failed()
            if results:
                yield results
            self._lap("other")

    def _schedule(self) -> StepBatch | None:
        try:
            return self.scheduler.schedule()
        except TokensOutstanding:
            return None  # the step under way is settled first

    def _launch_and_land(self, batch: StepBatch | None) -> tuple[Launch | None, list[Running]]:
        """Queues the step, then waits for the one before it."""
        launched, out_of_memory = None, False
        if batch is not None:
            try:
                launched = self._launch(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
        finished = self._land()
        if out_of_memory and batch is not None:
            self._restart(batch)
        return launched, finished

    def _land(self) -> list[Running]:
        """Takes in the step under way."""
        launch, self._under_way = self._under_way, None
        if launch is None:
            return []
        tokens, logprobs = launch.readback.wait()
        finished = self.scheduler.settle(launch.batch, tokens, logprobs, self._has_ended)
        self._lap("absorb")
        self._count(launch.batch)
        self.stats.steps += launch.repeats - 1
        self._trace_step(launch.batch, *launch.held)
        return finished

    # ---- a step is queued

    def _launch(self, batch: StepBatch) -> Launch:
        held = self.pool.used, len(self.scheduler.running)
        runs = [self.scheduler.running[sample.sequence] for sample in batch.samples]
        rows = SampleRows.of(runs, self._keys[[run.sequence for run in runs]])
        repeats = 1
        if batch.only_decodes:
            repeats = self.scheduler.repeats(batch, self._most_repeats(runs))
            tokens, logprobs = self.decode.launch(batch, repeats, rows, lambda into: self._fill(into, batch))
            last = tokens[-1]
        else:
            self.decode.interrupt()
            tokens, logprobs = self._run_once(batch, rows)
            last = tokens
        self._lap("forward")
        launch = Launch(batch, repeats, last, Readback(tokens, logprobs), held)
        self.scheduler.advance(batch, repeats)
        return launch

    def _most_repeats(self, runs: list[Running]) -> int:
        if self.scheduler.waiting:
            return _WAITING_REPEATS
        fixed = all(
            run.params.ignore_eos and not run.params.stop and not run.params.stop_token_ids for run in runs
        )
        return MOST_REPEATS if fixed else _STOPPING_REPEATS

    @torch.inference_mode()
    def _run_once(self, batch: StepBatch, rows: SampleRows) -> tuple[Tensor, Tensor | None]:
        """Tokens [samples] and log-probabilities of a step that is launched kernel by kernel."""
        logits = self._step_logits(batch)
        chosen_from = self._sampled_logits(batch, logits)
        self._forget_logits()
        device = self.backend.device
        if not len(batch.samples):
            return torch.zeros(0, dtype=torch.int64, device=device), None
        kernels = self.backend.kernels
        tokens = DeviceRows.of(rows, device).choose(chosen_from, rows.greedy, kernels)
        return tokens, kernels.token_logprobs(chosen_from, tokens) if rows.wants_logprobs else None

    def _step_logits(self, batch: StepBatch) -> Tensor:
        if not len(batch.tokens):
            return torch.empty(0, 0, device=self.backend.device)
        attention = self.backend.attention(self.pool, batch)
        self._fill(attention.step.tokens, batch)
        self._lap("prepare")
        logits = self.model.logits(
            attention.step.tokens, attention.step.positions, attention, attention.step.logit_rows
        )
        for node, row in batch.keep_logits:
            self._kept_logits[node] = logits[row].clone()
        return logits

    def _sampled_logits(self, batch: StepBatch, logits: Tensor) -> Tensor:
        """[samples, V]"""
        wanted = [sample.logit_row for sample in batch.samples]
        if any(row < 0 for row in wanted):
            return torch.stack([self._logits_of(sample, logits) for sample in batch.samples])
        if wanted == list(range(len(logits))):
            return logits
        return logits.index_select(0, upload([np.array(wanted, dtype=np.int64)], self.backend.device)[0])

    def _fill(self, into: Tensor, batch: StepBatch) -> None:
        """Puts tokens that only the device knows, those of the step under way, where the step reads its tokens."""
        if not batch.pending:
            return
        assert self._under_way is not None, "pending tokens of no step"
        place = {sample.sequence: index for index, sample in enumerate(self._under_way.batch.samples)}
        rows = np.array([row for row, _ in batch.pending], dtype=np.int64)
        sources = np.array([place[sequence] for _, sequence in batch.pending], dtype=np.int64)
        to, source = upload([rows, sources], self.backend.device)
        into.index_copy_(0, to, self._under_way.last_tokens.index_select(0, source))

    # ---- memory has run out

    def _restart(self, batch: StepBatch) -> None:
        """A smaller pool. Every sequence computes its KV again; tokens are kept."""
        tokens = int(self.pool.capacity * _SMALLER)
        if tokens < self._smallest_pool:
            raise JobError(
                "engine.max_step_tokens: the GPU's memory does not suffice for one step; lower "
                "engine.max_step_tokens or set engine.device to cpu."
            )
        self.decode = None  # type: ignore[assignment]  # its graphs hold memory and the pool's addresses
        self.pool.release()
        collect()
        pool = self.backend.make_pool(self.model.layers, tokens, self.model.dtype)
        self.scheduler.restart(batch, pool)
        self.pool = pool
        self.decode = self._make_decode()

    def _make_decode(self) -> DecodeLoop:
        return DecodeLoop(self.model, self.backend, self.pool, self._recorder)
