"""The loop that runs a plan on one model: schedule → run → absorb."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchllm.core import FinishReason, Plan, PromptLogprobs, PromptTable, RequestTable, SequenceResult
from batchllm.executor.backend import Backend
from batchllm.executor.forward_context import StepAttention
from batchllm.executor.grammars import load_vocabulary
from batchllm.executor.greedy_head import needs_only_largest
from batchllm.executor.logit_rules import LogitRules
from batchllm.executor.model import ModelRunner
from batchllm.executor.running import Running
from batchllm.executor.sampler import choose_tokens, note_top_logprobs, token_logprobs
from batchllm.executor.scheduler import Scheduler
from batchllm.executor.scores import ScoreStore, slice_rows
from batchllm.executor.step import UNREAD, Sample, StepBatch, StepScores
from batchllm.executor.stopping import StopRules
from batchllm.executor.stored_kv import StoredKv, StoredKvAttention
from batchllm.executor.structure import StructureMasks
from batchllm.executor.trace import StepTrace
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.score_reads import ScoreReads


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much memory and how large a step. Results do not depend on these."""

    kv_tokens: int  # capacity of the KV pool
    max_step_tokens: int = 1024
    max_running: int = 4096
    max_length: int | None = (
        None  # most tokens of a sequence, prompt and output together; None: what the model says
    )


@dataclass(slots=True)
class EngineStats:
    """What the engine has done so far; read it at any time."""

    steps: int = 0
    prompt_tokens_computed: int = 0  # prompt tokens that went through the model, recomputed ones included
    recomputed_tokens: int = 0  # decoded tokens fed again after a sequence had stepped back
    output_tokens: int = 0
    preemptions: int = 0
    kv_tokens_used: int = 0
    kv_tokens_peak: int = 0


class Engine:
    """Runs one plan. `run` yields the sequences that finished in each step, as they finish."""

    def __init__(
        self,
        model: ModelRunner,
        plan: Plan,
        prompts: PromptTable,
        requests: RequestTable,
        stop_rules: StopRules,
        options: EngineOptions,
        estimator: LengthEstimator | None = None,
        trace: StepTrace | None = None,
        backend: Backend | None = None,
        score_reads: ScoreReads | None = None,
        stored: StoredKv | None = None,
    ):
        self.model, self.plan, self.stop_rules = model, plan, stop_rules
        self.trace = trace
        self.stats = EngineStats()
        self.backend: Backend = backend or model.backend
        self.pool: Any = self.backend.make_pool(model.layers, options.kv_tokens, model.dtype)
        if stored is not None:
            stored.write_to(self.pool)
        self.scheduler = Scheduler(
            plan,
            prompts,
            self.pool,
            estimator or LengthEstimator(params=prompts.params),
            options.max_step_tokens,
            min(filter(None, (options.max_length, model.exact_length)), default=None),
            options.max_running,
            score_reads,
            stored,
        )
        self.score_reads = score_reads
        self.scores = ScoreStore.empty(0)
        if score_reads is not None:
            top = np.minimum(score_reads.top, model.vocab_size)
            self.scores = ScoreStore.empty(score_reads.num_scores, top)
        first_request = plan.request[plan.request_ptr[:-1]]
        self._keys = requests.key[first_request]  # [sequences, 2]
        self._kept_logits: dict[int, Tensor] = {}
        tokenizer, eos_ids = stop_rules.tokenizer, stop_rules.eos_ids
        self.rules = LogitRules(plan, prompts, eos_ids, tokenizer)
        self.structures: StructureMasks | None = None
        if any(params.structure for params in prompts.params):
            size = model.text_config.vocab_size
            self.structures = StructureMasks(load_vocabulary(tokenizer, size, sorted(eos_ids)), size)
        self._some_greedy = any(map(needs_only_largest, prompts.params))
        self._dead_ends: set[int] = set()  # sequences for which no token is allowed

    def run(self) -> Iterator[list[SequenceResult]]:
        self._lap("other")
        while batch := self.scheduler.schedule():
            held = self.pool.used, len(self.scheduler.running)
            self._lap("schedule")
            found = self._forward(batch)
            self._lap("forward")
            tokens, logprobs = self._choose(batch.samples, found)
            self._lap("sample")
            finished = self.scheduler.absorb(batch, tokens, logprobs, self._has_ended)
            self._lap("absorb")
            self._count(batch)
            self._trace_step(batch, *held)
            yield [self._result(run) for run in finished] + self._take_failed()
            self._lap("other")
        failed = self._take_failed()
        if failed:
            yield failed

    def _forward(self, batch: StepBatch) -> Tensor | NDArray[np.int64]:
        """[L, V] logits of this step, and keeps those that later sequences start from; or [L] tokens, where these are
        chosen faster without all logits."""
        if not len(batch.tokens):
            return torch.empty(0, 0)
        attention = self.backend.attention(self.pool, batch)
        stored = self.scheduler.stored
        if stored is not None:
            attention = StoredKvAttention(attention, stored)
        self._lap("prepare")
        tokens = self.model.greedy_tokens(batch, attention) if self._needs_only_largest(batch) else None
        if tokens is None:
            logits = self._logits(batch, attention)
            for node, row in batch.keep_logits:
                self._kept_logits[node] = logits[row].clone()
        if stored is not None:
            stored.end_step()
        return logits if tokens is None else tokens

    def _needs_only_largest(self, batch: StepBatch) -> bool:
        """Whether of this step's logits nothing is wanted but the token of the largest."""
        if not (self._some_greedy and batch.samples) or batch.keep_logits or batch.scores is not None:
            return False
        running = self.scheduler.running
        return all(
            sample.logit_row >= 0 and needs_only_largest(running[sample.sequence].params)
            for sample in batch.samples
        )

    def _logits(self, batch: StepBatch, attention: StepAttention) -> Tensor:
        if batch.scores is None:
            return self.model.forward(batch, attention)
        return self._forward_scored(batch, batch.scores, attention)

    def _forward_scored(self, batch: StepBatch, scores: StepScores, attention: StepAttention) -> Tensor:
        """Reads the step's scores, a slice of logits at a time; [S, V] logits of the rows sampled from."""
        sampled, kept = scores.sampled, [torch.empty(0, self.model.vocab_size, device=self.model.device)]
        for first, logits in self.model.forward_in_slices(
            batch, attention, slice_rows(self.model.vocab_size)
        ):
            self.scores.read(scores, first, logits)
            inside = sampled[(first <= sampled) & (sampled < first + len(logits))]
            if len(inside):
                kept.append(logits[torch.from_numpy(inside - first).to(logits.device)])
        return torch.cat(kept)

    def _choose(
        self, samples: list[Sample], found: Tensor | NDArray[np.int64]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """`_sample` from logits, where `_forward` has not chosen already. Scored sequences get token 0, which nobody
        reads."""
        if isinstance(found, np.ndarray):
            return found[[sample.logit_row for sample in samples]], None
        logits = found
        chosen = [index for index, sample in enumerate(samples) if sample.logit_row != UNREAD]
        if len(chosen) == len(samples):
            return self._sample(samples, logits)
        tokens, logprobs = np.zeros(len(samples), dtype=np.int64), None
        some_tokens, some_logprobs = self._sample([samples[index] for index in chosen], logits)
        tokens[chosen] = some_tokens
        if some_logprobs is not None:
            logprobs = np.zeros(len(samples), dtype=np.float32)
            logprobs[chosen] = some_logprobs
        return tokens, logprobs

    def _sample(self, samples: list[Sample], logits: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """One token for each sample, and its log-probability if any sequence asks for it."""
        if not samples:
            return np.zeros(0, dtype=np.int64), None
        rows = self._rows_of(samples, logits).cpu()
        running = [self.scheduler.running[sample.sequence] for sample in samples]
        params = [run.params for run in running]
        indices = np.array([len(run.output) for run in running], dtype=np.int64)
        keys = self._keys[[run.sequence for run in running]]
        ruled = self._ruled(rows, running)
        draw = partial(choose_tokens, ruled, params, keys, indices)
        tokens = draw() if self.structures is None else self.structures.choose(ruled, running, draw)
        if ruled is not rows or self.structures is not None:
            self._note_dead_ends(ruled, running, tokens)
        self._forget_logits()
        note_top_logprobs(rows, running)
        wanted = any(chosen.logprobs for chosen in params)
        return tokens, token_logprobs(rows, tokens) if wanted else None

    def _ruled(self, rows: Tensor, running: list[Running]) -> Tensor:
        """The logits [n, V] that tokens are chosen from, but for structure. `rows` stay as they are where
        log-probabilities are wanted."""
        ruled = self.rules.apply(rows, running)
        wants_logprobs = any(run.params.logprobs or run.params.top_logprobs for run in running)
        return rows.clone() if self.structures is not None and ruled is rows and wants_logprobs else ruled

    def _note_dead_ends(self, ruled: Tensor, running: list[Running], tokens: np.ndarray) -> None:
        """A token that must not come is chosen only where none may."""
        chosen = ruled[torch.arange(len(tokens)), torch.from_numpy(tokens)]
        for row in torch.isneginf(chosen).nonzero().flatten().tolist():
            self._dead_ends.add(running[row].sequence)

    def _rows_of(self, samples: list[Sample], logits: Tensor) -> Tensor:
        """[n, V]; the logits themselves where they are in this order already, for a copy takes as long as sampling."""
        numbers = [sample.logit_row for sample in samples]
        if numbers == list(range(len(logits))):
            return logits
        if min(numbers) < 0:
            return torch.stack([self._logits_of(sample, logits) for sample in samples])
        return logits[torch.tensor(numbers, device=logits.device)]

    def _logits_of(self, sample: Sample, logits: Tensor) -> Tensor:
        return logits[sample.logit_row] if sample.logit_row >= 0 else self._kept_logits[sample.node]

    def _forget_logits(self) -> None:
        for node in [node for node in self._kept_logits if not self.scheduler.keeps_logits(node)]:
            del self._kept_logits[node]

    def _finish_reason(self, run: Running) -> FinishReason | None:
        if run.sequence in self._dead_ends:
            return "error"
        if self.structures is not None and self.structures.is_complete(run):
            return "stop"
        return self.stop_rules.finish_reason(run.output, run.limit, run.params)

    def _has_ended(self, run: Running) -> bool:
        return self._finish_reason(run) is not None

    def _result(self, run: Running) -> SequenceResult:
        reason = self._finish_reason(run)
        assert reason is not None
        if self.scheduler.is_scored(run.sequence):
            return SequenceResult(run.sequence, (), "", "length")
        text = self.stop_rules.text(run.output, run.params)
        error = self._problem(run, reason, text)
        self._forget(run)
        if error is not None:
            return SequenceResult(run.sequence, (), "", "error", error=error)
        return SequenceResult(
            sequence=run.sequence,
            tokens=tuple(run.output),
            text=text,
            finish_reason=reason,
            logprobs=tuple(run.logprobs) if run.params.logprobs else None,
            top_logprobs=tuple(run.top_logprobs) if run.params.top_logprobs else None,
            prompt_logprobs=self._prompt_logprobs(run),
        )

    def _forget(self, run: Running) -> None:
        """The sequence is over."""
        self.rules.forget(run.sequence)
        if self.structures is not None:
            self.structures.forget(run.sequence)
        self._dead_ends.discard(run.sequence)

    def _prompt_logprobs(self, run: Running) -> PromptLogprobs | None:
        if run.params.prompt_logprobs is None:
            return None
        assert self.score_reads is not None, "nobody planned what the prompt's tokens are read from"
        prompts, row = self.scheduler.prompts, int(self.plan.node_row[run.leaf])
        tokens = np.asarray(prompts.tokens[prompts.offsets[row] : prompts.offsets[row + 1]])
        numbers = self.score_reads.of_prompt(run.leaf)
        return self.scores.prompt_logprobs(tokens, numbers, run.params.prompt_logprobs)

    def _problem(self, run: Running, reason: FinishReason, text: str) -> str | None:
        """Why what has been written is no answer."""
        if reason == "error":
            return f"after {len(run.output) - 1} tokens no token is allowed by the row's parameters"
        kind = run.params.structure
        if not kind or self.structures is None:
            return None
        problem = self.structures.error(run)
        if problem is not None:
            return f"generate.{kind} cannot be followed, probably because it is too large: {problem}"
        if reason == "length":
            if self.structures.is_valid(run):
                return None
            return (
                f"{run.limit:,} tokens were not enough for an answer that satisfies {kind}; raise max_tokens"
            )
        if not self.structures.is_valid(run) or self.stop_rules.was_cut(run.output, run.params, text):
            return f"a stop string or token came before an answer that satisfies {kind}; remove it"
        return None

    def _take_failed(self) -> list[SequenceResult]:
        failed = []
        for run, reason in self.scheduler.failed:
            self._forget(run)
            failed.append(SequenceResult(run.sequence, (), "", "error", error=reason))
        self.scheduler.failed.clear()
        return failed

    def _count(self, batch: StepBatch) -> None:
        self.stats.steps += 1
        self.stats.prompt_tokens_computed += batch.prompt_tokens
        self.stats.recomputed_tokens += len(batch.tokens) - batch.prompt_tokens - batch.decode_tokens
        self.stats.output_tokens = self.scheduler.output_tokens
        self.stats.preemptions = self.scheduler.preemptions
        self.stats.kv_tokens_used = self.pool.used
        self.stats.kv_tokens_peak = self.pool.peak

    def _lap(self, part: str) -> None:
        if self.trace is not None:
            self.trace.lap(part)

    def _trace_step(self, batch: StepBatch, kv_tokens: int, running: int) -> None:
        if self.trace is not None:
            self.trace.end_step(
                batch,
                running=running,
                waiting=self.scheduler.waiting,
                budget_tokens=self.scheduler.max_step_tokens,
                kv_tokens=kv_tokens,
            )
